"""A model as a chain of pieces: what comes before the first layer, the layers, what comes after the last.

Equal layers are one *kind* of piece, priced once. A piece is what the master places; it is never cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mipipe.graphs.coarse.graph_index import GraphIndex, index_graph
from mipipe.graphs.coarse.totals import model_flops, num_sequences, num_tokens
from mipipe.graphs.costs.latents import with_latents_again
from mipipe.graphs.costs.products import banks_of, products_of
from mipipe.graphs.costs.team_share import TeamShare
from mipipe.graphs.costs.trace_facts import TeamSplit, heads_of
from mipipe.graphs.exchange import exchanges
from mipipe.graphs.modes import Layout
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role, SegmentTrace
from mipipe.planner.teams.prices.branches import check_modes, encoders_of, together
from mipipe.planner.teams.prices.degrees import RECOMPUTE, Degrees, Recompute

if TYPE_CHECKING:
    from mipipe.graphs.sharding.shares import TeamShares


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments (by index) that stay together; ``kind`` numbers its structure, ``layer`` is its number or None."""

    kind: int
    members: tuple[int, ...]
    layer: int | None
    name: str


@dataclass(frozen=True)
class ModelPieces:
    """A graph in pieces, in topological order. ``kinds[k]`` is the first piece of kind k.

    ``sequences`` are those of a microbatch as captured, ``tokens`` of one sequence (None: the model has no tokens).
    ``modes``: along the tensor axis, of the branches that have their own; None: those that degrees say, which a search
    chooses.
    """

    graph: OperatorGraph
    index: GraphIndex
    pieces: tuple[SegmentGroup, ...]
    kinds: tuple[SegmentGroup, ...]
    sequences: int
    tokens: int | None
    modes: Mapping[str, str] | None = None

    def own_modes(self, degrees: Degrees) -> dict[str, str]:
        """The modes of branches that are not that of all others, where a team has a tensor axis for them."""
        modes, usual = {**(self.modes or {}), **dict.fromkeys(degrees.batch_branches, "batch")}, degrees.split.mode
        return {branch: mode for branch, mode in modes.items() if degrees.tensor > 1 and mode != usual}

    def mode(self, member: int, degrees: Degrees) -> str:
        """The mode of a segment (by index) along the tensor axis."""
        branch = self.graph.segments[member].tags.branch or ""
        own = "batch" if branch in degrees.batch_branches else (self.modes or {}).get(branch)
        return own if own and degrees.tensor > 1 else degrees.split.mode

    def split(self, member: int, degrees: Degrees) -> tuple[TeamSplit, float]:
        """How a team divides the microbatch of a segment (by index) as captured, and the share of it that is left to
        divide: in ``batch`` mode members have whole samples, of which the captured microbatch may have too few. The
        division of experts is told of segments that have some to which tokens are sent."""
        mode, sent = self.mode(member, degrees), member in self.with_experts and self.sends(degrees)
        expert = degrees.expert if sent else 1
        if mode != "batch":
            return TeamSplit(degrees.tensor, degrees.context, expert, mode == "sequence"), 1.0
        members = math.gcd(degrees.tensor, self.sequences)
        return TeamSplit(1, degrees.context, expert, batch=members), members / degrees.tensor

    @cached_property
    def has_experts(self) -> bool:
        """Whether any segment has banks of experts."""
        return any(segment.tags.role is Role.EXPERTS for segment in self.graph.segments)

    @cached_property
    def with_experts(self) -> frozenset[int]:
        """The segments (by index) that experts are divided in: all others are the same however they are."""
        banked = {trace.digest for trace in self.index.traces if any("grouped_mm" in op.kind for op in trace.operators)}
        return frozenset(number for number, segment in enumerate(self.graph.segments)
                         if segment.tags.role is Role.EXPERTS or segment.trace in banked)

    @cached_property
    def exchanges(self) -> bool:
        """Whether tokens travel to their experts."""
        return exchanges(self.graph)

    def within(self, degrees: Degrees) -> bool:
        """Whether the tensor axis divides the experts of a graph captured without sending: members add up what their
        experts make of all tokens."""
        return degrees.expert > 1 and not self.exchanges and (degrees.tensor, degrees.context) == (degrees.expert, 1)

    def sends(self, degrees: Degrees) -> bool:
        """Whether tokens travel to the experts that devices share (divisions of a graph captured without sending that
        are not `within` a team are priced as of one captured with)."""
        return degrees.expert > 1 and not self.within(degrees)

    def shares(self, member: int, degrees: Degrees) -> tuple[TeamShare, ...]:
        """What members along the context and the tensor axis have of a segment (by index), as a run of the plan divides
        it; none where tokens are sent to the segment's experts by devices that share all else."""
        mode, trace = self.mode(member, degrees), self.index.traces[member]
        apart = self.sends(degrees) and not self.exchanges
        if apart and self.graph.segments[member].tags.role is Role.EXPERTS:
            return ()
        axes = [("context", degrees.context), *([(mode, degrees.tensor)] if mode != "batch" else [])]
        apart, within = apart and member in self.with_experts, self.within(degrees)
        return tuple(self._shares.of(trace, name, size, apart, within) for name, size in axes if size > 1)

    @cached_property
    def _shares(self) -> TeamShares:
        from mipipe.graphs.sharding.shares import TeamShares  # torch

        return TeamShares(self.graph)

    def parts_between(self, member: int, degrees: Degrees) -> int:
        """Into how many parts a team divides what a segment (by index) gives to others."""
        return degrees.context * (1 if self.gives_whole(member, degrees) else degrees.tensor)

    def gives_whole(self, member: int, degrees: Degrees) -> bool:
        """Whether every member along the tensor axis has all that a segment (by index) gives to others."""
        added = self.graph.segments[member].tags.role is Role.EXPERTS and self.within(degrees)
        return added or self.mode(member, degrees) == "tensor"

    def layout(self, name: str, member: int, degrees: Degrees) -> Layout:
        """How a value lies along the tensor axis between segments in the mode of this one (by index)."""
        mode, shape = self.mode(member, degrees), self.shapes[name]
        if mode == "batch":
            return Layout.BATCH
        length = shape[1] if len(shape) == 3 else shape[0] // self.sequences if shape else 1
        return Layout.SEQUENCE if mode == "sequence" and length % degrees.tensor == 0 else Layout.REPLICATED

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every value."""
        return {value.name: value.spec.shape for value in self.graph.values}

    @property
    def layers(self) -> list[int]:
        """The indices of pieces that are layers."""
        return [number for number, piece in enumerate(self.pieces) if piece.layer is not None]

    @cached_property
    def readers(self) -> tuple[tuple[frozenset[int], frozenset[int]], ...]:
        """Of every piece, those that read what it makes, and those of them that give it a gradient."""
        piece_of = {member: number for number, piece in enumerate(self.pieces) for member in piece.members}
        found: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in self.pieces]
        for value in self.graph.values:
            source = self.index.source[value.name]
            if source < 0:
                continue
            home = piece_of[source]
            others = {piece_of[reader] for reader in self.index.readers[value.name]} - {home}
            found[home][0].update(others)
            if value.name in self.index.returns_grad:
                found[home][1].update(others)
        return tuple((frozenset(readers), frozenset(graded)) for readers, graded in found)

    @cached_property
    def heads_and_banks(self) -> Mapping[str, tuple[tuple[int, int] | None, frozenset[int]]]:
        """By the trace: `heads_of` it, and how many experts its banks have."""
        return {trace.digest: (heads_of(trace), frozenset(
            trace.specs[name].shape[0] for name in banks_of(trace, products_of(trace)))) for trace in self.graph.traces}

    @cached_property
    def tied(self) -> Mapping[str, tuple[int, ...]]:
        """The parameters that several segments (by index) read, by the first of their names."""
        reads: dict[str, dict[int, None]] = {}
        for member, segment in enumerate(self.graph.segments):
            for name in segment.parameters:
                spec = self.index.parameters[name]
                if not spec.buffer:
                    reads.setdefault(spec.tied_to or name, {})[member] = None
        return {name: tuple(members) for name, members in reads.items() if len(members) > 1}

    @cached_property
    def latents(self) -> Mapping[int, SegmentTrace]:
        """The segments (by index) that make queries, keys and values of latents, with the traces that make them again
        in the backward."""
        traces = {trace.digest: trace for trace in self.index.traces}
        again = {key: with_latents_again(trace) for key, trace in traces.items()}
        return {member: again[trace.digest] for member, trace in enumerate(self.index.traces)
                if again[trace.digest] is not trace and self.graph.segments[member].tags.layer is not None}

    @cached_property
    def recompute(self) -> tuple[Recompute, ...]:
        """The ways to run something again that there are for this model, none among them."""
        return tuple(way for way in RECOMPUTE if way != "latents" or self.latents)

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        """The branches that a search may give the mode ``batch``: encoders of which members can have samples each; none
        where ``modes`` are given."""
        found = encoders_of(self.graph, self.index) if self.modes is None else ()
        return tuple(branch for branch in found if together(self.graph, (branch,)) is None)

    def trace(self, member: int, recompute: Recompute) -> SegmentTrace:
        """The trace of a segment (by index) where layers run again in a way."""
        own = self.index.traces[member]
        return self.latents.get(member, own) if recompute == "latents" else own

    def flops(self, full: bool = False) -> float:
        """The model's flops of one sequence, as papers count them (`mipipe.graphs.coarse.totals`); ``full``: with all
        of attention's pairs, as Megatron-LM counts them."""
        return sum(len(copies) * model_flops(self.index, copies[0], full) for copies in self._alike()) / self.sequences

    def _alike(self) -> list[list[int]]:
        """Segments of equal trace and phases."""
        found: dict[tuple[object, ...], list[int]] = {}
        for number, segment in enumerate(self.graph.segments):
            found.setdefault((segment.trace, *(self.index.runs(number, phase) for phase in Phase)), []).append(number)
        return list(found.values())

    def parameters(self) -> int:
        """Trainable and frozen parameters, tied ones once."""
        return sum(math.prod(item.spec.shape) for item in self.graph.parameters
                   if item.tied_to is None and not item.buffer)


