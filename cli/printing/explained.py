"""What ``plan --explain`` adds: where every rank's time goes, what binds, what a little more would give, the rungs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mipipe.cli.printing.output import log, number, stdout
from mipipe.cli.printing.tables import print_rows
from mipipe.cli.printing.terminal import format_time
from mipipe.planner.explain.bubble import BubbleParts, bubble_parts

if TYPE_CHECKING:
    from mipipe.planner.explain.what_if import WhatIf
    from mipipe.planner.plan import Plan
    from mipipe.planner.solve import SolveResult

MORE = 0.05
"""Share of the time limit for each problem with a little more."""

LEAST_S = 0.2
"""Seconds below which none of them is worth a solve."""

PARTS = ("bubble", "warm_up", "imbalance", "transfers", "memory", "recomputation")
"""A rank's bubble and its parts, as `mipipe.planner.explain.bubble` defines them."""

MEANINGS = ("warm-up: until work reaches the busiest rank, until gradients come back, after its last action; imbalance:"
            " work this rank has less than the busiest; transfers, memory, recomputation: what the step is shorter"
            " where values arrive at once, no rank waits for memory, and forwards that run again take no time")


SHOWN = 0.0005
"""The least gain that is told."""


def bubble_rows(plan: Plan) -> list[dict[str, Any]]:
    """Every rank's bubble and its parts as JSON data, in the problem's unit."""
    unit = plan.problem.unit_ns
    return [{"rank": rank, **{name: number(_part(part, name) / unit) for name in PARTS}}
            for rank, part in enumerate(bubble_parts(plan))]


def _part(part: BubbleParts, name: str) -> int:
    value: int = getattr(part, f"{name}_ns")
    return value


def what_if_rows(found: Sequence[WhatIf], unit_ns: int) -> list[dict[str, Any]]:
    """What a little more would give as JSON data."""
    return [{"what": item.what, "makespan": None if item.makespan_ns is None else number(item.makespan_ns / unit_ns),
             "each_before": item.each_before_ns / unit_ns,
             "each": None if item.each_ns is None else item.each_ns / unit_ns, "gain": item.gain,
             "gain_at_most": item.most, "seconds": round(item.seconds, 3)} for item in found]


def explanation_data(result: SolveResult, plan: Plan, more: Sequence[WhatIf]) -> dict[str, Any]:
    """What ``--explain`` adds as JSON data, times in the problem's unit."""
    return {"explanation": list(result.explanation), "ablation": list(result.ablation), "bubbles": bubble_rows(plan),
            "what_if": what_if_rows(more, plan.problem.unit_ns)}


def print_explanation(result: SolveResult, plan: Plan, more: Sequence[WhatIf]) -> None:
    """The tables and lines of ``--explain``."""
    console, unit = stdout(), plan.problem.unit_ns
    parts = bubble_parts(plan)
    print_rows(console, [{"rank": str(rank), **{name.replace("_", "-"): format_time(_part(part, name), unit)
                                               for name in PARTS}} for rank, part in enumerate(parts)],
               title="where each rank's bubble comes from")
    console.print(MEANINGS, style="dim", soft_wrap=True)
    for line in result.explanation:
        console.print(line)
    for item in more:
        console.print(told_what_if(item, unit), soft_wrap=True)
    print_rows(console, [rung_cells(row, unit) for row in result.ablation], title="what each rung found")
    if not sys.stdout.isatty():
        log(f"{len(result.history)} improvements")


def told_what_if(item: WhatIf, unit_ns: int) -> str:
    """What a little more would give, in a line."""
    if item.most is not None and item.most < SHOWN:
        return f"with {item.what}: no plan is shorter, by the bound"
    limit = "" if item.most is None else f"; by the bound at most {item.most:.1%} less"
    if item.gain is None or item.makespan_ns is None or item.gain < SHOWN:
        return f"with {item.what}: nothing shorter a microbatch found in {item.seconds:.1f} s{limit}"
    return (f"with {item.what}: makespan {format_time(item.makespan_ns, unit_ns)}, {item.gain:.1%} less a microbatch"
            f" (solved again for {item.seconds:.1f} s{limit})")


def rung_cells(row: Mapping[str, Any], unit_ns: int) -> dict[str, Any]:
    """A row of the ablation as a person reads it: times with units where the problem's are nanoseconds."""
    times = {name: None if row.get(name) is None else format_time(row[name] * unit_ns, unit_ns)
             for name in ("before", "makespan")}
    return {"rung": row["rung"], "placement": row["placement"], **times, "variables": row["variables"],
            "constraints": row["constraints"], "seconds": row["seconds"]}
