"""What a member's program costs: a `ModeProfile` from its operators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

from mipipe.graphs.modes import Collective, CollectiveKind, KeptBytes, ParameterPart, PhaseWork, Product, Resident
from mipipe.graphs.operator_graph import Operator, Phase, SegmentTrace

_COLLECTIVES = {"mipipe.all_reduce.default": CollectiveKind.ALL_REDUCE,
                "mipipe.all_gather.default": CollectiveKind.ALL_GATHER,
                "mipipe.reduce_scatter.default": CollectiveKind.REDUCE_SCATTER,
                "mipipe.exchange_parts.default": CollectiveKind.ALL_TO_ALL}


def phase_work(trace: SegmentTrace, phase: Phase) -> PhaseWork:
    """The work of one phase of a program (a member's, or a whole trace: then there are no collectives)."""
    flops = moved = kernels = 0
    collectives: Counter[tuple[CollectiveKind, str, int]] = Counter()
    products: Counter[tuple[str, int, int, int]] = Counter()
    for op in trace.phase_operators(phase):
        if op.kind in _COLLECTIVES:
            collectives[_collective(op)] += 1
            continue
        touched = op.bytes_read + op.bytes_written
        flops, moved, kernels = flops + op.flops, moved + touched, kernels + bool(touched or op.flops)
        if op.flops:
            products[op.kind.rpartition(".")[0], op.flops, touched, narrowest(op)] += 1
    return PhaseWork(flops, moved, kernels, trace.workspace_bytes.get(phase, 0),
                     tuple(Product(*key, count) for key, count in products.items()),
                     tuple(Collective(kind, axis, size, count) for (kind, axis, size), count in collectives.items()))


def _collective(op: Operator) -> tuple[CollectiveKind, str, int]:
    kind, size = _COLLECTIVES[op.kind], op.outputs[0].num_bytes
    return kind, str(op.args[-1]), size * op.args[-2] if kind is CollectiveKind.REDUCE_SCATTER else size


def narrowest(op: Operator) -> int:
    """The smallest of m, n and k of a product [..,m,n] over k, from its result and flops 2 m n k.

    Of attention: the head size; of other operators with flops, what the same formula gives.
    """
    shape = op.outputs[0].shape
    sizes = [length for length in shape[-2:] if length]
    inner = op.flops // max(1, 2 * math.prod(shape))
    return min((*sizes, inner)) if sizes and inner else 1


def all_work(trace: SegmentTrace) -> dict[Phase, PhaseWork]:
    """The work of every phase that a program has."""
    return {phase: phase_work(trace, phase) for phase in Phase if trace.has(phase)}


def kept_bytes(trace: SegmentTrace) -> KeptBytes:
    """What a program keeps between phases."""
    sums = {pair: sum(item.num_bytes for item in trace.saved if (item.source, item.last) == pair)
            for pair in ((Phase.F, Phase.I), (Phase.F, Phase.W), (Phase.I, Phase.W))}
    return KeptBytes(*sums.values())


def resident_bytes(member: SegmentTrace, parts: Sequence[ParameterPart], banks: Collection[str]) -> Resident:
    """Parameters and buffers of a member's program, whose specs are local."""
    sizes: Counter[str] = Counter()
    grads = dict(zip(member.parameters, member.parameter_grads, strict=True))
    for name, part in zip((*member.parameters, *member.buffers), parts, strict=True):
        size = member.specs[name].num_bytes
        kind = "experts" if name in banks else "dense"
        sizes[kind] += size
        if grads.get(name) is not None:
            sizes[f"trainable_{kind}"] += size
            sizes["summed"] += size if part.sum_gradient else 0
    return Resident(**sizes)
