"""What a piece costs a member of a team: seconds of each phase by what they go into, and bytes.

Compute comes from profiles of modes (traced where the graph has them, else estimated from shapes) by a roofline below
peaks; collectives by the cluster's levels. Nothing overlaps a collective of the tensor, context or
expert axis. With sharded gradients (`zero` 2) they are reduced in every microbatch beside the weight gradients; with
sharded parameters (`zero` 3) these are gathered beside the forward and the backward. What is longer than the phase
beside it shows.

A branch may have its own mode along the tensor axis (`ModelPieces.own_modes`). Members in ``batch`` mode have whole
parameters and their part of the samples, and sum gradients once per step, over the tensor axis and the copies together;
with `zero` 2 and 3 over the tensor axis, each the part that its copy keeps. What passes between modes is changed by the
segment that reads it, as the runtime does (`mipipe.planner.teams.prices.between_modes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mipipe.graphs.costs.collectives import collective_ns
from mipipe.graphs.efficiency import phase_seconds
from mipipe.graphs.errors import InputError
from mipipe.graphs.modes import Collective, PhaseWork
from mipipe.graphs.operator_graph import Phase, Role
from mipipe.planner.problems.from_layers import LayerTimes
from mipipe.planner.teams.prices.between_modes import resharded
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.piece_cost import Axis, PhaseCost, PieceCost, as_measured
from mipipe.planner.teams.prices.pieces import ModelPieces
from mipipe.planner.teams.prices.profiles import SegmentProfiles
from mipipe.planner.teams.prices.resident import HeldLength, PieceStays, PieceWork, SegmentWork, held_cost
from mipipe.planner.teams.prices.tied import TiedParameter, counted_once, tied_parameters


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a whole model on a team of certain degrees: parameters, those that train, and the least that one
    sequence keeps (with all layers run again)."""

    dense: int
    experts: int
    trained_dense: int
    trained_experts: int
    kept: float


