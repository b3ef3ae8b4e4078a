"""Profiles of segments as a plan has them: what the estimate knows better, and what passes between modes.

In F a value of a branch in another mode is gathered where it is divided, or sent where it is divided otherwise than the
reader has it; in I its gradient goes back as the value lies. Where all that the reader makes of it goes through
products by columns, gathering it is theirs in ``sequence`` mode, and of their sum of its gradient each member keeps its
part. Left out: what a program changes more than once, as where attention and a residual read the value.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from mipipe.graphs.costs.products import ATTENTION, only_through
from mipipe.graphs.modes import Collective, CollectiveKind, Layout, ModeProfile, PhaseWork
from mipipe.graphs.operator_graph import Phase
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import ModelPieces


def resharded(model: ModelPieces, member: int, profile: ModeProfile, columns: Collection[str],
              degrees: Degrees) -> tuple[dict[Phase, PhaseWork], dict[Phase, list[Collective]]]:
    """The phases of a segment (by index) that reads values of branches in other modes, and the collectives along the
    tensor axis that these add: of a microbatch as captured, with the samples of all members. ``columns``: its products
    that members share by columns."""
    phases = dict(profile.phases)
    moved: dict[Phase, list[Collective]] = {phase: [] for phase in phases}
    trace, mode = model.index.traces[member], model.mode(member, degrees)
    for name, value in zip(trace.inputs, model.graph.segments[member].inputs, strict=True):
        source = model.index.source[value]
        if source < 0 or model.mode(source, degrees) == mode:
            continue
        given, wanted = (model.layout(value, at, degrees) for at in (source, member))
        through = mode != "batch" and only_through(trace, columns, name)
        both = Layout.REPLICATED not in (given, wanted)
        if given is wanted or (both and through):
            continue
        size = -(-model.index.num_bytes[value] // degrees.context)
        change = Collective(CollectiveKind.ALL_TO_ALL, "tensor", -(-size // degrees.tensor)) if both else \
            Collective(CollectiveKind.ALL_GATHER, "tensor", size)
        if given is not Layout.REPLICATED:
            moved[Phase.F].append(change)
        if value not in model.index.returns_grad or Phase.I not in phases:
            continue
        if wanted is not Layout.REPLICATED:
            moved[Phase.I].append(change)
        elif through:
            phases[Phase.I] = replace(phases[Phase.I], collectives=_scattered(phases[Phase.I].collectives))
    return phases, moved


def _scattered(collectives: Sequence[Collective]) -> tuple[Collective, ...]:
    """Collectives whose sums over the tensor axis leave a part on each member."""
    return tuple(replace(item, kind=CollectiveKind.REDUCE_SCATTER) if item.kind is CollectiveKind.ALL_REDUCE
                 and item.axis == "tensor" else item for item in collectives)


def with_estimates(traced: ModeProfile, estimate: ModeProfile, fused: bool) -> ModeProfile:
    """A traced profile with what the estimate knows better: attention under a causal mask at half its products, and,
    where kernels are fused, elementwise bytes, kernels and kept tensors."""
    phases = {}
    for phase, work in traced.phases.items():
        other = estimate.phases.get(phase, work)
        products = (*(item for item in work.products if not item.kind.startswith(ATTENTION)),
                    *(item for item in other.products if item.kind.startswith(ATTENTION)))
        rest = other if fused else work
        apart = rest.bytes_moved - sum(item.bytes_moved * item.count for item in rest.products)
        phases[phase] = replace(work, products=products, kernels=rest.kernels, bytes_moved=max(0, apart) + sum(
            item.bytes_moved * item.count for item in products))
    return replace(traced, phases=phases, kept=estimate.kept if fused else traced.kept)
