"""What coarsening costs: the planned makespan on 8 devices as a function of the number of groups.

    python benchmarks/coarsening.py [--layers 48] [--groups 8 12 16 24 33 50 98 194] [--seconds 20] [--json FILE]

The model is Qwen3-30B-A3B (transformers' Qwen3MoeForCausalLM at full size, captured on the meta device, 4,096 tokens in
bfloat16), the cluster 8 H200 with roofline costs, 32 microbatches, AdamW with float32 master weights. Every row is
solved for the same time. ``even`` cuts the same segments into as many runs of equal length instead: what merging
without looking at costs would give. ``ideal`` is all work spread evenly over the devices.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.cluster import read_cluster
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.contract import contract
from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.solve import plan

CLUSTER = {"format": "mipipe.cluster", "version": 1, "hosts": [{"name": "node", "devices": 8, "kind": "h200"}],
           "links": {"within_host": {"latency": "5us", "bandwidth": "450GB/s"}}}
MICROBATCHES = 32


def model_graph(layers: int) -> OperatorGraph:
    """Qwen3-30B-A3B (its config.json, with ``layers`` layers), one sequence of 4,096 tokens."""
    config = Qwen3MoeConfig(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, head_dim=128,
                            num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, num_experts=128,
                            num_experts_per_tok=8, vocab_size=151936, norm_topk_prob=True, use_cache=False,
                            max_position_embeddings=40960)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
        ids, labels = (torch.empty(1, 4096, dtype=torch.int64) for _ in range(2))
    return capture_module(model, {"input_ids": ids, "labels": labels, "use_cache": False}, name="Qwen3-30B-A3B")


def even(graph: OperatorGraph, count: int) -> CoarseGraph:
    """The segments cut into ``count`` runs of equal length."""
    bounds = [round(number * len(graph.segments) / count) for number in range(count + 1)]
    return contract(index_graph(graph), [list(range(first, last)) for first, last in itertools.pairwise(bounds)])


def problem_of(graph: OperatorGraph, coarse: CoarseGraph) -> PlanningProblem:
    """The planning problem of a coarse graph on the benchmark's cluster."""
    cluster = read_cluster(CLUSTER, "benchmark")
    costs = roofline(coarse, graph, cluster.kinds)
    return build_problem(coarse, costs, cluster.topology, num_microbatches=MICROBATCHES, optimizer="adamw_mixed")


def row(graph: OperatorGraph, count: int, seconds: float) -> dict[str, Any]:
    """One number of groups: coarsened and planned both ways."""
    begin = time.perf_counter()
    coarse = coarsen(graph, num_groups=count)
    spent = time.perf_counter() - begin
    problem = problem_of(graph, coarse)
    loads = [group.times["h200"].total_ns for group in problem.groups]
    result: dict[str, Any] = {"asked": count, "groups": len(loads), "coarsen s": spent,
                              "heaviest / mean": max(loads) * len(loads) / sum(loads),
                              "ideal ms": MICROBATCHES * sum(loads) / 8 / 1e6}
    for name, item in (("", problem), ("even ", problem_of(graph, even(graph, len(loads))))):
        solved = plan(item, PlanOptions(time_limit_s=seconds))
        result[f"{name}makespan ms"] = None if solved.makespan_ns is None else solved.makespan_ns / 1e6
        result[f"{name}placement"] = solved.reason if solved.plan is None else solved.plan.placement.name
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 12, 16, 24, 33, 50, 98, 194])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    console = Console()
    graph = model_graph(options.layers)
    rows = [row(graph, count, options.seconds) for count in options.groups]
    table = Table(title=f"{graph.model}, {options.layers} layers, {len(graph.segments)} segments, 8 x H200 (roofline),"
                        f" {MICROBATCHES} microbatches, {options.seconds:g} s per solve", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for item in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
                        for value in item.values()))
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "layers": options.layers, "seconds": options.seconds}) + "\n")


if __name__ == "__main__":
    main()
