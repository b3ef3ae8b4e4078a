"""Profiles of a mode from the shapes of a trace, where none was traced: an estimate, and told as one.

Which products and values the members of a tensor axis share, and what they send, is found out as their programs are
made (`TeamShare`); what it takes is divided by the degrees that divide it. The other collectives are
`mipipe.graphs.costs.mode_collectives`'.

Attention is one kernel that keeps its scores on the chip, or, as before such kernels (``flash`` False), products in
batches with kernels for scale, mask, softmax and dropout between them, whose scores go through memory and stay for the
backward (`SCORES_FORWARD`, `SCORES_BACKWARD`, `SCORES_KEPT`; 16-bit scores, Korthikanti et al., section 4).

Left out: what a member holds twice at boundaries that do not divide.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mipipe.graphs.coarse.totals import operator_flops
from mipipe.graphs.costs.forward_lives import most_alive
from mipipe.graphs.costs.mode_collectives import ModeCollectives
from mipipe.graphs.costs.products import ATTENTION
from mipipe.graphs.costs.team_share import TeamShare
from mipipe.graphs.costs.trace_facts import TeamSplit, TraceFacts, trace_facts
from mipipe.graphs.modes import (
    Collective,
    KeptBytes,
    Layout,
    ModeProfile,
    ParameterPart,
    PhaseWork,
    Product,
    Resident,
)
from mipipe.graphs.operator_graph import DTYPE_BYTES, Operator, Phase, Role, SegmentTrace

SCORES_FORWARD = 13
"""Bytes moved of a score of unfused attention in the forward: written, softmax and dropout read and write it, the mask
of a byte, the product with the values reads it."""
SCORES_BACKWARD = 19
"""And in the backward: read for the values' gradient, its gradient written, dropout's and softmax's backward, read for
the gradients of queries and keys."""
SCORES_KEPT = 5
"""Bytes kept of it: softmax's result, dropout's mask and result."""


@dataclass(slots=True)
class _Work:
    products: list[Product] = field(default_factory=list)
    moved: float = 0.0
    kernels: int = 0


def estimated_profile(trace: SegmentTrace, role: Role, split: TeamSplit, *, fused: bool = True,
                      attention_again: bool = False, flash: bool = True, cut: bool | None = None,
                      facts: TraceFacts | None = None, shares: Sequence[TeamShare] = ()) -> ModeProfile:
    """What one member of a team computes, sends and keeps of a segment, by its shapes.

    Args:
        trace: of the segment, of one microbatch as captured.
        role: of the segment.
        split: the team's degrees.
        fused: elementwise operators run as fused kernels keep and move; else as the trace's eager operators.
        attention_again: attention runs again in the backward, and its results are not kept.
        flash: attention is one kernel.
        cut: what stays for the backward is chosen as compilers do, else it is what autograd saves; None: as ``fused``.
        facts: of the trace, where they are known already.
        shares: what members along the tensor and the context axis have of it, of those that are known: else positions
            are divided over the context axis, and over the tensor axis what `TeamSplit.sequence` divides, and experts.
    """
    cut = fused if cut is None else cut
    known = facts or trace_facts(trace, fused=fused, attention_again=attention_again, cut=cut)
    estimate = _Estimate(trace, role, split, known, shares, flash, attention_again)
    work = {phase: _Work() for phase in Phase if trace.has(phase)}
    estimate.compute(work, fused, attention_again)
    talk = ModeCollectives(trace, known, split, shares).by_phase(work)
    axes = {name: size for name, size in (("expert", split.expert), ("context", split.context),
                                          ("tensor", split.tensor), ("batch", split.batch)) if size > 1}
    layout = Layout.SEQUENCE if split.context > 1 or (split.sequence and split.tensor > 1) else \
        Layout.BATCH if split.batch > 1 else Layout.REPLICATED
    return ModeProfile(trace.digest, split.mode, axes, (layout,) * len(trace.inputs), (layout,) * len(trace.outputs),
                       estimate.parts(), estimate.resident(), estimate.kept(cut),
                       {phase: estimate.phase_work(phase, made, talk[phase], fused) for phase, made in work.items()})


def forward_alive(trace: SegmentTrace, role: Role, split: TeamSplit, facts: TraceFacts,
                  elsewhere: Collection[str] = (), shares: Sequence[TeamShare] = ()) -> int:
    """The most bytes of values of F at once on one member, without those that are counted ``elsewhere`` (by name)."""
    estimate = _Estimate(trace, role, split, facts, shares)
    return math.ceil(most_alive([life for life in facts.lives if life.name not in elsewhere], estimate.parts_of))


@dataclass(slots=True)
class _Estimate:
    trace: SegmentTrace
    role: Role
    split: TeamSplit
    facts: TraceFacts
    shares: Sequence[TeamShare]
    flash: bool = True
    again: bool = False

    @property
    def rows(self) -> int:
        """Into how many parts rows are divided by what no share says."""
        known = {share.axis for share in self.shares}
        apart = "tensor" not in known and (self.split.sequence or self.role is Role.EXPERTS)
        return (self.split.batch * (1 if "context" in known else self.split.context)
                * (self.split.tensor if apart else 1))

    def parts_of(self, name: str) -> int:
        """Into how many parts an activation is divided."""
        return self.rows * math.prod(share.parts(name) for share in self.shares)

    def runs(self, operator: Operator) -> int:
        """Into how many parts an operator with flops is divided."""
        return self.rows * math.prod(share.runs(operator.name) for share in self.shares)

    def degree(self, parameter: str) -> int:
        """Into how many parts a parameter is divided."""
        found = math.prod(share.size for share in self.shares if parameter in share.dims)
        if found > 1 or parameter not in self.facts.banks:
            return found
        return math.gcd(self.split.expert, self.trace.specs[parameter].shape[0])

    def compute(self, work: dict[Phase, _Work], fused: bool, attention_again: bool) -> None:
        """Products, bytes and kernels of every phase."""
        for kernel in self.facts.kernels:
            made = work.get(kernel.phase)
            if made is None:
                continue
            made.kernels += 1
            if kernel.operator is not None and kernel.operator.flops:
                self._product(kernel.operator, made)
            else:
                made.moved += sum(size / self.parts_of(name) for name, size in kernel.tensors.items())
        for operator in self.trace.operators if not fused else ():
            if operator.phase not in work or not (operator.flops or operator.bytes_read or operator.bytes_written):
                continue
            made = work[operator.phase]
            made.kernels += 1
            if operator.flops:
                self._product(operator, made)
            else:
                made.moved += (operator.bytes_read + operator.bytes_written) / self.parts_of(operator.name)
        if attention_again and Phase.I in work:
            for operator in self.trace.phase_operators(Phase.F):
                if operator.kind.startswith(f"{ATTENTION}.") and operator.flops:
                    work[Phase.I].kernels += 1
                    self._product(operator, work[Phase.I])

    def _product(self, operator: Operator, made: _Work) -> None:
        """The member's part of an operator with flops."""
        kind, moved = operator.kind.rpartition(".")[0], operator.bytes_read + operator.bytes_written
        parameter = self.facts.products.get(operator.name)
        if parameter is not None and min((0, 0, *self.trace.specs[parameter].shape)[-2:]) < 2:
            parameter = None  # a vector, or the taps of a convolution of each channel: no matrix
        flops = operator_flops(self.trace, operator)
        if parameter is None and kind.startswith(ATTENTION) and not self.flash:
            return self._scores(operator, made)
        if parameter is None:
            parts = self.runs(operator)
            narrow = max(1, math.prod(operator.outputs[0].shape[2:3]) // self.split.context)
            item = Product(kind, -(-flops // parts), -(-moved // parts), narrow)
        else:
            item = self._matrix(operator, kind, parameter, flops)
        made.products.append(item)
        made.moved += item.bytes_moved

    def _scores(self, operator: Operator, made: _Work) -> None:
        """Attention whose scores go through memory: products of the whole square, and kernels between them."""
        backward = not operator.kind.startswith(f"{ATTENTION}.")
        parts, width = self.runs(operator), operator.outputs[0].shape[-1]
        made.products.append(item := Product("aten.bmm", -(-operator.flops // parts),
                                             -(-(operator.bytes_read + operator.bytes_written) // parts), width))
        scores = operator.flops / ((10 if backward else 4) * width)
        made.moved += item.bytes_moved + scores * (SCORES_BACKWARD if backward else SCORES_FORWARD) / parts
        made.kernels += 4

    def _matrix(self, operator: Operator, kind: str, parameter: str, flops: int) -> Product:
        """A product of rows with a parameter, or of two sets of rows to its gradient."""
        shape = self.trace.specs[parameter].shape
        sizes = [flops // max(1, 2 * shape[-2] * math.prod(shape[-1:])), shape[-2], math.prod(shape[-1:])]
        by_columns = False
        for share in self.shares:
            along = share.dims.get(parameter, 0) - len(shape) + 3 if parameter in share.dims else 0
            by_columns = by_columns or along > 0
            sent = parameter in self.facts.banks and self.split.expert > 1 and share.axis == "tensor"  # tokens are
            parts = share.size if sent else share.runs(operator.name)
            sizes[max(0, along)] = -(-sizes[max(0, along)] // parts)
        sizes[0] = max(1, -(-sizes[0] // self.rows))
        rows, wide, deep = sizes
        size = DTYPE_BYTES[operator.outputs[0].dtype]
        if parameter not in self.facts.banks:
            return Product(kind, 2 * rows * wide * deep, size * (rows * (wide + deep) + wide * deep),
                           min(rows, wide, deep))
        banks = shape[0] / (1 if by_columns else self.degree(parameter))
        return Product(kind, 2 * rows * wide * deep, round(size * (rows * (wide + deep) + banks * wide * deep)),
                       max(1, min(wide, deep, round(rows / banks))))

    def phase_work(self, phase: Phase, made: _Work, talk: list[Collective], fused: bool) -> PhaseWork:
        """A phase's work. Its workspace is the eager operators', divided where parameters are, or the largest value
        made; that of fused kernels stays on the chip, but for losses."""
        results = {*self.trace.outputs, *self.trace.input_grads, *self.trace.parameter_grads}
        most = max(((spec.num_bytes, item.name) for item in self.trace.phase_operators(phase)
                    for spec in item.outputs[:1] if item.name not in results), default=(0, ""))[1]
        parts = self.rows * math.prod(share.size for share in self.shares if share.dims or share.parts(most) > 1)
        alive = -(-self.trace.workspace_bytes.get(phase, 0) // parts) if self.role is Role.HEAD or not fused else 0
        return PhaseWork(sum(item.flops * item.count for item in made.products), round(made.moved), made.kernels,
                         alive, tuple(made.products), tuple(talk))

    def parts(self) -> tuple[ParameterPart, ...]:
        found = []
        for name in (*self.trace.parameters, *self.trace.buffers):
            degree, axis, dim = self.degree(name), "expert", 0
            for share in self.shares:
                axis, dim = (share.axis, share.dims[name]) if name in share.dims else (axis, dim)
            summed = tuple(share.axis for share in self.shares if name in share.sums)
            found.append(ParameterPart(sum_gradient=summed) if degree == 1 else ParameterPart(
                degree, dim, axis, sum_gradient=summed))
        return tuple(found)

    def resident(self) -> Resident:
        sizes = {"dense": 0, "experts": 0, "trainable_dense": 0, "trainable_experts": 0, "summed": 0}
        sums = frozenset[str]().union(*(share.sums for share in self.shares))
        for name, grad in zip(self.trace.parameters, self.trace.parameter_grads, strict=True):
            size = -(-self.trace.specs[name].num_bytes // self.degree(name))
            kind = "experts" if name in self.facts.banks else "dense"
            sizes[kind] += size
            if grad is not None:
                sizes[f"trainable_{kind}"] += size
                sizes["summed"] += size if name in sums or self.split.batch > 1 else 0
        sizes["dense"] += sum(-(-self.trace.specs[name].num_bytes // self.degree(name)) for name in self.trace.buffers)
        return Resident(**sizes)

    def kept(self, cut: bool) -> KeptBytes:
        sizes = {"fi": 0.0, "fw": 0.0, "iw": 0.0}
        if cut:
            for item in self.facts.kept:
                place = "iw" if item.name in self.facts.late else "fw" if item.last is Phase.W else "fi"
                sizes[place] += item.num_bytes / self.parts_of(item.name)
        else:
            for saved in self.trace.saved:
                place = saved.source.value.lower() + saved.last.value.lower()
                sizes[place] += saved.num_bytes / self.parts_of(saved.name)
        for operator in self.trace.phase_operators(Phase.F) if not self.flash and not self.again else ():
            if operator.kind.startswith(f"{ATTENTION}.") and self.trace.has(Phase.I):
                scores = operator.flops / (4 * operator.outputs[0].shape[-1])
                sizes["fi"] += SCORES_KEPT * scores / self.runs(operator)
        return KeptBytes(*(math.ceil(sizes[name]) for name in ("fi", "fw", "iw")))
