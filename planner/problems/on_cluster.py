"""The problem of training a model on a cluster, and what else its figures rest on: the step before `mipipe.plan`.

Groups are chosen, costs estimated where none were measured, the optimizer's state follows from the parameters' dtype.
`ModelFacts` keeps what the problem itself no longer says (tokens, work, peaks, where costs come from), so that a plan
can be told in tokens per second. Work counts every product of forward and backward once, without recomputation, and of
causal attention the lower triangle only, as its estimated time does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from mipipe.graphs.cluster import Cluster
from mipipe.graphs.coarse.coarsen import GroupGranularity, coarsen
from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.coarse.totals import model_flops, num_sequences, num_tokens
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.errors import InputError
from mipipe.graphs.exchange import slowest_link
from mipipe.graphs.operator_graph import DTYPE_BYTES, OperatorGraph
from mipipe.graphs.serialize import STRICT
from mipipe.planner.device_memory import tensors_fit, with_memory
from mipipe.planner.experts.balance.maps import ExpertLoads
from mipipe.planner.problem import Limits, PlanningProblem
from mipipe.planner.problems.expert_loads import with_expert_loads
from mipipe.planner.problems.from_graph import STATE_BYTES, OptimizerName, build_problem, usual_optimizer

OptimizerChoice = OptimizerName | Literal["auto"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the figures of a plan for a model rest on, kept in its provenance as ``model``.

    ``tokens`` and ``samples`` are those of one step (None: the model has no token or batch dimension), ``flops`` its
    products. ``peak_flops`` is the sum over all devices at their vendors' peak for ``dtype`` (None: a kind without
    peaks), ``devices`` counts the chips. ``costs`` counts groups by the origin of their costs. ``state_bytes`` is the
    optimizer's state per byte of gradient.
    """

    __pydantic_config__: ClassVar = STRICT
    dtype: str
    tokens: float | None
    samples: float | None
    flops: float
    peak_flops: float | None
    devices: int
    costs: dict[str, int]
    optimizer: str
    state_bytes: float


def model_problem(model: OperatorGraph | CoarseGraph, cluster: Cluster, num_microbatches: int, *,
                  groups: int | None = None, granularity: str | None = None, costs: CostTable | None = None,
                  memory_bytes: int | None = None, activation_bytes: int | None = None,
                  optimizer: OptimizerChoice = "auto", recompute: bool = False,
                  expert_loads: ExpertLoads | None = None, sizes: Mapping[str, Sequence[float]] | None = None,
                  where: str = "cluster") -> tuple[PlanningProblem, ModelFacts]:
    """The planning problem of a model on a cluster, with its facts.

    Args:
        model: an operator graph; a coarse graph needs ``costs``.
        groups, granularity: as for `coarsen`; neither: as ``costs`` were made, or chosen by the size of the model.
        costs: measured costs; None: roofline estimates of the cluster's device kinds.
        memory_bytes: of every device in place of the cluster's; of a GPU's the allocator has its share
            (`mipipe.planner.device_memory`).
        activation_bytes: a limit on every device's activations.
        optimizer: ``auto`` is ``adamw_mixed`` where most trainable bytes are of a 16-bit dtype, else ``adamw``.
        recompute: offer every group to run its forward twice.
        expert_loads: expert groups take time by their tokens.
        sizes: relative sizes of the microbatches, by modality branch or group.
        where: what an error calls the cluster.

    Raises:
        InputError: costs are missing and cannot be estimated.
        ProblemError: the costs are another graph's, or an option names what is not there.
    """
    if isinstance(model, CoarseGraph):
        if costs is None:
            raise InputError(f"{model.model}: a coarse graph needs costs; estimates are made from an operator graph")
        coarse, table = model, costs
    else:
        coarse = coarse_for(model, costs, groups, granularity)
        table = costs or estimated_costs(coarse, model, cluster, where)
    if expert_loads is not None:
        table = with_expert_loads(table, coarse, expert_loads)
    kept = default_optimizer(model) if optimizer == "auto" else optimizer
    problem = build_problem(coarse, table, with_memory(tensors_fit(cluster), memory_bytes),
                            num_microbatches=num_microbatches, optimizer=kept, recompute=recompute, loads=sizes,
                            limits=Limits(activation_bytes=activation_bytes))
    return problem, _facts(model, coarse, table, cluster, problem, kept)


