"""The planner's targets, one line each: value reached, value asked for, bound, gap, seconds, how it was found.

    python benchmarks/planner_targets.py                   # every section (half an hour)
    python benchmarks/planner_targets.py dualpipe v        # some sections
    python benchmarks/planner_targets.py scale --rows "16 x 32"   # some rows: those with this text in their names
    python benchmarks/planner_targets.py octopipe --seeds 0,1,2   # medians of three seeds
    python benchmarks/planner_targets.py --seconds 0.25    # a quarter of every time limit

The grid against every published schedule is `benchmarks/planner_grid.py`, placement workloads are
`benchmarks/placement.py`. Two cores, HiGHS only. ``gap`` is makespan / bound - 1; ``scope`` says over which placements
the bound holds. A value that misses its target is marked, never hidden.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from octopipe import octopipe_problem
from period import SETTINGS, Setting

from mipipe.planner.compare import compare
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_units, two_stream_problem, uniform_problem
from mipipe.planner.solve import SolveResult, plan


@dataclass(frozen=True)
class Line:
    """One line of the table. ``target``: at most this (None: only reported); ``reference``: what it stands against."""

    section: str
    name: str
    value: float | None
    target: float | None
    bound: float | None
    scope: str
    seconds: float
    limit_s: float
    how: str
    reference: str = ""

    @property
    def met(self) -> bool:
        return self.target is None or (self.value is not None and self.value <= self.target + 1e-9)

    @property
    def gap(self) -> float | None:
        return self.value / self.bound - 1 if self.value and self.bound else None


SHORT = 822
"""What 32 x 256 is asked to take at most."""


@dataclass(frozen=True)
class Row:
    """A line of the table that is worked out, from a seed, when it is asked for."""

    name: str
    line: Callable[[int], Line]


def solved(section: str, name: str, problem: PlanningProblem, limit_s: float, **more: Any) -> Row:
    """The row of one planned problem; ``more`` is what `solve_line` takes."""
    return Row(name, partial(solve_line, section, name, problem, limit_s, **more))


def solve_line(section: str, name: str, problem: PlanningProblem, limit_s: float, seed: int, *,
               target: float | None = None, placement: str = "free", reference: str = "", use_baselines: bool = True,
               show: Callable[[SolveResult], str] | None = None) -> Line:
    """The line of one planned problem."""
    began = time.monotonic()
    result = plan(problem, PlanOptions(time_limit_s=limit_s, placement=placement, seed=seed,  # type: ignore[arg-type]
                                       use_baselines=use_baselines))
    seconds = time.monotonic() - began
    scope = "free" if placement == "free" else placement
    how = f"{result.rung} at {result.plan.placement.name}" if result.plan else f"{result.termination}: {result.reason}"
    if show is not None and result.plan is not None:
        how += f"; {show(result)}"
    return Line(section, name, None if result.makespan_ns is None else in_units(problem, result.makespan_ns), target,
                None if result.bound_ns is None else in_units(problem, result.bound_ns), scope, seconds, limit_s, how,
                reference)


def optima(factor: float) -> Iterator[Row]:
    """Small proven optima: the bound must meet the value."""
    chain = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4, activations=4, copies=1)
    yield solved("optima", "chain 4x8, 1,1,1, 4 activations", chain, 20 * factor, target=27, placement="chain")
    two_way = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, layers=4, activations=5)
    yield solved("optima", "two-way 4x8, 2,2,1, 5 activations", two_way, 20 * factor, target=42, placement="two-way")


def dualpipe(factor: float) -> Iterator[Row]:
    """DualPipe's own placement and memory, 8 x 20: proven optima, DualPipe's makespan as reference."""
    for (f, i, w, comm), target, own in (((1, 1, 1, 0), 63, 66), ((1, "1.1", "0.9", 0), 63, 66.6),
                                         ((2, 2, 1, 0), 106, 115), ((10, 12, 8, 1), 636, 698)):
        problem = uniform_problem(ranks=8, microbatches=20, f=f, i=i, w=w, comm=comm, layers=8)
        yield solved("dualpipe", f"two-way 8x20, {f},{i},{w}, transfers {comm}", problem, 60 * factor, target=target,
                     placement="two-way", reference=f"DualPipe {own}")


def v_shape(factor: float) -> Iterator[Row]:
    """One copy, 10,12,8 with transfers of 1: V of half-stages, and the chain."""
    for activations, target, own in ((8, 664, 673), ("8.5", 658, 672), (9, 653, 667)):
        problem = uniform_problem(ranks=8, microbatches=20, f=10, i=12, w=8, comm=1, layers=16, copies=1,
                                  activations=activations)
        yield solved("v", f"V 8x20, {activations} activations", problem, 60 * factor, target=target, placement="v",
                     reference=f"best published {own}")
    problem = uniform_problem(ranks=8, microbatches=20, f=10, i=12, w=8, comm=1, layers=8, copies=1, activations=9)
    yield solved("v", "chain 8x20, 9 activations", problem, 60 * factor, target=704, placement="chain",
                 reference="best published 712")


def free(factor: float) -> Iterator[Row]:
    """Free placement with 9 activations, two copies, and one copy in 32 layers; the placement that was found."""
    def shape(result: SolveResult) -> str:
        assert result.plan is not None
        return " ".join(f"{stage.groups[0]}-{stage.groups[-1]}@{','.join(map(str, stage.ranks))}"
                        for stage in result.plan.placement.stages)

    cut = {"ranks": 8, "microbatches": 20, "f": 10, "i": 12, "w": 8, "comm": 1, "activations": 9}
    yield solved("free", "free 8x20, 2 copies", uniform_problem(**cut), 25 * factor, target=620,
                 reference="two-way optimum 636, DualPipe 698", show=shape)
    yield solved("free", "free 8x20, 1 copy, 32 layers", uniform_problem(**cut, layers=32, copies=1), 25 * factor,
                 target=646, show=shape)


def uneven(factor: float) -> Iterator[Row]:
    """32 layers, embedding 0.2, head 0.6 of a stage: the work alone is 66."""
    for copies, target in ((2, 70), (1, 74)):
        problem = uniform_problem(ranks=8, microbatches=20, f=1, i=1, w=1, layers=32, first="0.2", last="0.6",
                                  copies=copies)
        yield solved("uneven", f"uneven 8x20, {copies} copies", problem, 60 * factor, target=target,
                     reference="DualPipe 84, ZB-H1 103.2")


def streams(factor: float) -> Iterator[Row]:
    """Two streams; idle compute per device is makespan - 1200, DualPipe's is 526. Of one copy nothing is asked."""
    for copies, target in ((2, 1440), (1, None)):
        for layers in (8, 16):
            problem = two_stream_problem(ranks=8, microbatches=20, copies=copies, activations=9, layers=layers)
            yield solved("streams", f"two streams 8x20, {copies} copies, {layers} layers", problem, 60 * factor,
                         target=target, reference="DualPipe 1726; aim 1358")


