"""Are profiled costs what the groups take? The demo model's groups, profiled and measured again in turn, in one run.

    python benchmarks/profile_accuracy.py [--groups 24] [--ranks 4] [--repeats 12] [--json FILE]

Measured is what a run sees: every group of the model with tensors of its own, cut into as many runs of groups as there
are ranks, and each rank's part run as training runs it, F of its groups in order, then I and W from the last to the
first. Profiled is what `mipipe profile` does: the distinct groups in turn. Each repetition does both, so that a machine
that gets slower slows both. ``profiled`` and ``measured`` are medians in microseconds of CPU time (one thread), over
all groups of one structure; ``ratio`` is profiled / measured, ``again`` the ratio of the profiler's even to its odd
repetitions: what repeating alone changes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mipipe.graphs.capture.model import capture
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.profiling.profile import describe_device
from mipipe.graphs.profiling.profile_worker import ProfiledGroup, candidates, measure_groups

CPU = torch.device("cpu")
MODEL = Path(__file__).parent.parent / "examples" / "qwen3_moe_tiny"
ROUNDS = 6
Samples = dict[tuple[str, str], list[list[float]]]
"""By group and phase: for each repetition, nanoseconds."""


def take(lot: list[ProfiledGroup], alias: dict[str, str], found: Samples) -> None:
    """Some rounds over a lot, after one that only brings its tensors near; times go to the group that stands for all
    of their structure."""
    measure_groups(lot, CPU, 1)
    for name, phases in measure_groups(lot, CPU, ROUNDS).items():
        for phase, samples in phases.items():
            found.setdefault((alias[name], phase), []).append(samples)


def rows_of(count: int, ranks: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each distinct group of the demo model, as the demo plans it, and phase."""
    graph = capture(MODEL, seq=64, batch=2)
    coarse = coarsen(graph, num_groups=count)
    first: dict[str, str] = {}
    alias = {group.name: first.setdefault(group.structure, group.name) for group in coarse.groups}
    distinct = list(candidates(graph, coarse, set(first.values()), CPU))
    whole = list(candidates(graph, coarse, set(alias), CPU))
    bounds = [round(len(whole) * rank / ranks) for rank in range(ranks + 1)]
    parts = [whole[begin:end] for begin, end in itertools.pairwise(bounds)]
    profiled: Samples = {}
    measured: Samples = {}
    for lot in (distinct, *parts):
        take(lot, alias, {})
    for _ in range(repeats):
        for part in parts:
            take(distinct, alias, profiled)
            take(part, alias, measured)
    rows = []
    for key, samples in profiled.items():
        a, b = middle(samples), middle(measured[key])
        rows.append({"group": key[0], "phase": key[1], "profiled": a / 1e3, "measured": b / 1e3, "ratio": a / b,
                     "again": middle(samples[::2]) / middle(samples[1::2])})
    return rows


def middle(samples: list[list[float]]) -> float:
    """The median over all rounds of all repetitions."""
    return statistics.median(spent for part in samples for spent in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=4, help="parts the model is measured in")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = rows_of(options.groups, options.ranks, options.repeats)
    table = Table(title=f"Profiled and measured again, {describe_device('cpu')}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("group", "phase") else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()))
    console = Console(width=130)
    console.print(table)
    whole = sum(row["profiled"] for row in rows) / sum(row["measured"] for row in rows)
    inside = sum(abs(row["ratio"] - 1) <= 0.1 for row in rows)
    summary = {"whole step": whole, "within 10 %": f"{inside} of {len(rows)}",
               "largest deviation": max(abs(row["ratio"] - 1) for row in rows)}
    console.print(f"all groups together: profiled / measured {whole:.3f}; {inside} of {len(rows)} phases within 10 %,"
                  f" the farthest {summary['largest deviation']:.1%} off")
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "hardware": describe_device("cpu"), **summary}) + "\n")


if __name__ == "__main__":
    main()