class Pricer(SegmentProfiles):
    """Prices pieces on a machine.

    ``measured``: seconds of every piece's forward, backward and update where they were measured on one device (with the
    team's collectives in them): they take the place of the estimates.
    """

    def __init__(self, model: ModelPieces, machine: Machine, measured: Sequence[LayerTimes] | None = None) -> None:
        if measured is not None and len(measured) != len(model.pieces):
            raise InputError(f"times of {len(measured)} layers, but the model has {len(model.pieces)} pieces"
                             f" ({len(model.layers)} layers, and what comes before and after); expected one for each")
        super().__init__(model, machine)
        self.measured = measured
        self._counts = Counter(piece.kind for piece in model.pieces)
        self._costs: dict[tuple[object, ...], PieceCost] = {}
        self._works: dict[tuple[object, ...], PieceWork] = {}
        self._segments: dict[tuple[object, ...], SegmentWork] = {}
        self._changed: dict[tuple[object, ...], tuple[dict[Phase, PhaseWork], dict[Phase, list[Collective]]]] = {}
        self._stayed: dict[tuple[object, ...], PieceStays] = {}
        self._footprints: dict[tuple[object, ...], Footprint] = {}
        self._least: dict[tuple[object, ...], Footprint] = {}
        self._tied: dict[Degrees, tuple[TiedParameter, ...]] = {}

    def on(self, machine: Machine, measured: Sequence[LayerTimes] | None = None) -> Pricer:
        """The same model on another machine; profiles are shared where both have the same kernels."""
        other = Pricer(self.model, machine, measured)
        if machine.kernels == self.machine.kernels:
            other._profiles, other._facts, other.origins = self._profiles, self._facts, self.origins
        return other

    def costs(self, degrees: Degrees) -> list[PieceCost]:
        """The cost of every piece, in the model's order; of what several pieces read in the first one's."""
        if self.measured is None:
            by_kind = [self._kind(number, degrees) for number in range(len(self.model.kinds))]
            found = [by_kind[piece.kind] for piece in self.model.pieces]
        else:
            found = [self._kind(piece.kind, degrees, own)
                     for piece, own in zip(self.model.pieces, self.measured, strict=True)]
        return counted_once(found, self.tied(degrees)) if self.model.tied else found

    def tied(self, degrees: Degrees) -> tuple[TiedParameter, ...]:
        """The parameters that several segments read."""
        key = _without_ranks(degrees)
        if key not in self._tied:
            self._tied[key] = tied_parameters(self.model, self.machine, degrees,
                                              lambda member: self.profile(member, degrees))
        return self._tied[key]

    def _kind(self, kind: int, degrees: Degrees, measured: LayerTimes | None = None) -> PieceCost:
        key = (kind, self.division(self.model.kinds[kind].members, degrees), degrees.copies, degrees.zero,
               degrees.microbatch, degrees.recompute, measured)
        found = self._costs.get(key)
        if found is None:
            found = self._costs[key] = self._price(kind, degrees, measured)
        return found

    def footprint(self, degrees: Degrees) -> Footprint:
        """The footprint on a team of these degrees."""
        key = self.division(self.model.with_experts, degrees)
        if key not in self._footprints:
            plain = replace(degrees, recompute="none", microbatch=1)
            own = [self._footprint(number, plain) for number in range(len(self.model.kinds))]
            dense, experts, trained, trained_experts = (
                sum(self._counts[number] * size for number, size in enumerate(sizes)) for sizes in (
                    [each.dense for each in own], [each.experts for each in own],
                    [each.trained_dense for each in own], [each.trained_experts for each in own]))
            for tied in self.tied(plain) if self.model.tied else ():
                again = sum(tied.reads.values()) - 1
                dense, trained = dense - again * tied.held, trained - again * tied.trained
            self._footprints[key] = Footprint(dense, experts, trained, trained_experts, sum(
                self._counts[number] * each.kept for number, each in enumerate(own)))
        return self._footprints[key]

    def _footprint(self, kind: int, degrees: Degrees) -> Footprint:
        """That of one piece of a kind."""
        piece = self.model.kinds[kind]
        key = kind, self.division(piece.members, degrees)
        if key in self._least:
            return self._least[key]
        ways = [degrees, replace(degrees, recompute="latents")] if self.model.latents else [degrees]
        sums, kept, acts = [0, 0, 0, 0], 0.0, False
        for member in piece.members:
            held, trains = self.profile(member, degrees).resident, self.model.index.runs(member, Phase.W)
            sums = [total + size for total, size in zip(sums, (
                held.dense, held.experts, trains * held.trainable_dense, trains * held.trainable_experts), strict=True)]
            acts = acts or self.model.index.runs(member, Phase.I)
        if acts and piece.layer is not None:
            left = self.model.split(piece.members[0], degrees)[1]
            kept = min(self._inputs(piece.members[0], degrees, 1 / self.model.sequences),
                       *(left * sum(self.profile(member, way).kept.fi + self.profile(member, way).kept.fw
                                    for member in piece.members) for way in ways))
        self._least[key] = Footprint(sums[0], sums[1], sums[2], sums[3], kept)
        return self._least[key]

    def collectives(self, degrees: Degrees) -> int:
        """How many collectives all pieces wait for in a microbatch."""
        return sum(times * self._work(kind, degrees).collectives for kind, times in self._counts.items())

    def _price(self, kind: int, degrees: Degrees, measured: LayerTimes | None) -> PieceCost:
        piece, work = self.model.kinds[kind], self._work(kind, degrees)
        count = degrees.microbatch / self.model.sequences
        found = dict(work.phases)
        kept, again, rerun, ahead = work.kept, 0, 0, work.ahead
        if degrees.recompute == "full" and Phase.I in found and piece.layer is not None:
            again, kept, ahead = kept, self._inputs(piece.members[0], degrees, count), work.ahead_again
            found[Phase.I] = found[Phase.I].plus(found[Phase.F])
        elif degrees.recompute == "latents":
            rerun = max(0, self._work(kind, replace(degrees, recompute="none")).kept - kept)
        if measured is not None:
            found = as_measured(found, measured)
        price = held_cost(self.machine, degrees, work, found, (kept, work.late, again))
        if measured is not None and measured.update is not None:
            price = replace(price, optimizer=measured.update)
        return replace(price, buffers=work.buffers, until_w=work.until_w, workspace=work.workspace,
                       rerun=rerun, forward_space=price.forward_space + ahead)

    def _work(self, kind: int, degrees: Degrees) -> PieceWork:
        """What of a piece's cost is the same however state is shared and whether whole layers run again."""
        way = degrees.recompute if degrees.recompute != "full" else "none"
        key = kind, self.division(self.model.kinds[kind].members, degrees), degrees.microbatch, way
        if key in self._works:
            return self._works[key]
        stays, members = self._stays(kind, degrees), self.model.kinds[kind].members
        count = degrees.microbatch / self.model.sequences * stays.left
        found: dict[Phase, PhaseCost] = {}
        buffers = workspace = talks = ahead = ahead_buffers = 0
        for member in members:
            work = self._segment(member, degrees, count)
            for phase, cost in work.phases.items():
                found[phase] = found[phase].plus(cost) if phase in found else cost
                buffers = max(buffers, work.largest[phase])
                if phase is Phase.F:
                    ahead, ahead_buffers = max(ahead, work.alive[phase]), max(ahead_buffers, work.largest[phase])
                else:
                    workspace = max(workspace, work.alive[phase])
            talks += work.collectives
        plain, again = (ahead_buffers + max(ahead, round(alive * count)) for alive in stays.alive)
        self._works[key] = PieceWork(found, round(stays.kept * count), round(stays.late * count),
                                     round(stays.until_w * count), buffers, workspace, plain, again,
                                     talks, stays.lengths)
        return self._works[key]

    def _stays(self, kind: int, degrees: Degrees) -> PieceStays:
        """What of a piece's work is the same for microbatches of any size."""
        way = degrees.recompute if degrees.recompute != "full" else "none"
        piece, index = self.model.kinds[kind], self.model.index
        key = kind, self.division(piece.members, degrees), way
        if key in self._stayed:
            return self._stayed[key]
        kept = until_w = late = 0
        lengths: dict[tuple[int, bool], list[int]] = {}
        for member in piece.members:
            profile = self.profile(member, degrees)
            if index.runs(member, Phase.I) or index.runs(member, Phase.W):
                kept += profile.kept.fi + profile.kept.fw
                until_w, late = until_w + profile.kept.fw, late + profile.kept.iw
            for item in self.lengths(member, degrees):
                own = lengths.setdefault((item.length, item.experts), [0, 0, 0])
                own[:] = own[0] + item.held, own[1] + item.trained, own[2] + item.summed
        self._stayed[key] = PieceStays(
            self.model.split(piece.members[0], degrees)[1], kept, late, until_w,
            tuple(HeldLength(*key, *sizes) for key, sizes in lengths.items()),
            (self.alive(piece, degrees, False), self.alive(piece, degrees, True)))
        return self._stayed[key]

    def _segment(self, member: int, degrees: Degrees, count: float) -> SegmentWork:
        """A segment's part of a piece's work; ``count``: captured microbatches that a member has."""
        way = degrees.recompute if degrees.recompute != "full" else "none"
        division = self.division((member,), degrees)
        key = member, division, degrees.microbatch, way
        found = self._segments.get(key)
        if found is not None:
            return found
        if (member, division, way) not in self._changed:
            self._changed[member, division, way] = resharded(
                self.model, member, self.profile(member, degrees), self.columns(member, degrees), degrees)
        machine, fanout, whole = self.machine, self.fanout(member), degrees.microbatch / self.model.sequences
        found = self._segments[key] = SegmentWork()
        phases, moved = self._changed[member, division, way]
        for phase, work in phases.items():
            if self.model.index.runs(member, phase):
                seconds = phase_seconds(work, machine.kind.achieved, flops=machine.kind.peak(machine.dtype),
                                        low=machine.low, low_flops=float(machine.peak),
                                        bytes_per_s=float(machine.kind.bytes_per_s or 1),
                                        launch_ns=machine.kind.launch_ns, count=count)
                if self.model.graph.segments[member].tags.role is Role.EXPERTS:
                    seconds += machine.kind.achieved.expert_ns * 1e-9
                cost = PhaseCost(seconds, self._talk(work.collectives, degrees, count, fanout))
                if moved[phase]:
                    cost = cost.plus(PhaseCost(0.0, self._talk(moved[phase], degrees, whole, 1.0)))
                found.phases[phase] = cost
                found.alive[phase] = round(work.workspace_bytes * count)
                found.largest[phase] = max((round(item.num_bytes * size) for size, items in (
                    (count, work.collectives), (whole, moved[phase])) for item in items), default=0)
                found.collectives += sum(item.count for item in (*work.collectives, *moved[phase]))
        return found

    def _inputs(self, member: int, degrees: Degrees, count: float) -> int:
        """Bytes of a piece's inputs on one member."""
        trace, found = self.model.index.traces[member], 0.0
        for name, value in zip(trace.inputs, self.model.graph.segments[member].inputs, strict=True):
            source = self.model.index.source[value]
            if source < 0 and self.model.mode(member, degrees) == "batch":
                parts = degrees.context
            else:
                parts = self.model.parts_between(source if source >= 0 else member, degrees)
            found += trace.specs[name].num_bytes * count / parts
        return round(found)

    def _talk(self, collectives: Sequence[Collective], degrees: Degrees, count: float,
              fanout: float) -> dict[Axis, float]:
        found: dict[Axis, float] = {}
        groups: dict[str, tuple[Axis, int, int]] = {
            "tensor": ("tensor", degrees.tensor, 1), "sequence": ("tensor", degrees.tensor, 1),
            "batch": ("tensor", degrees.tensor, 1), "context": ("context", degrees.context, degrees.tensor),
            "expert": ("expert", degrees.expert, 1)}
        for item in collectives:
            axis, members, stride = groups[item.axis]
            spent = collective_ns(self.machine.fabric, item.kind, round(item.num_bytes * count), members, stride,
                                  fanout=fanout)
            found[axis] = found.get(axis, 0.0) + item.count * spent / 1e9
        if self.machine.overlap:
            achieved = self.machine.kind.achieved
            for axis, hidden in (("tensor", achieved.hidden), ("expert", achieved.hidden_experts)):
                if axis in found:
                    found[axis] *= 1 - hidden
        return found


def _without_ranks(degrees: Degrees) -> Degrees:
    """The degrees that a piece's price depends on."""
    return replace(degrees, ranks=1, chunks=1)
