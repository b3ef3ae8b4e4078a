"""Published schedules and planned ones on one problem, each counted in its stated way, within one time limit.

The planner's row is never worse than published schedules within its limits, and says what it found without them. Rows
and their accountings: `mipipe.planner.comparison_rows`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from mipipe.graphs.errors import InputError
from mipipe.planner import clock
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.comparison_rows import (
    Accounting,
    ComparisonRow,
    baseline_rows,
    has_streams,
    measured_row,
    units_or_none,
)
from mipipe.planner.gap import gap_of
from mipipe.planner.how import How
from mipipe.planner.jobs.stages import view
from mipipe.planner.milp.calls import counting
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import proposes_all
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_units
from mipipe.planner.schedules import BASELINES, Baseline, folded_name, with_chunks
from mipipe.planner.schedules.one_f_one_b import CHUNKS
from mipipe.planner.sizes import NEVER_NS
from mipipe.planner.solve import Termination, plan
from mipipe.planner.time_shares import SHARES

PLANNED = "mipipe"
"""The name of the planned row."""


def compare(problem: PlanningProblem, names: Sequence[str] | None = None, options: PlanOptions | None = None,
            on_progress: Callable[[str], None] | None = None, chunks: int = CHUNKS) -> list[ComparisonRow]:
    """The rows of the named schedules (default: all, the planned one last) on a problem.

    ``options`` steer the planned row, and their time limit is that of all rows together; ``on_progress`` is told what
    is being worked on; ``chunks`` are the stages per rank of interleaved 1F1B.

    Raises:
        InputError: an unknown name.
        InfeasibleError: the planner proved that no plan fits the caps (only when it is the only row asked for).
    """
    chosen = _choose(names)
    tell = on_progress or (lambda text: None)
    options, began = options or PlanOptions(), time.monotonic()
    limit, spare = options.time_limit_s, SHARES.compared_spare * options.time_limit_s
    share = SHARES.compared if PLANNED in chosen else 1.0
    rows: list[ComparisonRow] = []
    longest = 0.0
    for baseline in with_chunks(chunks):
        if baseline.name in chosen:
            tell(baseline.name)
            longest = _rows_in_time(problem, baseline, lambda: share * limit - (time.monotonic() - began), rows,
                                    longest)
    if PLANNED in chosen:
        late = max(0.0, time.monotonic() - began - spare)
        ours = dataclasses.replace(options, time_limit_s=max(spare, limit - late))
        rows.append(planned_row(problem, ours, rows, tell))
    return rows


def _rows_in_time(problem: PlanningProblem, baseline: Baseline, left: Callable[[], float], rows: list[ComparisonRow],
                  longest: float) -> float:
    """Add the rows of a published schedule that are measured within the seconds left, and one that says so if not all.

    None is begun in less than the ``longest`` of a row so far took, which is returned: it would be begun in vain.
    """
    try:
        with clock.watched(left):
            clock.ask()
            made = baseline_rows(problem, baseline)
            while left() >= longest:
                began = time.monotonic()
                row = next(made, None)
                if row is None:
                    return longest
                rows.append(row)
                longest = max(longest, time.monotonic() - began)
        raise clock.OutOfTimeError
    except clock.OutOfTimeError:
        rows.append(ComparisonRow(baseline.name, baseline.accountings[-1], devices=problem.num_ranks,
                                  note="left out: not measured within its share of the time limit; give a longer one"))
    return longest


def _choose(names: Sequence[str] | None) -> set[str]:
    known = [*(baseline.name for baseline in BASELINES), PLANNED]
    if names is None:
        return set(known)
    by_folded = {folded_name(name): name for name in known}
    unknown = [name for name in names if folded_name(name) not in by_folded]
    if unknown:
        raise InputError(f"schedule {unknown[0]!r}: unknown; expected some of {', '.join(known)}")
    return {by_folded[folded_name(name)] for name in names}


def planned_row(problem: PlanningProblem, options: PlanOptions, rows: Sequence[ComparisonRow],
                tell: Callable[[str], None]) -> ComparisonRow:
    """The planner's row: its plan, bound and gap, and what the planner found without published schedules as starts.

    The planner first works without them. Only if one of ``rows`` within the same caps is better does it start from
    published schedules, in what is left of the time, a fifth. Either way the row is never worse than them: the best of
    them within the caps is the planner's too. Both solves together keep ``options.time_limit_s``.
    """
    with counting() as ledger:
        row = _planned_row(problem, options, rows, tell)
    return row if row.how is None else dataclasses.replace(row, how=dataclasses.replace(row.how, highs=ledger.rows()))


def _planned_row(problem: PlanningProblem, options: PlanOptions, rows: Sequence[ComparisonRow],
                 tell: Callable[[str], None]) -> ComparisonRow:
    """The row of `planned_row`, with the calls of HiGHS in the winner's solve alone."""
    began = time.monotonic()
    kept = SHARES.restarted * options.time_limit_s
    alone = dataclasses.replace(options, time_limit_s=options.time_limit_s - kept, use_baselines=False)
    first = plan(problem, alone, lambda state: tell(f"{PLANNED}, {state.phase}, {state.seconds:.0f} s"))
    results = [first]
    own = units_or_none(first.makespan_ns, problem)
    known = [row for row in rows if options.use_baselines and _within_caps(row, problem)
             and options.placement in ("free", row.placement)]
    best = min(known, key=_makespan, default=None)
    better = best is not None and (own is None or _makespan(best) < own)
    left = options.time_limit_s - (time.monotonic() - began)
    useful = left > (0.5 * kept if first.plan is not None else alone.time_limit_s)
    if better and first.termination is not Termination.INTERRUPTED and useful:
        results.append(plan(problem, dataclasses.replace(options, time_limit_s=left),
                            lambda state: tell(f"{PLANNED}, from published schedules, {state.seconds:.0f} s")))
    seconds = round(time.monotonic() - began, 2)
    result = min(results, key=lambda found: found.makespan_ns or NEVER_NS)
    accounting: Accounting = "streams" if has_streams(problem) else "split"
    if result.plan is not None and not (better and _makespan(best) < in_units(problem, result.makespan_ns or 0)):
        row, rung, how = measured_row(PLANNED, accounting, result.plan), result.rung, result.how
    elif better and best is not None:
        row, rung = dataclasses.replace(best, name=PLANNED, accounting=accounting, note=""), f"published {best.name}"
        how = How((rung,), (rung,))
    else:
        return ComparisonRow(PLANNED, accounting, devices=problem.num_ranks, seconds=seconds,
                             note=f"no plan was found: {result.reason}")
    tightest = max(results, key=lambda found: found.bound_ns or 0)
    lowest = tightest.bound_ns
    how = dataclasses.replace(how, bound="" if lowest is None else tightest.how.bound)
    if lowest is not None and options.placement != "free" and row.plan is not None and row.plan is not result.plan:
        here = placement_bound(view(problem, row.plan.placement))  # its cuts may be others
        if here.ns < lowest:
            lowest, how = here.ns, dataclasses.replace(how, bound=here.what)
    bound = units_or_none(lowest, problem)
    scope = (f"placement {options.placement}" if proposes_all(problem, options.placement) else
             "all placements within the caps")
    return dataclasses.replace(row, bound=bound, gap=gap_of(_makespan(row), bound),
                               bound_scope=None if bound is None else scope, rung=rung, without_baselines=own,
                               seconds=seconds, how=how)


def _makespan(row: ComparisonRow | None) -> float:
    """The makespan of a row that has one."""
    assert row is not None and row.makespan is not None
    return row.makespan


def _within_caps(row: ComparisonRow, problem: PlanningProblem) -> bool:
    """Whether a measured row keeps the problem's limits, so that the planner could have given its plan."""
    if row.measures is None or row.plan is None or row.plan.problem != problem:
        return False
    limits, devices = problem.limits, problem.topology.devices
    for rank in range(problem.num_ranks):
        resident, peak = row.measures.resident_bytes[rank], row.measures.peak_bytes[rank]
        if limits.resident_bytes is not None and resident > limits.resident_bytes:
            return False
        if limits.activation_bytes is not None and peak - resident > limits.activation_bytes:
            return False
        if peak > devices[rank].memory_bytes:
            return False
    return True
