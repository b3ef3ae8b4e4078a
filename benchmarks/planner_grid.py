"""The planner against every published schedule on a grid of sizes and cost models; one line for each of 60 problems.

    python benchmarks/planner_grid.py                        # the whole grid, at most 26 minutes of planning
    python benchmarks/planner_grid.py --seconds 0.4          # two fifths of every time limit
    python benchmarks/planner_grid.py --ranks 2,4 --models "equal;uneven"
    python benchmarks/planner_grid.py --sizes 8x32,16x64 --models overlap

P in {2, 4, 8, 16} ranks, M in {P, 2P, 4P} microbatches; at most two copies of the parameters and P + 1 activations.
``planned`` is `mipipe compare`'s planned row, ``alone`` what the planner found without any published schedule as a
start. ``best published`` is the shortest row with at most the same copies and activations in whichever accounting, so
also DualPipe with its overlapped pairs as blocks. ``verdict``: *below* (strictly), *equal* where the bound says that
nothing shorter exists, *level* where it does not, and *ABOVE*. Durations in the cost model's own units.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mipipe.planner.compare import compare
from mipipe.planner.comparison_rows import ComparisonRow
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_activations, in_copies, two_stream_problem, uniform_problem

COST_MODELS: dict[str, Callable[[int, int], PlanningProblem]] = {
    "equal": lambda p, m: uniform_problem(ranks=p, microbatches=m, f=1, i=1, w=1),
    "10,11,9": lambda p, m: uniform_problem(ranks=p, microbatches=m, f=10, i=11, w=9),
    "10,12,8 c1": lambda p, m: uniform_problem(ranks=p, microbatches=m, f=10, i=12, w=8, comm=1),
    "overlap": lambda p, m: two_stream_problem(ranks=p, microbatches=m, fb="78.2"),  # 0.85 of 36 + 39 + 17
    "uneven": lambda p, m: uniform_problem(ranks=p, microbatches=m, f=1, i=1, w=1, first="0.2", last="0.6"),
}

LIMITS_S = {2: 4.0, 4: 10.0, 8: 30.0, 16: 60.0}
"""Seconds of planning by ranks; a proof ends a solve sooner."""

COLUMNS = (("model", 11), ("size", 8), ("planned", 9), ("best published", 22), ("verdict", 8), ("bound", 9), ("gap", 7),
           ("alone", 9), ("s", 6), ("rung", 18), ("placement", 20), ("copies", 7), ("activations", 11))


@dataclass(frozen=True)
class Line:
    """One problem of the grid: makespans in its units, None where there is none."""

    model: str
    ranks: int
    microbatches: int
    planned: float | None
    alone: float | None
    published: float | None
    published_name: str
    bound: float | None
    rung: str
    placement: str
    copies: float | None
    activations: float | None
    seconds: float

    @property
    def verdict(self) -> str:
        if self.planned is None or (self.published is not None and self.planned > self.published + 1e-9):
            return "ABOVE"
        if self.published is None or self.planned < self.published - 1e-9:
            return "below"
        return "equal" if self.bound is not None and self.bound >= self.planned - 1e-9 else "level"


def line(model: str, ranks: int, microbatches: int, limit_s: float, seed: int) -> Line:
    """The line of one problem."""
    problem = COST_MODELS[model](ranks, microbatches)
    began = time.monotonic()
    *rows, ours = compare(problem, None, PlanOptions(time_limit_s=limit_s, seed=seed))
    best = min((row for row in rows if row.makespan is not None and _comparable(row, problem)),
               key=lambda row: row.makespan or 0.0, default=None)
    return Line(model, ranks, microbatches, ours.makespan, ours.without_baselines, best.makespan if best else None,
                f"{best.name} {best.accounting}" if best else "none", ours.bound, ours.rung or ours.note,
                ours.placement or "", ours.parameter_copies, ours.peak_activations, time.monotonic() - began)


def _comparable(row: ComparisonRow, problem: PlanningProblem) -> bool:
    """Whether a row's copies and activations are within the problem's caps."""
    limits = problem.limits
    assert limits.resident_bytes is not None and limits.activation_bytes is not None
    return ((row.parameter_copies or 0) <= in_copies(problem, limits.resident_bytes) + 1e-9
            and (row.peak_activations or 0) <= in_activations(problem, limits.activation_bytes) + 1e-9)


def shown(found: Line) -> str:
    """A line of the table."""
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.6g}"

    published = "-" if found.published is None else f"{number(found.published)} {found.published_name}"
    gap = f"{found.planned / found.bound - 1:.1%}" if found.planned and found.bound else "-"
    cells = (found.model, f"{found.ranks}x{found.microbatches}", number(found.planned), published, found.verdict,
             number(found.bound), gap, number(found.alone), f"{found.seconds:.1f}", found.rung, found.placement,
             number(found.copies), number(found.activations))
    return _row(cells)


def _row(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip()


def main() -> int:
    """Print the table; 1 if a plan is longer than a published schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8,16", help="which sizes (default: all)")
    parser.add_argument("--sizes", help="which ranks x microbatches, such as 8x32,16x64 (default: all of --ranks)")
    parser.add_argument("--models", help=f"which cost models, split by ';' (default: {';'.join(COST_MODELS)})")
    parser.add_argument("--seconds", type=float, default=1.0, help="factor on every time limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    models = arguments.models.split(";") if arguments.models else list(COST_MODELS)
    unknown = set(models) - set(COST_MODELS)
    if unknown:
        parser.error(f"model {min(unknown)!r}: expected some of {', '.join(COST_MODELS)}")
    began = time.monotonic()
    print(_row([name for name, _ in COLUMNS]), flush=True)
    lines = []
    sizes = arguments.sizes.split(",") if arguments.sizes else None
    for ranks, times, model in itertools.product(map(int, arguments.ranks.split(",")), (1, 2, 4), models):
        if sizes is not None and f"{ranks}x{times * ranks}" not in sizes:
            continue
        lines.append(line(model, ranks, times * ranks, LIMITS_S[ranks] * arguments.seconds, arguments.seed))
        print(shown(lines[-1]), flush=True)
    counts = {verdict: sum(found.verdict == verdict for found in lines) for verdict in ("below", "equal", "level",
                                                                                       "ABOVE")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(lines)} problems in {(time.monotonic() - began) / 60:.1f} minutes, {memory:.2f} GiB: "
          + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(found) | {"verdict": found.verdict} for found in lines], indent=1)
                                  + "\n")
    return int(counts["ABOVE"] > 0)


if __name__ == "__main__":
    sys.exit(main())