def model_pieces(graph: OperatorGraph, modes: Mapping[str, str] | None = None) -> ModelPieces:
    """The pieces of a graph captured at the granularity of blocks or layers, whose branches have these ``modes`` (None:
    as degrees say, which a search chooses).

    Raises:
        InputError: a branch in ``batch`` mode looks at several samples at once.
    """
    check_modes(graph, modes or {})
    index = index_graph(graph)
    apart = {branch: branch for branch in encoders_of(graph, index)} | dict(modes or {})

    def mode(member: int) -> str | None:  # that may differ from others'
        return apart.get(graph.segments[member].tags.branch or "") if member >= 0 else None

    runs: list[tuple[Any, list[int]]] = []
    for number, segment in enumerate(graph.segments):
        key = (segment.tags.branch, segment.tags.layer)
        if runs and runs[-1][0] == key:
            runs[-1][1].append(number)
        else:
            runs.append((key, [number]))
    kinds: dict[Any, int] = {}
    pieces: list[SegmentGroup] = []
    first: list[SegmentGroup] = []
    for (branch, layer), members in runs:
        signature = tuple((graph.segments[at].trace, graph.segments[at].tags.role, *(index.runs(at, phase)
                           for phase in Phase), mode(at), *(mode(index.source[name])
                           for name in graph.segments[at].inputs)) for at in members)
        kind = kinds.setdefault(signature, len(kinds))
        name = graph.segments[members[0]].name if layer is None else f"{branch + ' ' if branch else ''}layer {layer}"
        pieces.append(SegmentGroup(kind, tuple(members), layer, name))
        if kind == len(first):
            first.append(pieces[-1])
    sequences, tokens = num_sequences(graph), num_tokens(graph)
    return ModelPieces(graph, index, tuple(pieces), tuple(first), sequences,
                       None if tokens is None else tokens // sequences, None if modes is None else dict(modes))
