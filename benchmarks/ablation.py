"""What the MIP and the annealer are worth: each problem planned with both, without the MIP, and without the annealing.

    python benchmarks/ablation.py                          # every row, three solves of each (35 minutes)
    python benchmarks/ablation.py --rows "8 x 20" --seconds 0.25
    python benchmarks/ablation.py --seeds 0,1,2            # medians of three seeds; all of them with --json

No solve starts from a published schedule, unless ``--published`` says so. ``bound`` is that of the solve with both,
over all placements or, for a chain or a V, over those of that shape; the figures of HiGHS (calls, seconds, nodes of
branch and bound) and the winner's provenance are those of the solve with both, too. HiGHS took part in a winner if it
proposed its placement, made or improved its order on the way, or proved the bound beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mipipe.planner.how import how_lines
from mipipe.planner.options import PlanOptions, without
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_units, two_stream_problem, uniform_problem
from mipipe.planner.solve import SolveResult, plan
from mipipe.planner.warm import warm

WITHOUT: dict[str, tuple[str, ...]] = {"both": (), "without mip": ("mip",), "without search": ("search",)}
"""The columns, and what each solve does without."""


@dataclass(frozen=True)
class Row:
    """A problem of the table and its time limit."""

    name: str
    problem: PlanningProblem
    limit_s: float
    placement: str = "free"


def rows() -> list[Row]:
    """The problems: the README's, and those of `benchmarks/planner_targets.py` on which the parts differ."""
    cut = {"f": 10, "i": 12, "w": 8, "comm": 1, "ranks": 8, "microbatches": 20, "activations": 9}
    uneven = {"f": 1, "i": 1, "w": 1, "comm": "0.1", "first": "0.2", "last": "0.6"}
    return [
        Row("README 4 x 8", uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, copies=2, activations=5), 10),
        Row("chain 4 x 8", uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4, activations=4, copies=1),
            20, "chain"),
        Row("free 8 x 20, 2 copies", uniform_problem(**cut), 25),
        Row("free 8 x 20, 1 copy", uniform_problem(**cut, layers=32, copies=1), 25),
        Row("V 8 x 20", uniform_problem(**cut, layers=16, copies=1), 20, "v"),
        Row("two streams 8 x 20", two_stream_problem(ranks=8, microbatches=20, copies=2, activations=9), 60),
        Row("uneven 8 x 20", uniform_problem(ranks=8, microbatches=20, f=1, i=1, w=1, layers=32, first="0.2",
                                             last="0.6", copies=2), 30),
        *(Row(f"uneven {ranks} x {microbatches}", uniform_problem(ranks=ranks, microbatches=microbatches,
                                                                  layers=4 * ranks, activations=0.75 * ranks, **uneven),
              limit) for ranks, microbatches, limit in ((16, 32, 60), (32, 64, 90), (32, 256, 60))),
    ]


@dataclass(frozen=True)
class Solve:
    """One solve of a row: times in the problem's unit, None without a plan or bound."""

    row: str
    column: str
    seed: int
    makespan: float | None
    bound: float | None
    seconds: float
    calls: int
    highs_seconds: float
    nodes: int
    part: tuple[str, ...]
    how: tuple[str, ...]


def solve(row: Row, column: str, seed: int, factor: float, published: bool) -> Solve:
    """Plan a row without some parts."""
    parts = (*WITHOUT[column], *(() if published else ("published",)))
    options = PlanOptions(time_limit_s=row.limit_s * factor, seed=seed, placement=row.placement,  # type: ignore[arg-type]
                          **without(parts))  # type: ignore[arg-type]
    began = time.monotonic()
    result: SolveResult = plan(row.problem, options)
    how = result.how
    return Solve(row.name, column, seed, _in_units(row.problem, result.makespan_ns),
                 _in_units(row.problem, result.bound_ns), time.monotonic() - began, how.calls, how.seconds, how.nodes,
                 how.highs_part if result.plan is not None else (),
                 tuple(how_lines(how)) if result.plan is not None else (result.reason,))


def _in_units(problem: PlanningProblem, time_ns: int | None) -> float | None:
    return None if time_ns is None else in_units(problem, time_ns)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows with this text in their names")
    parser.add_argument("--seconds", type=float, default=1.0, help="factor on every time limit")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas; medians are shown")
    parser.add_argument("--published", action="store_true", help="published schedules may start every solve")
    parser.add_argument("--json", type=Path, help="also write every solve to this file")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    chosen = [row for row in rows() if arguments.rows in row.name]
    if not chosen:
        parser.error(f"--rows {arguments.rows!r}: expected a part of one of: {', '.join(row.name for row in rows())}")
    warm()
    print(f"{'problem':22} {'limit':>5} {'both':>9} {'no mip':>9} {'no search':>9} {'bound':>9} {'gap':>6} {'calls':>6}"
          f" {'HiGHS s':>8} {'nodes':>8}  HiGHS took part in", flush=True)
    done: list[Solve] = []
    for row in chosen:
        found = [solve(row, column, seed, arguments.seconds, arguments.published)
                 for column, seed in itertools.product(WITHOUT, seeds)]
        done += found
        print(shown(row, found, arguments.seconds), flush=True)
    winners = [item for item in done if item.column == "both" and item.makespan is not None]
    took = [item for item in winners if item.part]
    parts = (f"{part} {sum(part in item.part for item in winners)}" for part in ("placement", "order", "bound"))
    print(f"winners in which HiGHS took part: {len(took)} of {len(winners)} ({', '.join(parts)})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(item) for item in done], indent=1) + "\n")
    return 0


def shown(row: Row, found: list[Solve], factor: float) -> str:
    """The line of a row (medians over its seeds), and below it how the first seed's winner came about."""
    by_column = {column: [item for item in found if item.column == column] for column in WITHOUT}
    both = by_column["both"]
    makespans = [_median([item.makespan for item in items]) for items in by_column.values()]
    bound = max((item.bound for item in both if item.bound is not None), default=None)
    gap = "-" if makespans[0] is None or not bound else f"{makespans[0] / bound - 1:.1%}"
    figures = [statistics.median(value) for value in ([item.calls for item in both],
                                                      [item.highs_seconds for item in both],
                                                      [item.nodes for item in both])]
    parts = ", ".join(dict.fromkeys(part for item in both for part in item.part)) or "nothing"
    line = (f"{row.name:22} {row.limit_s * factor:5g} " + " ".join(f"{_number(value):>9}" for value in
                                                                (*makespans, bound))
            + f" {gap:>6} {figures[0]:6g} {figures[1]:8.1f} {figures[2]:8g}  {parts}")
    return "\n".join((line, *(f"    {text}" for text in both[0].how)))


def _median(values: list[float | None]) -> float | None:
    """The median; no plan counts as longer than any."""
    middle = statistics.median_high([float("inf") if value is None else value for value in values])
    return None if middle == float("inf") else middle


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


if __name__ == "__main__":
    sys.exit(main())
