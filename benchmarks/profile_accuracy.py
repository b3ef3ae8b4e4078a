"""Are profiled costs what the groups take? The demo model's groups, profiled and measured again in turn, in one run.

    python benchmarks/profile_accuracy.py [--groups 24] [--repeats 15] [--json FILE]

Each repetition does two things, so that a machine that gets slower slows both: it takes one sample of every group as
`mipipe profile` does (a batch of F-I-W rounds of one group), and then runs all groups round by round, as a training
step does, timing every phase. ``profiled`` and ``measured`` are medians over repetitions in microseconds of CPU time
(one thread), ``ratio`` is profiled / measured, ``again`` the ratio of the profiler's even to its odd repetitions: what
repeating alone changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mipipe.graphs.capture import capture
from mipipe.graphs.coarsen import coarsen
from mipipe.graphs.contract import index_graph
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.profile import ProfileOptions, describe_device
from mipipe.graphs.profile_worker import measure, warm_up
from mipipe.graphs.rehearse import GroupRun, rehearse

CPU = torch.device("cpu")
MODEL = Path(__file__).parent.parent / "examples" / "qwen3_moe_tiny"
ONE = ProfileOptions(seconds=0.03, samples=1)


def group_runs(count: int) -> list[tuple[str, GroupRun, list[Phase]]]:
    """(name, runnable group, phases) for each distinct group of the demo model, as `examples/train_moe.py` plans it."""
    graph = capture(MODEL, seq=64, batch=2)
    coarse = coarsen(graph, num_groups=count)
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    groups = [[number_of[name] for name in group.segments] for group in coarse.groups]
    structures = [group.structure for group in coarse.groups]
    wanted = {structures.index(structure) for structure in structures}
    return [(coarse.groups[number].name, run, [phase for phase in Phase if phase in coarse.groups[number].flops])
            for number, run in rehearse(index_graph(graph), groups, structures, wanted, CPU)]


def one_step(runs: list[tuple[str, GroupRun, list[Phase]]], found: dict[tuple[str, Phase], list[float]]) -> None:
    """Every group once, F in order and then I and W in reverse, each phase's CPU time appended to ``found``."""
    steps = [(name, run, Phase.F) for name, run, _ in runs]
    steps += [(name, run, phase) for name, run, phases in reversed(runs) for phase in phases if phase is not Phase.F]
    for name, run, phase in steps:
        begin = time.thread_time_ns()
        run.run(phase)
        found.setdefault((name, phase), []).append(time.thread_time_ns() - begin)


def rows_of(count: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each group and phase."""
    runs = group_runs(count)
    profiled: dict[tuple[str, Phase], list[float]] = {}
    measured: dict[tuple[str, Phase], list[float]] = {}
    rounds = {name: warm_up(run, phases, CPU, ONE) for name, run, phases in runs}
    one_step(runs, {})
    for _ in range(repeats):
        for name, run, phases in runs:
            for phase, samples in measure(run, phases, CPU, ONE, rounds[name]).items():
                profiled.setdefault((name, Phase(phase)), []).extend(samples)
        step: dict[tuple[str, Phase], list[float]] = {}
        for _ in range(5):
            one_step(runs, step)
        for key, samples in step.items():
            measured.setdefault(key, []).append(statistics.median(samples))
    rows = []
    for key, samples in profiled.items():
        a, b = statistics.median(samples), statistics.median(measured[key])
        rows.append({"group": key[0], "phase": key[1].value, "profiled": a / 1e3, "measured": b / 1e3, "ratio": a / b,
                     "again": statistics.median(samples[::2]) / statistics.median(samples[1::2])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = rows_of(options.groups, options.repeats)
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
