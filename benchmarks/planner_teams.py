"""Degrees that `mipipe plan` chooses for large models, beside the published configuration on the same cluster.

    python benchmarks/planner_teams.py --runs runs.csv [--only 70b] [--json]

For every case: the published row, evaluated as `benchmarks/predictions/rows.py` builds it; the plan within the case's
time limit, on the same machine, batch and sequence length, every degree free; its bound, gap, time and memory. Exits
with 1 where a plan is slower than a published configuration that fits the memory, or a gap is beyond the goal.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from predictions.build import Builder
from predictions.rows import Run, read_runs
from rich.console import Console
from rich.table import Table

from mipipe.graphs.errors import MipipeError
from mipipe.graphs.units import format_bytes
from mipipe.planner.teams.evaluate import TeamResult
from mipipe.planner.teams.found import Found
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.search import search_teams

CASES = {"70b": ("mb257", 60.0), "405b": ("tt51", 90.0), "235b": ("mb278", 90.0), "v3": ("ds1", 180.0)}
"""A published row each, and the seconds that a plan may take."""
GOAL = 0.05
"""The gap that is aimed at."""


@dataclass(frozen=True)
class Row:
    """A case: the published configuration, the plan, and what planning took (captured before)."""

    run: Run
    published: TeamResult
    found: Found
    seconds: float
    memory: int

    @property
    def good(self) -> bool:
        """Within the goal, and no slower than a published configuration that fits."""
        slower = not self.published.shortage and self.found.best.seconds > self.published.seconds
        return not slower and self.found.gap is not None and self.found.gap <= GOAL


def solve(run: Run, builder: Builder, limit: float, tell: Console) -> Row:
    """Evaluate the row, and plan."""
    assert run.build is not None
    published = builder.evaluate(run.build)
    pricer = builder.pricer(run.build)
    start = time.monotonic()
    with tell.status(run.name) as status:
        found = search_teams(pricer, run.build.devices, run.build.global_batch, TeamOptions(time_limit_s=limit),
                             lambda text: status.update(f"{run.name}: {text}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Row(run, published, found, time.monotonic() - start, peak)


def told(result: TeamResult) -> dict[str, object]:
    """What is printed of a configuration."""
    degrees = result.degrees
    again = result.recompute or (degrees.recompute,) * len(result.plan.problem.groups)
    return {"degrees": degrees.text(), "microbatch": degrees.microbatch, "zero": degrees.zero,
            "recomputation": degrees.recompute if len(set(again)) == 1 else "some layers",
            "schedule": result.schedule, "seconds": result.seconds,
            "tokens_per_s_per_device": result.tokens_per_s_per_device, "mfu": result.utilisation,
            "peak_bytes": max(item.peak for item in result.memory), "shortage": result.shortage,
            "bubble_s": result.times.bubble, "talk_s": sum(result.times.axes.values()),
            "pipeline_s": result.times.pipeline}


def show(console: Console, rows: list[Row]) -> None:
    """Two lines for each case: published and planned."""
    table = Table("model", "devices", "", "degrees", "micro", "ZeRO", "again", "schedule", "step s", "tokens/s",
                  "memory", "bound s", "gap", "whole s", "gap", "plain s", "gap", "took s", "RSS")
    for row in rows:
        run, build = row.run, row.run.build
        assert build is not None
        for name, result in (("published", row.published), ("planned", row.found.best)):
            data = told(result)
            mine = name == "planned"
            table.add_row(run.model if not mine else "", f"{build.devices} {build.kind}" if not mine else "", name,
                          str(data["degrees"]), str(data["microbatch"]), str(data["zero"]), str(data["recomputation"]),
                          str(data["schedule"]), f"{result.seconds:.3f}", f"{result.tokens_per_s_per_device or 0:,.0f}",
                          format_bytes(max(item.peak for item in result.memory)) + ("!" if result.shortage else ""),
                          *((f"{row.found.bound:.3f}", _gap(row.found.gap), f"{row.found.whole_bound:.3f}",
                             _gap(row.found.whole_gap), f"{row.found.plain_bound:.3f}", _gap(row.found.plain_gap),
                             f"{row.seconds:.0f}", format_bytes(row.memory)) if mine else [""] * 8))
    console.print(table)
    console.print("memory with an exclamation mark: more than a device has; step of a published row: as predicted, not"
                  " as measured; bound: over all degrees, microbatches, recomputation, placements and orders; whole:"
                  " over those with every layer on one rank; plain: over those of them without overlapped pairs")


def _gap(gap: float | None) -> str:
    return "" if gap is None else f"{gap:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--only", choices=sorted(CASES), action="append", help="a case; all of them without")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tell, rows = Console(stderr=True), []
    try:
        runs = {run.name: run for run in read_runs(options.runs)}
        for name in options.only or CASES:
            row, limit = CASES[name]
            if row not in runs or runs[row].build is None:
                sys.exit(f"planner_teams: {options.runs} has no row {row} that can be built")
            rows.append(solve(runs[row], Builder(), limit, tell))
    except (OSError, ValueError, MipipeError) as error:
        sys.exit(f"planner_teams: {error}")
    if options.json:
        json.dump([{"id": row.run.name, "model": row.run.model, "published": told(row.published),
                    "planned": told(row.found.best), "bound_s": row.found.bound, "gap": row.found.gap,
                    "whole_bound_s": row.found.whole_bound, "whole_gap": row.found.whole_gap,
                    "plain_bound_s": row.found.plain_bound, "plain_gap": row.found.plain_gap,
                    "seconds": row.seconds, "rss_bytes": row.memory, "runners_up": [
                        {**told(item), "loses_by": why} for item, why in row.found.runners]} for row in rows],
                  sys.stdout, indent=1)
    else:
        show(Console(width=240), rows)
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()