def scale(factor: float) -> Iterator[Row]:
    """Uneven stages, transfers of 0.1, 0.75 of 1F1B's activations; the gap to stay within, or (32 x 256) the value."""
    rows: list[tuple[int, int, float, float | None]] = [(16, 32, 60, 0.05), (32, 64, 90, 0.06), (64, 128, 120, 0.07),
                                                        (64, 1024, 180, 0.02), (32, 256, 60, None)]
    for ranks, microbatches, limit, gap in rows:
        problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=1, i=1, w=1, comm="0.1", layers=4 * ranks,
                                  first="0.2", last="0.6", activations=0.75 * ranks)
        name = f"{ranks} x {microbatches}"
        yield Row(name, partial(scale_line, name, problem, limit * factor, gap))


def scale_line(name: str, problem: PlanningProblem, limit_s: float, gap: float | None, seed: int) -> Line:
    """The line of a large problem; its target is a gap, or `SHORT`, or the best baseline where that is less."""
    line = solve_line("scale", name, problem, limit_s, seed)
    best = best_baseline(problem)
    asked = SHORT if gap is None else (1 + gap) * line.bound if line.bound else float("inf")
    return replace(line, target=round(min(asked, best[0] if best else float("inf")), 3),
                   reference=f"best baseline within the caps: {best[1]} {best[0]:g}"
                   if best else "no baseline keeps the caps")


def best_baseline(problem: PlanningProblem, names: Sequence[str] = ("V-Half", "V-Min")) -> tuple[float, str] | None:
    """Makespan and name of the best of some published schedules within the problem's caps.

    Only V-Half and V-Min can hold three quarters of 1F1B's activations: all others need at least as many as 1F1B.
    """
    from mipipe.planner.compare import _within_caps
    rows = compare(problem, names)
    kept = [(row.makespan, row.name) for row in rows if row.makespan is not None and _within_caps(row, problem)]
    return min(kept) if kept else None


