"""Rows of expert banks between ranks: gradients of replicas summed, and experts moved to another map.

Both are lists of (source slot, target slot) that every rank derives from the maps alone, carried by one all-to-all of
rows for each dtype and layer. The sum over replicas is made by the rank with an expert's first slot, in the order of
slots, and returned to the others: bitwise the same on all of them and in every rerun.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mipipe.graphs.errors import InputError
from mipipe.planner.experts.balance.maps import ExpertMap
from mipipe.runtime.experts.exchange import Exchange, check_map
from mipipe.runtime.ranks import comm
from mipipe.runtime.weights.weights import Weights


@dataclass(frozen=True, slots=True)
class RowMove:
    """A row's way: from a slot of a rank to a slot of a rank. ``turn`` tells moves to one slot apart."""

    source: int
    source_slot: int
    target: int
    target_slot: int
    turn: int = 0


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One rank's part of a list of moves: what it sends, by target, and where arriving rows go, by source."""

    sends: tuple[RowMove, ...]
    arrivals: tuple[RowMove, ...]
    size: int

    @classmethod
    def of(cls, moves: Sequence[RowMove], rank: int, size: int) -> RowPlan:
        """The part of ``rank`` of ``size``."""
        def place(move: RowMove) -> tuple[int, int, int, int, int]:
            return (move.source, move.target, move.turn, move.target_slot, move.source_slot)

        ordered = sorted(moves, key=place)
        return cls(tuple(move for move in ordered if move.source == rank),
                   tuple(move for move in ordered if move.target == rank), size)

    def leaving(self) -> list[int]:
        """Rows sent to each rank."""
        return np.bincount([move.target for move in self.sends], minlength=self.size).tolist()

    def arriving(self) -> list[int]:
        """Rows received from each rank."""
        return np.bincount([move.source for move in self.arrivals], minlength=self.size).tolist()


