"""What members of a team have of every segment: its profile, as traced or estimated, its shares, and what follows of
these for all microbatches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from mipipe.graphs.costs.estimate_modes import estimated_profile, forward_alive
from mipipe.graphs.costs.team_share import TeamShare
from mipipe.graphs.costs.trace_facts import TraceFacts, trace_facts
from mipipe.graphs.modes import ModeProfile
from mipipe.graphs.operator_graph import Phase
from mipipe.planner.teams.prices.between_modes import with_estimates
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.pieces import ModelPieces, SegmentGroup
from mipipe.planner.teams.prices.resident import HeldLength, divided_length


class SegmentProfiles:
    """Profiles of a model's segments on teams of a machine's devices, kept between calls. ``origins`` counts where they
    came from."""

    def __init__(self, model: ModelPieces, machine: Machine) -> None:
        self.model, self.machine = model, machine
        self.origins: Counter[str] = Counter()
        self._profiles: dict[tuple[object, ...], ModeProfile] = {}
        self._fanouts: dict[str, float] = {}
        self._facts: dict[tuple[str, bool], TraceFacts] = {}
        self._held: dict[tuple[object, ...], int] = {}

    def division(self, members: Collection[int], degrees: Degrees) -> tuple[object, ...]:
        """How a team divides the work of these segments (by index): how experts are divided is a part of that only
        where they have some, or are divided within the team, or where profiles are traced for teams that divide
        none."""
        apart = degrees.expert > 1 and (self.model.graph.modes is not None or self.model.within(degrees)
                                        or not self.model.with_experts.isdisjoint(members))
        return (degrees.tensor, degrees.sequence, degrees.context, degrees.expert if apart else 1,
                degrees.batch_branches)

    def profile(self, member: int, degrees: Degrees) -> ModeProfile:
        """The profile of a segment on a team of these degrees."""
        trace, role = self.model.trace(member, degrees.recompute), self.model.graph.segments[member].tags.role
        again, (split, left) = degrees.recompute == "selective", self.model.split(member, degrees)
        plain = degrees.context == degrees.expert == 1 and split.tensor * split.batch > 1 and left == 1 and not again
        plain = plain and self.model.graph.modes is not None
        key = trace.digest, role, split, left, again, plain, self.model.within(degrees)
        if key in self._profiles:
            return self._profiles[key]
        fused, flash, cut = self.machine.kernels
        estimate = estimated_profile(trace, role, split, fused=fused, attention_again=again, flash=flash,
                                     cut=cut, facts=self.facts(member, degrees),
                                     shares=self.shares(member, degrees))
        modes = self.model.graph.modes
        found = modes.find(trace.digest, split.mode, degrees.tensor) if plain and modes is not None else None
        self.origins["traced" if found is not None else "estimated from shapes"] += 1
        if found is not None:
            estimate = with_estimates(found, estimate, self.machine.fused)
        self._profiles[key] = estimate
        return estimate

    def facts(self, member: int, degrees: Degrees) -> TraceFacts:
        """What estimates know of a segment's trace where layers run again as these degrees say."""
        trace, again = self.model.trace(member, degrees.recompute), degrees.recompute == "selective"
        key, (fused, _, cut) = (trace.digest, again), self.machine.kernels
        if key not in self._facts:
            self._facts[key] = trace_facts(trace, fused=fused, attention_again=again, cut=cut)
        return self._facts[key]

    def shares(self, member: int, degrees: Degrees) -> tuple[TeamShare, ...]:
        """What members of a team of these degrees have of a segment."""
        return self.model.shares(member, degrees)

    def lengths(self, member: int, degrees: Degrees) -> tuple[HeldLength, ...]:
        """What of a segment's parameters devices that hold the same divide along dimensions of certain lengths. Sums
        over the tensor axis of the gradients of norms and biases, a few bytes, are left out."""
        trace, profile = self.model.trace(member, degrees.recompute), self.profile(member, degrees)
        trains, batch = self.model.index.runs(member, Phase.W), self.model.mode(member, degrees) == "batch"
        banks, sent = self.facts(member, degrees).banks, self.model.sends(degrees)
        names = zip((*trace.parameters, *trace.buffers),
                    (*trace.parameter_grads, *(None for _ in trace.buffers)), profile.parts, strict=True)
        found: dict[tuple[int, bool], list[int]] = {}
        for name, grad, part in names:
            spec, experts = trace.specs[name], name in banks
            length = 0 if name in trace.buffers else divided_length(spec.shape, part, int(experts and sent))
            size = -(-spec.num_bytes // part.degree)
            trained = size if trains and grad is not None else 0
            sizes = found.setdefault((length, experts), [0, 0, 0])
            summed = batch if not experts else degrees.expert == 1 and "tensor" in part.sum_gradient
            for place, more in enumerate((size, trained, trained * summed)):
                sizes[place] += more
        return tuple(HeldLength(*key, *sizes) for key, sizes in found.items())

    def left_whole(self, degrees: Degrees, experts: bool) -> tuple[int, int]:
        """Bytes of parameters, dense or of experts, on a member of every rank together, and how many of them do not
        divide among the devices that hold the same."""
        held = [item for piece in self.model.pieces for member in piece.members
                for item in self.lengths(member, degrees) if item.length and item.experts is experts]
        alike = degrees.alike_experts if experts else degrees.alike
        return sum(item.held for item in held), sum(item.held for item in held if item.length % alike)

    def columns(self, member: int, degrees: Degrees) -> frozenset[str]:
        """The products of a segment that members of the tensor axis share by columns."""
        return frozenset(name for name, parameter in self.facts(member, degrees).products.items()
                         for share in self.shares(member, degrees)
                         if share.axis == "tensor" and parameter in share.dims and share.parts(name) > 1)

    def fanout(self, member: int) -> float:
        """Experts per token of a segment with banks of experts; 1 for others."""
        trace = self.model.index.traces[member]
        if trace.digest in self._fanouts:
            return self._fanouts[trace.digest]
        rows = [item.outputs[0].shape[0] for item in trace.phase_operators(Phase.F) if "grouped_mm" in item.kind]
        floats = [trace.specs[name].shape for name in trace.inputs if "float" in trace.specs[name].dtype]
        tokens = max((math.prod(shape[:-1]) for shape in floats if shape), default=0)
        self._fanouts[trace.digest] = max(1.0, rows[0] / tokens) if rows and tokens else 1.0
        return self._fanouts[trace.digest]

    def alive(self, piece: SegmentGroup, degrees: Degrees, again: bool) -> int:
        """Bytes that a piece's F has in memory at once, of a microbatch as captured, without what stays for the
        backward; ``again``: nothing does. Values between its segments are there until the last that reads them."""
        split = self.model.split(piece.members[0], degrees)[0]
        index, graph, place = self.model.index, self.model.graph, {at: n for n, at in enumerate(piece.members)}
        rows = split.samples_and_positions
        stays: list[frozenset[str]] = []
        kept: set[str] = set()
        for member in piece.members:
            acts = not again and (index.runs(member, Phase.I) or index.runs(member, Phase.W))
            stays.append(self.facts(member, degrees).stays if acts else frozenset())
            kept.update(value for name, value in zip(index.traces[member].inputs, graph.segments[member].inputs,
                                                     strict=True) if name in stays[-1])
        most = 0
        waiting: list[tuple[int, int]] = []
        for position, member in enumerate(piece.members):
            trace, segment = self.model.trace(member, degrees.recompute), graph.segments[member]
            waiting = [(last, size) for last, size in waiting if last >= position]
            elsewhere = stays[position] | {name for name, value in zip(trace.outputs, segment.outputs, strict=True)
                                           if value in kept}
            key = member, self.division((member,), degrees), degrees.recompute, again
            if key not in self._held:
                own_split = self.model.split(member, degrees)[0]
                self._held[key] = forward_alive(trace, segment.tags.role, own_split, self.facts(member, degrees),
                                                elsewhere, self.shares(member, degrees))
            most = max(most, self._held[key] + sum(size for _, size in waiting))
            parts = rows * (1 if self.model.gives_whole(member, degrees) else split.tensor)
            waiting += [(max((place.get(reader, len(place)) for reader in index.readers[value]), default=position),
                         -(-index.num_bytes[value] // parts)) for value in segment.outputs if value not in kept]
        return most
