"""Expert parallelism: the experts of a MoE layer live on several ranks, and tokens travel to them and back.

The ranks of a group are neighbouring devices of one plan rank, the members of its team in data-parallel copies of the
plan, all of them or runs of so many (`mipipe.runtime.experts.layers.expert_degree`); each sends its own part of the
tokens, and groups hold their experts by one map. All of them run the same program, so their all-to-alls meet in one
order, whatever the plan; a collective operator is part of its segment's trace
(`mipipe.graphs.operators.expert_kernels`), and this module gives the implementation that talks to other ranks. An
`ExpertMap` says which experts each rank holds: uneven and replicated ones too. The j-th row of an expert with c
replicas on source rank r goes to replica (j + r) mod c, so splits are even and the same in every rerun. Nothing is
dropped; the counts reach the host once per layer and microbatch. A stated load factor caps the rows a rank accepts.

Left out: replicas of one expert-parallel stage within a plan, and choosing the replica that is nearest.
Legend: T tokens, k experts per token, E experts, W ranks, S slots per rank, N rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.operators.expert_kernels import RETURN, ROUTE, SEND, count_into, scatter_rows
from mipipe.planner.experts.balance.maps import ExpertMap
from mipipe.runtime.experts.layers import ExpertLayer
from mipipe.runtime.ranks import comm

Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class SlotTable:
    """One layer's map, ready for routing. Slot d * S + s is slot s of rank d.

    ``experts``: [W,S]; ``slots``: [E,c], the slots of each expert, padded with its first; ``counts``: [E].
    """

    experts: np.ndarray
    slots: torch.Tensor
    counts: torch.Tensor
    replicated: bool

    @classmethod
    def build(cls, expert_map: ExpertMap, layer: int, device: torch.device) -> SlotTable:
        """The table of one layer of a map."""
        experts = expert_map.devices(layer)
        places: list[list[int]] = [[] for _ in range(expert_map.num_experts)]
        for slot, expert in enumerate(experts.ravel().tolist()):
            places[expert].append(slot)
        width = max(len(slots) for slots in places)
        padded = [slots + slots[:1] * (width - len(slots)) for slots in places]
        counts = torch.tensor([len(slots) for slots in places], device=device)
        return cls(experts, torch.tensor(padded, device=device), counts, width > 1)

    def first_of(self, rank: int) -> list[int]:
        """The slots of a rank that are their expert's first; known on the host."""
        flat = self.experts.ravel()
        first = np.unique(flat, return_index=True)[1]
        size = self.experts.shape[1]
        return [int(slot) - rank * size for slot in sorted(first) if slot // size == rank]

    def choose(self, chosen: torch.Tensor, rank: int) -> torch.Tensor:
        """The slot of every row [T*k] that wants expert ``chosen`` [T*k], on source rank ``rank``."""
        if not self.replicated:
            return self.slots[chosen, 0]
        ordered, order = torch.sort(chosen, stable=True)
        sizes = count_integers(chosen, len(self.counts))
        place = torch.arange(len(chosen), device=chosen.device) - (sizes.cumsum(0) - sizes)[ordered]
        return scatter_rows(self.slots[ordered, (place + rank) % self.counts[ordered]], order)


def count_integers(values: torch.Tensor, bins: int) -> torch.Tensor:
    """How often each of 0 .. bins - 1 occurs in a vector of integers: [bins]."""
    return count_into(torch.zeros(bins, dtype=torch.int64, device=values.device), values)


class Exchange:
    """One rank's expert-parallel group: who holds which expert, and the operators that move rows.

    ``rank`` of ``size`` ranks in ``group``. ``layers`` are all expert-parallel layers of the graph, in its order, as in
    ``expert_map``; ``local`` numbers those of this plan rank. ``load_factor`` times an even share of rows is what a
    rank accepts in one call; None: any number. ``firsts``: of each local layer the slots here that count an expert
    which several have (None: all); ``waits``: what this rank waits for.
    """

    def __init__(self, layers: Sequence[ExpertLayer], local: Sequence[int], expert_map: ExpertMap, group: Any,
                 rank: int, size: int, device: torch.device, waits: comm.Waits,
                 load_factor: float | None = None) -> None:
        self.layers, self.local = tuple(layers), tuple(local)
        self.group, self.rank, self.size = group, rank, size
        self.device, self.waits, self.load_factor = device, waits, load_factor
        self.tables: dict[int, SlotTable] = {}
        self.firsts: dict[int, torch.Tensor | None] = {}
        self.use(expert_map)

    def use(self, expert_map: ExpertMap) -> None:
        """Route by this map from now on. Weights must be where it says: see `mipipe.runtime.experts.moves`."""
        check_map(expert_map, self.layers, self.size)
        self.map = expert_map
        self.tables = {number: SlotTable.build(expert_map, number, self.device) for number in self.local}
        self.firsts = {number: self._first(table) for number, table in self.tables.items()}

    def _first(self, table: SlotTable) -> torch.Tensor | None:
        """The slots here that are their expert's first, as an index; None: all are."""
        first = table.first_of(self.rank)
        return None if len(first) == table.experts.shape[1] else torch.tensor(first, dtype=torch.int64,
                                                                              device=self.device)

    def rows(self) -> dict[str, list[int]]:
        """The experts this rank holds, slot by slot, for each of its banks by name."""
        return {bank: self.tables[number].experts[self.rank].tolist() for number in self.local
                for bank in self.layers[number].banks}

    def kernels(self) -> dict[str, dict[str, Callable[..., Any]]]:
        """For the segments of expert-parallel layers: implementations of the operators by kind, {} where it has none.

        Such segments get numbers of rows that change from call to call.
        """
        found: dict[str, dict[str, Callable[..., Any]]] = {}
        for number in self.local:
            for segment in self.layers[number].segments:
                found[segment] = {ROUTE: self._router(number), SEND: self.send, RETURN: self.give_back}
        return found

    def _router(self, number: int) -> Callable[[torch.Tensor, int], Routing]:
        return lambda index, num_experts: self.route(number, index)

    def route(self, number: int, index: torch.Tensor) -> Routing:
        """`all_to_all_route` of one layer: order [T*k], arrive [N], offsets [S], splits [2,W] (on the host).

        Raises:
            RunError: more rows arrive than the load factor allows, or a peer does not answer.
        """
        table = self.tables[number]
        slots_per_rank = table.experts.shape[1]
        slots = table.choose(index.reshape(-1), self.rank)
        order = torch.sort(slots, stable=True)[1]
        leaving = count_integers(slots, self.size * slots_per_rank)
        arriving = torch.empty_like(leaving)
        self._exchange(arriving, leaving, None, None, f"the routing of {self.layers[number].name}")
        by_rank = torch.stack([counts.view(self.size, slots_per_rank).sum(1) for counts in (leaving, arriving)])
        coming = comm.to_host(by_rank)
        numbers = torch.arange(slots_per_rank, device=index.device).repeat(self.size)
        splits = self.waits.arrived(coming, lambda: f"the routing of {self.layers[number].name}")
        total = int(splits[1].sum())
        self._check_room(number, total, index.numel())
        arrive = torch.sort(numbers.repeat_interleave(arriving, output_size=total), stable=True)[1]
        offsets = arriving.view(self.size, slots_per_rank).sum(0).cumsum(0).to(torch.int32)
        return order, arrive, offsets, splits

    def send(self, rows: torch.Tensor, order: torch.Tensor, arrive: torch.Tensor,
             splits: torch.Tensor) -> torch.Tensor:
        """`all_to_all_send`: [T*k,H] -> [N,H]."""
        leaving, arriving = splits.tolist()
        found = rows.new_empty(sum(arriving), *rows.shape[1:])
        self._exchange(found, rows[order], arriving, leaving, "rows for experts")
        return found[arrive]

    def give_back(self, rows: torch.Tensor, order: torch.Tensor, arrive: torch.Tensor,
                  splits: torch.Tensor) -> torch.Tensor:
        """`all_to_all_return`: [N,H] -> [T*k,H]."""
        leaving, arriving = splits.tolist()
        found = rows.new_empty(sum(leaving), *rows.shape[1:])
        self._exchange(found, scatter_rows(rows, arrive), leaving, arriving, "rows from experts")
        return scatter_rows(found, order)

    def swap(self, rows: torch.Tensor, arriving: Sequence[int], leaving: Sequence[int], what: str) -> torch.Tensor:
        """The rows that others send to this rank, by sender; ``rows`` are listed by receiver."""
        found = rows.new_empty(sum(arriving), *rows.shape[1:])
        self._exchange(found, rows, arriving, leaving, what)
        return found

    def _exchange(self, output: torch.Tensor, given: torch.Tensor, arriving: Sequence[int] | None,
                  leaving: Sequence[int] | None, what: str) -> None:
        work = comm.start_all_to_all(self.group, output, given.contiguous(), arriving, leaving)
        self.waits.wait([work], lambda: f"all-to-all of {what}")

    def _check_room(self, number: int, rows: int, even: int) -> None:
        if self.load_factor is not None and rows > self.load_factor * even:
            raise RunError(f"{self.layers[number].name}: {rows} rows arrive at rank {self.rank} of {self.size}, above"
                           f" the load factor of {self.load_factor:g} times {even} that memory was planned for; place"
                           " the experts again (mipipe experts), or raise experts.load_factor")


def contiguous_map(layers: Sequence[ExpertLayer], size: int, model: str = "") -> ExpertMap:
    """The map without replicas that gives rank d the d-th block of experts.

    Raises:
        InputError: the experts do not divide evenly over the ranks.
    """
    count = layers[0].num_experts
    if count % size:
        raise InputError(f"{count} experts do not divide over the {size} devices that share them; give a map (mipipe"
                         " experts --replicas ...), start another number of copies, or plan with another --degrees"
                         " expert=")
    return ExpertMap(count, size, tuple(tuple(range(count)) for _ in layers), model)


def check_map(expert_map: ExpertMap, layers: Sequence[ExpertLayer], size: int) -> None:
    """Raise `InputError` unless the map is for these layers and this many ranks."""
    found = len(expert_map.physical_to_logical), expert_map.num_experts, expert_map.num_devices
    expected = len(layers), layers[0].num_experts, size
    if found != expected:
        texts = [f"{a} layers of {b} experts on {c} devices" for a, b, c in (found, expected)]
        raise InputError(f"expert map: has {texts[0]}, but this run has {texts[1]} (those that share experts);"
                         " make a map for this model and these devices (mipipe experts)")
    uneven = [layer.name for layer in layers if layer.num_experts != expert_map.num_experts]
    if uneven:
        raise InputError(f"expert map: {uneven[0]} has another number of experts than {layers[0].name}")


def kernels_of(exchange: Exchange | None) -> Mapping[str, Mapping[str, Callable[..., Any]]]:
    """The operators that segments get from an exchange; none without one."""
    return {} if exchange is None else exchange.kernels()