def replica_moves(experts: np.ndarray) -> list[RowMove]:
    """From every further replica of an expert to its first slot; ``experts`` [W,S]. ``turn`` counts the replicas."""
    slots = experts.shape[1]
    first: dict[int, int] = {}
    seen: dict[int, int] = {}
    moves = []
    for slot, expert in enumerate(experts.ravel().tolist()):
        home = first.setdefault(expert, slot)
        if slot != home:
            seen[expert] = seen.get(expert, 0) + 1
            moves.append(RowMove(slot // slots, slot % slots, home // slots, home % slots, seen[expert]))
    return moves


def placement_moves(before: np.ndarray, after: np.ndarray) -> list[RowMove]:
    """One move for every slot of ``after`` [W,S'], from a rank that holds its expert in ``before`` [W,S].

    From the rank itself where it can be, else from the replicas in turn.
    """
    homes: dict[int, list[tuple[int, int]]] = {}
    for rank, row in enumerate(before.tolist()):
        for slot, expert in enumerate(row):
            homes.setdefault(expert, []).append((rank, slot))
    asked: dict[int, int] = {}
    moves = []
    for rank, row in enumerate(after.tolist()):
        for slot, expert in enumerate(row):
            own = [home for home in homes[expert] if home[0] == rank]
            turn = asked.get(expert, 0)
            source = own[0] if own else homes[expert][turn % len(homes[expert])]
            asked[expert] = turn + (not own)
            moves.append(RowMove(*source, rank, slot))
    return moves


def _pack(tensors: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """These rows of banks [S,...] side by side: [rows, elements]."""
    return torch.cat([item[index].flatten(1) for item in tensors], dim=1)


def _unpack(packed: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The parts of `_pack`'s result, in the shapes of rows of the banks."""
    sizes = [item[:1].numel() if len(item) else 0 for item in tensors]
    parts = packed.split(sizes, dim=1)
    return [part.reshape(len(packed), *item.shape[1:]) for part, item in zip(parts, tensors, strict=True)]


@dataclass(frozen=True, slots=True)
class _ReplicaRows:
    """One layer's rows on this rank, as indices on its device: ``mine`` go to their homes and come back; ``homes`` get
    what arrives; ``turns`` has, for each further replica, the arrived rows and where they are added."""

    plan: RowPlan
    mine: torch.Tensor
    homes: torch.Tensor
    turns: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, exchange: Exchange, number: int) -> _ReplicaRows:
        """Those of a layer, as the map in use has them."""
        plan = RowPlan.of(replica_moves(exchange.tables[number].experts), exchange.rank, exchange.size)

        def index(rows: Sequence[int]) -> torch.Tensor:
            return torch.tensor(rows, dtype=torch.int64, device=exchange.device)

        homes = [move.target_slot for move in plan.arrivals]
        turns = []
        for turn in range(1, max((move.turn for move in plan.arrivals), default=0) + 1):
            rows = [place for place, move in enumerate(plan.arrivals) if move.turn == turn]
            turns.append((index(rows), index([homes[place] for place in rows])))
        return cls(plan, index([move.source_slot for move in plan.sends]), index(homes), tuple(turns))


class ReplicaSums:
    """The gradients of replicated experts, summed over their group at the end of a step. `begin` sets earlier ones
    aside."""

    def __init__(self, exchange: Exchange, weights: Weights, graded: Iterable[str]) -> None:
        self._exchange, self._weights, self._graded = exchange, weights, frozenset(graded)
        self._aside: dict[str, torch.Tensor] = {}
        self._map: ExpertMap | None = None
        self._rows: dict[int, _ReplicaRows] = {}

    def _layers(self) -> list[tuple[int, list[str]]]:
        """Local layers with replicas and their trained banks."""
        exchange = self._exchange
        layers = [(number, [name for name in exchange.layers[number].banks if name in self._graded])
                  for number in exchange.local if exchange.tables[number].replicated]
        return [(number, names) for number, names in layers if names]

    def begin(self) -> None:
        """Set aside what is summed already."""
        self._aside.clear()
        if self._map is not self._exchange.map:  # once for a map: indices come from the host, which waits for them
            self._map = self._exchange.map
            self._rows = {number: _ReplicaRows.of(self._exchange, number) for number, _ in self._layers()}
        for _, names in self._layers():
            for name in names:
                parameter = self._weights.parameters[name]
                if parameter.grad is not None:
                    self._aside[name], parameter.grad = parameter.grad, None

    def finish(self) -> None:
        """Sum, and add what was set aside. All ranks of the group must call."""
        for number, names in self._layers():
            self._sum(number, [self._gradient(name) for name in names])
        for name, earlier in self._aside.items():
            self._gradient(name).add_(earlier)
        self._aside.clear()

    def _sum(self, number: int, gradients: list[torch.Tensor]) -> None:
        exchange, rows = self._exchange, self._rows[number]
        arriving, leaving = rows.plan.arriving(), rows.plan.leaving()
        what = f"gradients of replicas in {exchange.layers[number].name}"
        arrived = _unpack(exchange.swap(_pack(gradients, rows.mine), arriving, leaving, what), gradients)
        for places, targets in rows.turns:
            for gradient, rows_of in zip(gradients, arrived, strict=True):
                gradient[targets] += rows_of[places]
        back = _unpack(exchange.swap(_pack(gradients, rows.homes), leaving, arriving, what), gradients)
        for gradient, rows_of in zip(gradients, back, strict=True):
            gradient.index_copy_(0, rows.mine, rows_of)

    def _gradient(self, name: str) -> torch.Tensor:
        parameter = self._weights.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad


def expert_squares(exchange: Exchange, weights: Weights, counts: Callable[[str], bool]) -> torch.Tensor:
    """The squared 2-norm of the gradients of all local layers' experts, over the group; replicas count once, banks
    where this device ``counts`` them: [], float64."""
    counted = []
    for number in exchange.local:
        first = exchange.firsts[number]
        for name in exchange.layers[number].banks:
            gradient = weights.parameters[name].grad
            if gradient is not None and counts(name):
                counted.append(gradient if first is None else gradient[first])
    norms = torch._foreach_norm(counted) if counted else ()
    total = torch.stack([torch.zeros((), dtype=torch.float64, device=exchange.device),
                         *(norm.double() for norm in norms)]).square().sum()
    exchange.waits.wait([comm.start_all_reduce(exchange.group, total)], lambda: "the norm of experts' gradients")
    return total


@dataclass(frozen=True, slots=True)
class Moved:
    """What a re-placement did on this rank: slots that got their expert from elsewhere, bytes received, seconds."""

    experts: int
    num_bytes: int
    seconds: float


def move_experts(exchange: Exchange, weights: Weights, expert_map: ExpertMap,
                 optimizer: torch.optim.Optimizer | None = None) -> Moved:
    """Bring weights, gradients and optimizer state of all local banks to where ``expert_map`` wants them.

    Between two steps, by all ranks of the group. Routing follows the new map; the parameters stay the same objects.

    Raises:
        InputError: the map is for another model or number of ranks, or the optimizer's state is no row for each expert.
    """
    check_map(expert_map, exchange.layers, exchange.size)
    start = time.perf_counter()
    experts, received = 0, 0
    for number in exchange.local:
        before, after = exchange.tables[number].experts, expert_map.devices(number)
        plan = RowPlan.of(placement_moves(before, after), exchange.rank, exchange.size)
        foreign = sum(move.source != move.target for move in plan.arrivals)
        experts += foreign
        for name in exchange.layers[number].banks:
            received += foreign * _move_bank(exchange, weights, name, plan, optimizer)
    exchange.use(expert_map)
    return Moved(experts, received, time.perf_counter() - start)


def _move_bank(exchange: Exchange, weights: Weights, name: str, plan: RowPlan,
               optimizer: torch.optim.Optimizer | None) -> int:
    """Move one bank with all that belongs to it; the bytes of one expert's row."""
    parameter = weights.parameters[name]
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    keys = [key for key, item in state.items() if isinstance(item, torch.Tensor) and item.dim()]
    for key in keys:
        if state[key].shape[:1] != parameter.shape[:1]:
            raise InputError(f"expert map: cannot move the optimizer's {key} of {name}: its shape"
                             f" {tuple(state[key].shape)} has no row for each expert; use another optimizer")
    row_bytes = 0

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal row_bytes
        row_bytes += tensor[:1].nbytes
        leaving = torch.tensor([move.source_slot for move in plan.sends], dtype=torch.int64, device=tensor.device)
        packed = _pack([tensor], leaving)
        rows, = _unpack(exchange.swap(packed, plan.arriving(), plan.leaving(), f"experts of {name}"), [tensor])
        slots = torch.tensor([move.target_slot for move in plan.arrivals], dtype=torch.int64, device=tensor.device)
        return torch.empty_like(rows).index_copy_(0, slots, rows)

    gradient, parameter.grad = parameter.grad, None
    parameter.data = moved(parameter.data)
    if gradient is not None:
        parameter.grad = moved(gradient)
    for key in keys:
        state[key] = moved(state[key])
    weights.fit(name)
    return row_bytes