def coarse_for(graph: OperatorGraph, table: CostTable | None, groups: int | None = None,
               granularity: str | None = None) -> CoarseGraph:
    """The graph in groups: as asked, or as the cost table was made."""
    if groups is None and granularity is None and table is not None:
        noted = table.notes.get("groups")
        groups = int(noted) if noted else None
        granularity = table.notes.get("granularity")
    return coarsen(graph, num_groups=groups, granularity=cast("GroupGranularity | None", granularity))


def estimated_costs(coarse: CoarseGraph, graph: OperatorGraph, cluster: Cluster, where: str = "cluster") -> CostTable:
    """Roofline costs on the kinds of the cluster's devices.

    Raises:
        InputError: a kind has no peak rates.
    """
    kinds = {device.kind: cluster.kinds[device.kind] for device in cluster.topology.devices}
    unknown = sorted(name for name, kind in kinds.items() if not kind.has_peaks)
    if unknown:
        raise InputError(f"{where}: device kind {unknown[0]!r} has no peak rates to estimate costs from; run"
                         " `mipipe profile` on it and give its file as --costs")
    return roofline(coarse, graph, kinds, link=slowest_link(cluster.topology))


def default_optimizer(model: OperatorGraph | CoarseGraph) -> OptimizerName:
    """``adamw_mixed`` for a model whose trainable parameters are mostly of a 16-bit dtype, else ``adamw``."""
    return usual_optimizer(_dtype(model))


def _dtype(model: OperatorGraph | CoarseGraph) -> str:
    """The dtype of most bytes of trainable parameters (of two, the wider); a coarse graph does not say."""
    sizes: Counter[str] = Counter()
    if isinstance(model, OperatorGraph):
        for parameter in model.parameters:
            if parameter.trainable and parameter.tied_to is None:
                sizes[parameter.spec.dtype] += parameter.spec.num_bytes
    return max(sizes, key=lambda dtype: (sizes[dtype], DTYPE_BYTES[dtype]), default="float32")


def graph_dtype(model: OperatorGraph) -> str:
    """The dtype of most bytes of a graph's trainable parameters."""
    return _dtype(model)


def _work(model: OperatorGraph | CoarseGraph, coarse: CoarseGraph) -> list[float]:
    """The products of each group for one microbatch; a coarse graph no longer knows which attention is causal."""
    if isinstance(model, CoarseGraph):
        return [float(sum(group.flops.values())) for group in coarse.groups]
    index = index_graph(model)
    number_of = {segment.name: number for number, segment in enumerate(model.segments)}
    return [float(sum(model_flops(index, number_of[member]) for member in group.segments)) for group in coarse.groups]


def _facts(model: OperatorGraph | CoarseGraph, coarse: CoarseGraph, table: CostTable, cluster: Cluster,
           problem: PlanningProblem, optimizer: str) -> ModelFacts:
    dtype, count = _dtype(model), problem.num_microbatches
    flops = sum(work * (sum(planned.loads) if planned.loads else count)
                for work, planned in zip(_work(model, coarse), problem.groups, strict=True))
    kinds = [cluster.kinds[device.kind] for device in problem.topology.devices]
    peaks: list[float] = [kind.flops[dtype] / kind.efficiency for kind in kinds if dtype in kind.flops]
    origins = Counter(entry.origin for entry in table.entries if entry.device_kind in {kind.name for kind in kinds})
    tokens = None if isinstance(model, CoarseGraph) else num_tokens(model)
    samples = None if isinstance(model, CoarseGraph) or not any(
        value.spec.shape for value in model.values if value.name in model.inputs) else num_sequences(model)
    return ModelFacts(dtype, None if tokens is None else tokens * count, None if samples is None else samples * count,
                      float(flops), sum(peaks) if len(peaks) == len(kinds) else None,
                      sum(kind.count for kind in kinds), {str(name): number for name, number in origins.items()},
                      optimizer, STATE_BYTES[optimizer])
