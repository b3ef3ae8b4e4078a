"""Parameters that several segments read (tied tables): a rank that has several of them holds these once.

The price of such a parameter is part of the first piece's that reads it (`Pricer.costs`), so that sums over pieces
count it once, as bounds must. A stage that reads it on another rank than the first piece's holds it as well, and its
gradients are summed over these ranks and all copies after the last backward, beside nothing
(`mipipe.runtime.engine.reduce`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from mipipe.graphs.costs.collectives import collective_ns
from mipipe.graphs.modes import CollectiveKind, ModeProfile
from mipipe.graphs.operator_graph import DTYPE_BYTES, Phase
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.piece_cost import PhaseCost, PieceCost
from mipipe.planner.teams.prices.pieces import ModelPieces
from mipipe.planner.teams.prices.resident import HeldLength, PieceWork, divided_length, held_cost


@dataclass(frozen=True, slots=True)
class TiedParameter:
    """What it costs a member that has it once (no phases). ``reads``: how many segments of every piece that reads it
    do, the first piece in front; ``held``, ``trained``: its bytes, and those that train, before ``zero`` divides them;
    ``together``: seconds of the sum of its gradients over two ranks and all that have the same of it on each."""

    reads: dict[int, int]
    held: int
    trained: int
    cost: PieceCost
    together: float

    @property
    def home(self) -> int:
        """The first piece."""
        return next(iter(self.reads))

    def times(self, cost: PieceCost, times: int) -> PieceCost:
        """The cost of a piece that has it so often more (below zero: less)."""
        own = self.cost
        return replace(cost, weights=cost.weights + times * own.weights,
                       gradients=cost.gradients + times * own.gradients, state=cost.state + times * own.state,
                       reduce=max(0.0, cost.reduce + times * own.reduce),
                       gather=max(0.0, cost.gather + times * own.gather),
                       optimizer=max(0.0, cost.optimizer + times * own.optimizer))

    def summed_apart(self, cost: PieceCost) -> PieceCost:
        """The cost of a piece that has it, where the sum over ranks takes the place of that over copies."""
        return replace(cost, reduce=max(0.0, cost.reduce - self.cost.reduce))


def tied_parameters(model: ModelPieces, machine: Machine, degrees: Degrees,
                    profile: Callable[[int], ModeProfile]) -> tuple[TiedParameter, ...]:
    """The tied parameters of a model on a team of these degrees.

    ``profile``: that of a segment (by index); its parameters are taken as divided alike.
    """
    found = []
    specs, piece_of = model.index.parameters, {
        member: number for number, piece in enumerate(model.pieces) for member in piece.members}
    for fqn, members in model.tied.items():
        first = members[0]
        names = [name for name in model.graph.segments[first].parameters if not specs[name].buffer]
        whole = sum(specs[name].spec.num_bytes for name in names)
        own, place = profile(first), next(place for place, name in enumerate(model.graph.segments[first].parameters)
                                          if fqn in (name, specs[name].tied_to))
        size = round(own.resident.dense * specs[fqn].spec.num_bytes / max(1, whole))
        trains = specs[fqn].trainable and any(model.index.runs(member, Phase.W) for member in members)
        trained = size if trains else 0
        length = divided_length(specs[fqn].spec.shape, own.parts[place], 0)
        work = PieceWork({Phase.F: PhaseCost(), Phase.I: PhaseCost()}, 0, 0, 0, 0, 0, 0, 0, 0,
                         (HeldLength(length, False, size, trained, 0),))
        cost = held_cost(machine, degrees, work, work.phases, (0, 0, 0))
        gradients = trained // DTYPE_BYTES[machine.dtype] * machine.gradient_bytes  # all, also where parts are kept
        together = collective_ns(machine.fabric, CollectiveKind.ALL_REDUCE, gradients, 2 * degrees.alike,
                                 degrees.tensor) / 1e9
        reads = dict(Counter(piece_of[member] for member in members))
        found.append(TiedParameter(reads, size, trained, cost, together))
    return tuple(found)


def counted_once(costs: Sequence[PieceCost], tied: Sequence[TiedParameter]) -> list[PieceCost]:
    """The costs of all pieces, priced each by itself, with every tied parameter in its first piece's alone."""
    found = list(costs)
    for parameter in tied:
        for piece, reads in parameter.reads.items():
            found[piece] = parameter.times(found[piece], (piece == parameter.home) - reads)
    return found


def on_ranks(costs: Sequence[PieceCost], cuts: Sequence[Collection[int]], ranks: Sequence[Collection[int]],
             tied: Sequence[TiedParameter]) -> tuple[list[PieceCost], list[float]]:
    """The costs of all pieces where the stages of ``cuts`` are on these ranks, and seconds that every stage's sums of
    tied gradients over ranks take."""
    found, spent = list(costs), [0.0] * len(cuts)
    stage_of = {piece: stage for stage, pieces in enumerate(cuts) for piece in pieces}
    for parameter in tied:
        home = stage_of[parameter.home]
        first: dict[int, int] = {}
        for piece in sorted(parameter.reads):
            if not set(ranks[stage_of[piece]]) <= set(ranks[home]):
                first.setdefault(stage_of[piece], piece)
        alone: list[tuple[int, int]] = []
        for stage, piece in first.items():  # another stage on the same ranks holds it for this one
            if not any(set(ranks[stage]) <= set(ranks[other]) for other, _ in alone):
                alone.append((stage, piece))
        for stage, piece in alone:
            found[piece] = parameter.summed_apart(parameter.times(found[piece], 1))
            spent[stage] += parameter.together
        if alone:
            found[parameter.home] = parameter.summed_apart(found[parameter.home])
            spent[home] += parameter.together
    return found, spent