def zero(factor: float) -> Iterator[Row]:
    """The zero-bubble paper's settings at 1F1B's activations and one copy, without published starts: at most ZB-1p's
    printed figure and every published schedule within the caps."""
    for setting in (*SETTINGS, replace(SETTINGS[-1], m=96)):
        problem = uniform_problem(ranks=setting.p, microbatches=setting.m, f=setting.f, i=setting.i, w=setting.w,
                                  comm=setting.comm, copies=1, activations=setting.p)
        yield Row(setting.name, partial(zero_line, setting, problem, 60 * factor))


def zero_line(setting: Setting, problem: PlanningProblem, limit_s: float, seed: int) -> Line:
    """The line of one setting; ZB-1p's cost is its work over 1 - bubble."""
    best = best_baseline(problem, ["1F1B", "ZB-H1", "ZB-V", "V-Half"])
    printed = setting.work / (1 - setting.zb_h1) if setting.m != 96 else float("inf")  # ZB-1p's is ZB-H1's
    assert best is not None
    line = solve_line("zero", setting.name, problem, limit_s, seed, target=min(printed, best[0]), use_baselines=False)
    return replace(line, reference=f"{best[1]} {best[0]:g}, ZB-1p as printed {printed:.6g}")


def octopipe(factor: float) -> Iterator[Row]:
    """OctoPipe's public instance; the gap must stay within 2 %."""
    yield Row("nemotron 4 x 8", partial(octopipe_line, 60 * factor))


def octopipe_line(limit_s: float, seed: int) -> Line:
    """The line of OctoPipe's instance."""
    line = solve_line("octopipe", "nemotron 4 x 8", octopipe_problem(), limit_s, seed,
                      reference="OctoPipe 89,870, 1F1B 133,121")
    return replace(line, target=1.02 * line.bound if line.bound else None)


SECTIONS: dict[str, Callable[[float], Iterator[Row]]] = {
    "optima": optima, "dualpipe": dualpipe, "v": v_shape, "free": free, "uneven": uneven, "streams": streams,
    "scale": scale, "zero": zero, "octopipe": octopipe,
}


def main() -> int:
    """Print the table; 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows with this text in their names")
    parser.add_argument("--seconds", type=float, default=1.0, help="factor on every time limit")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2: the line with the median, and all values")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"section {min(unknown)!r}: expected some of {', '.join(SECTIONS)}")
    chosen = arguments.sections or list(SECTIONS)
    lines: list[Line] = []
    print(f"{'section':9} {'problem':42} {'value':>9} {'target':>9} {'bound':>9} {'gap':>7} {'s':>6}  how", flush=True)
    todo = [SECTIONS[name](arguments.seconds) for name in chosen]
    for row in itertools.chain.from_iterable(todo):
        if arguments.rows not in row.name:
            continue
        line = median([row.line(int(seed)) for seed in arguments.seeds.split(",")])
        lines.append(line)
        print(shown(line), flush=True)
    missed = [line for line in lines if not line.met]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(lines) - len(missed)} of {len(lines)} targets met; peak memory {memory:.2f} GiB")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(line) | {"met": line.met, "gap": line.gap} for line in lines],
                                             indent=1) + "\n")
    return int(bool(missed))


def median(lines: Sequence[Line]) -> Line:
    """The line with the (lower) median of some seeds' values, which it tells; no plan counts as the longest."""
    if len(lines) == 1:
        return lines[0]
    ordered = sorted(lines, key=lambda line: float("inf") if line.value is None else line.value)
    values = ", ".join("-" if line.value is None else f"{line.value:.6g}" for line in lines)
    middle = ordered[(len(lines) - 1) // 2]
    return replace(middle, reference="; ".join(filter(None, (f"seeds {values}", middle.reference))))


def shown(line: Line) -> str:
    """A line of the table."""
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.6g}"

    gap = "-" if line.gap is None else f"{line.gap:.2%}"
    mark = "" if line.met else "  MISSED"
    notes = f"{line.how} [{line.scope}]" + (f" ({line.reference})" if line.reference else "")
    return (f"{line.section:9} {line.name:42} {number(line.value):>9} {number(line.target):>9} {number(line.bound):>9}"
            f" {gap:>7} {line.seconds:6.1f}  {notes}{mark}")


if __name__ == "__main__":
    sys.exit(main())
