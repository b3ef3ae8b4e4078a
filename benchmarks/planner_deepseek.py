"""DeepSeek-V3 at full size on 16 nodes of 8 H200: captured, coarsened and planned, with the gap.

    python benchmarks/planner_deepseek.py [--graph dsv3.json] [--seconds 150] [--json FILE]

671 B parameters in 61 layers, transformers' defaults, 4,096 tokens in a microbatch, 32 microbatches, bfloat16, 16 bytes
of state per parameter (weight, gradient, master copy, two moments). Captured on the meta device in about a minute
unless ``--graph`` gives the file of

    mipipe capture DeepseekV3ForCausalLM --seq 4096 --dtype bfloat16 -o dsv3.json

The cost model: a device is a node. Its 8 GPUs share every stage's work: roofline at 8 H200 times an efficiency of 0.5
(benchmarks/deepseek_v3/cluster.yaml). To that, per microbatch and over NVLink at 450 GB/s each way plus 10 us a call:

- attention, dense MLP, shared experts, head (tensor parallel with sequence-parallel norms): an all-gather and a
  reduce-scatter of the tokens' hidden states in F and in I, one all-gather again in W;
- routed experts (expert parallel, 32 experts a GPU): a dispatch and a combine in F and in I. A token goes to 8 experts,
  in copies of one for each other GPU it needs: 8 (1 - (7/8)^8) = 5.25 GPUs on average if routing is even, of which 7/8
  are others.

Compared: 1F1B, ZB-H1 and ZB-V with stages cut by time, at whatever memory they need. ``gap`` is makespan / bound - 1,
the bound over all placements within the memory; target: planned within 180 s in all, coarsening included.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role
from mipipe.graphs.serialize import load
from mipipe.planner.ladder.candidate import peak_activations
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import resident_bytes
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan

HERE = Path(__file__).parent / "deepseek_v3"
MICROBATCHES = 32
TOKENS, HIDDEN, EXPERTS_PER_TOKEN, GPUS = 4096, 7168, 8, 8
NVLINK = 450e9
CALL_NS = 10_000
"""Of a collective within a node: launch and synchronisation of 8 GPUs."""

TENSOR_PARALLEL = (Role.ATTENTION, Role.MLP, Role.SHARED_EXPERTS, Role.HEAD)
CALLS = {Phase.F: 2, Phase.I: 2, Phase.W: 1}
"""Collectives of a tensor-parallel module; routed experts have none in W, their inputs are there already."""


def collective_ns() -> tuple[int, int]:
    """(all-gather or reduce-scatter of all tokens, dispatch or combine) on one node, in nanoseconds."""
    share = TOKENS // GPUS * HIDDEN * 2
    gather = share * (GPUS - 1) / NVLINK
    reached = GPUS * (1 - (1 - 1 / GPUS) ** EXPERTS_PER_TOKEN)
    exchange = share * reached * (GPUS - 1) / GPUS / NVLINK
    return CALL_NS + round(1e9 * gather), CALL_NS + round(1e9 * exchange)


def with_collectives(costs: CostTable, coarse: CoarseGraph, graph: OperatorGraph) -> CostTable:
    """The costs with what the GPUs of a node say to each other."""
    gather, exchange = collective_ns()
    role_of = {segment.name: segment.tags.role for segment in graph.segments}
    roles = {group.name: [role_of[name] for name in group.segments] for group in coarse.groups}
    entries = []
    for entry in costs.entries:
        dense = sum(role in TENSOR_PARALLEL for role in roles[entry.group])
        routed = sum(role is Role.EXPERTS for role in roles[entry.group])
        entries.append(replace(entry, times_ns={
            phase: spent + dense * CALLS[phase] * gather + routed * (2 * exchange if phase is not Phase.W else 0)
            for phase, spent in entry.times_ns.items()}))
    return replace(costs, entries=tuple(entries))


def problem_of(graph: OperatorGraph, groups: int) -> PlanningProblem:
    """The planning problem of the coarsened graph."""
    cluster = load_cluster(HERE / "cluster.yaml")
    coarse = coarsen(graph, num_groups=groups)
    costs = with_collectives(roofline(coarse, graph, cluster.kinds), coarse, graph)
    return build_problem(coarse, costs, cluster.topology, num_microbatches=MICROBATCHES, optimizer="adamw_mixed")


def line(name: str, found: Plan, bound_ns: int | None = None, note: str = "") -> dict[str, object]:
    """One row: times in ms, sizes in GB of the device that has most."""
    assert found.makespan_ns is not None
    makespan, gap = found.makespan_ns / 1e6, None if bound_ns is None else found.makespan_ns / bound_ns - 1
    bound = None if bound_ns is None else bound_ns / 1e6
    weights = max(resident_bytes(found.problem, found.placement)) / 1e9
    activations = peak_activations(found) / 1e9
    print(f"{name:24} {makespan:9.1f} {'' if bound is None else f'{bound:.1f}':>8}"
          f" {'' if gap is None else f'{gap:.1%}':>6} {weights:8.0f} {activations:8.0f}  {note}", flush=True)
    return {"name": name, "makespan_ms": makespan, "bound_ms": bound, "gap": gap, "weights_gb": weights,
            "activations_gb": activations, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, help="the captured graph, if it is there already")
    parser.add_argument("--groups", type=int, default=128, help="groups of the coarsened graph")
    parser.add_argument("--seconds", type=float, default=150.0, help="time limit of the solve")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.graph is not None:
        graph = load(arguments.graph, OperatorGraph)
    else:
        from mipipe.graphs.capture.model import capture

        graph = capture("DeepseekV3ForCausalLM", seq=TOKENS, dtype="bfloat16")
    began = time.monotonic()
    problem = problem_of(graph, arguments.groups)
    print(f"{len(graph.segments)} segments in {len(problem.groups)} groups, {problem.num_ranks} devices,"
          f" {MICROBATCHES} microbatches; collectives of {collective_ns()[0] / 1e3:.0f} and"
          f" {collective_ns()[1] / 1e3:.0f} us")
    print(f"{'':24} {'ms':>9} {'bound':>8} {'gap':>6} {'weights':>8} {'activ.':>8}")
    found = []
    result = plan(problem, PlanOptions(time_limit_s=arguments.seconds, use_baselines=False))
    seconds = time.monotonic() - began
    if result.plan is None:
        raise SystemExit(f"no plan: {result.reason}")
    note = f"{result.plan.placement.name}, {result.rung}, {seconds:.0f} s with coarsening"
    found.append(line("mipipe", result.plan, result.bound_ns, note) | {"seconds": seconds, "met": seconds <= 180})
    for baseline in BASELINES:
        if baseline.name in ("1F1B", "ZB-H1", "ZB-V", "DualPipe", "DualPipeV"):
            try:
                found.append(line(baseline.name, baseline.plan(problem, cut="balanced"), result.bound_ns))
            except MipipeError as error:
                print(f"{baseline.name}: {error}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
