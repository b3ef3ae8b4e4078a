"""A multimodal model on 8 H100: our plan against published schedules with the encoder on stage 0 or on its own rank.

    python benchmarks/planner_multimodal.py [--graph llava.json] [--seconds 60] [--json FILE]

The model is LLaVA-1.5's shape (benchmarks/llava_7b: ViT-L/14 at 336 pixels, 576 image tokens, projector, 32 layers of
width 4,096), 2,048 tokens and one image in a microbatch, 16 microbatches, bfloat16, 16 bytes of state per parameter,
costs by roofline. Captured in a minute unless ``--graph`` gives the file of

    mipipe capture benchmarks/llava_7b --seq 2048 --dtype bfloat16 -o llava.json

Baselines: 1F1B, ZB-H1 and ZB-V, each with the encoder first or apart, stages cut evenly (as published) and by time;
their memory is not limited beyond the device's. Ours keeps 1F1B's: per device at most its largest weights and optimizer
state (``one copy``: replicas only where they fit beside) and its largest activations. The line ``two copies`` may use
the rest of the 80 GB for replicas, with the same activations. ``images`` draws 0 to 4 images for each microbatch from a
fixed seed; then the encoder's time, memory and transfers scale with them. Times in ms; ``ratio`` is ours over the best
baseline, target at most 0.9.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import load
from mipipe.planner.ladder.candidate import peak_activations
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import resident_bytes
from mipipe.planner.plan import Plan
from mipipe.planner.problem import Limits, PlanningProblem
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.schedules.branch_baselines import plan_with_encoder
from mipipe.planner.solve import plan

HERE = Path(__file__).parent / "llava_7b"
MICROBATCHES = 16
SEED = 0
"""Of the image counts: random.Random(SEED).randint(0, 4) for each microbatch."""

SCHEDULES = ("1F1B", "ZB-H1", "ZB-V")


@dataclass(frozen=True)
class Row:
    """One line: milliseconds, GB of the device that has most."""

    images: str
    name: str
    makespan: float
    bound: float | None
    weights: float
    activations: float
    how: str
    ratio: float | None = None


def captured(path: Path | None) -> OperatorGraph:
    """The operator graph, from a file or captured now."""
    if path is not None:
        return load(path, OperatorGraph)
    from mipipe.graphs.capture.model import capture

    return capture(HERE, seq=2048, dtype="bfloat16")


def problem_of(graph: OperatorGraph, images: list[float] | None) -> PlanningProblem:
    """Half layers as groups on 8 H100."""
    cluster = load_cluster(HERE / "h100x8.yaml")
    coarse = coarsen(graph, granularity="block")
    costs = roofline(coarse, graph, cluster.kinds)
    loads = None if images is None else {"vision": images, "projector": images}
    return build_problem(coarse, costs, cluster.topology, num_microbatches=MICROBATCHES, optimizer="adamw_mixed",
                         loads=loads)


def baselines(problem: PlanningProblem) -> Iterator[tuple[str, Plan]]:
    """Every published schedule in both places of the encoder and with both cuts."""
    for baseline in BASELINES:
        for where in ("first", "apart") if baseline.name in SCHEDULES else ():
            for cut in ("even", "balanced"):
                try:
                    yield f"{baseline.name}, encoder {where}, cut {cut}", plan_with_encoder(
                        problem, baseline, where, cut=cut)  # type: ignore[arg-type]
                except MipipeError as error:
                    print(f"{baseline.name}, encoder {where}, cut {cut}: {error}")


def measured(images: str, name: str, found: Plan, how: str, best: float | None = None) -> Row:
    """The row of a plan."""
    assert found.makespan_ns is not None
    makespan = found.makespan_ns / 1e6
    return Row(images, name, makespan, None if found.bound_ns is None else found.bound_ns / 1e6,
               max(resident_bytes(found.problem, found.placement)) / 1e9, peak_activations(found) / 1e9, how,
               None if best is None else makespan / best)


def rows(graph: OperatorGraph, images: list[float] | None, seconds: float) -> Iterator[Row]:
    """All rows of one workload, ours last."""
    problem = problem_of(graph, images)
    label = "1 each" if images is None else " ".join(f"{count:g}" for count in images)
    known = dict(baselines(problem))
    for name, found in known.items():
        yield measured(label, name, found, found.placement.name)
    best = min(found.makespan_ns or 1 << 62 for found in known.values()) / 1e6
    peers = [found for name, found in known.items() if name.startswith("1F1B, encoder first")]
    weights = max(max(resident_bytes(problem, found.placement)) for found in peers)
    activations = min(peak_activations(found) for found in peers)
    for name, limits in (("one copy", Limits(weights, activations)), ("two copies", Limits(None, activations))):
        result = plan(problem.replace(limits=limits), PlanOptions(time_limit_s=seconds, use_baselines=False))
        if result.plan is None:
            print(f"mipipe, {name}: {result.reason}")
            continue
        yield measured(label, f"mipipe, {name}", result.plan, f"{result.plan.placement.name}, {result.rung}", best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, help="the captured graph, if it is there already")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each solve")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    graph = captured(arguments.graph)
    drawn = random.Random(SEED)
    counts = [float(drawn.randint(0, 4)) for _ in range(MICROBATCHES)]
    found: list[dict[str, Any]] = []
    for images in (None, counts):
        print(f"{'images':>8}  {'schedule':38} {'ms':>8} {'bound':>8} {'weights':>8} {'activ.':>7} {'ratio':>6}  how")
        for row in rows(graph, images, arguments.seconds):
            found.append(vars(row) | {"met": None if row.ratio is None else row.ratio <= 0.9})
            bound = "" if row.bound is None else f"{row.bound:.1f}"
            ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
            print(f"{'1 each' if images is None else '0 to 4':>8}  {row.name:38} {row.makespan:8.1f} {bound:>8}"
                  f" {row.weights:8.1f} {row.activations:7.1f} {ratio:>6}  {row.how}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
