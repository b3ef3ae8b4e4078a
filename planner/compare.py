"""Published schedules and planned ones on one problem, each counted in its stated way.

A row is a schedule in one accounting:

- ``published``: the closed form of the schedule's paper, under its own assumptions; a bubble and nothing else.
- ``indivisible``: the schedule's own actions as blocks: B is I and W without a gap, an overlapped F&B is one action
  with the problem's overlapped duration, as DualPipe's authors count.
- ``split``: the same order with every block split into F, I and W.
- ``streams``: the same order on a problem whose all-to-alls run on a stream of their own.

All but the published rows are lowered, simulated and measured alike: ``bubble`` is the largest over devices of
makespan minus busy compute time, ``parameter_copies`` a device's parameters in even shares of the model,
``peak_activations`` its activations in units of one even stage's activation of one microbatch; both are the largest
over devices; ``period`` is the time from step to step where no barrier parts them (`mipipe.planner.execution.steps`;
None for very large plans). Times are in the problem's unit. A schedule that does not exist for a size has a row that
says so.

The gradient reduction between copies costs what the problem says; closed forms leave it out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from mipipe.graphs.errors import InputError, ProblemError
from mipipe.graphs.serialize import to_data
from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.calls import counting
from mipipe.planner.execution.measure import Measures, measure
from mipipe.planner.execution.quick_timeline import timeline_of
from mipipe.planner.execution.steps import quick_period
from mipipe.planner.how import How
from mipipe.planner.jobs.stages import view
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_activations, in_copies
from mipipe.planner.schedules import BASELINES, INTERLEAVED, Baseline, merge_streams, with_chunks
from mipipe.planner.schedules.one_f_one_b import CHUNKS
from mipipe.planner.solve import Termination, plan
from mipipe.planner.timeline import Timeline

Accounting = Literal["published", "indivisible", "split", "streams"]
PLANNED = "mipipe"
"""The name of the planned row."""
MEGATRON = ("Megatron-LM's order, which takes about as many transfers as there are ranks longer than the 1F1B-I of the"
            " zero-bubble paper's tables")
"""Said of interleaved 1F1B where transfers take time."""
RESERVE = 0.2
"""Share of the time limit kept for a second solve from published schedules, in case one of them is better."""


PUBLISHED, SPARE = 0.5, 0.1
"""Shares of the time limit that published schedules have where the planned row follows, and what of it they may take
without the planned row having less: a limit holds within a tenth."""


@dataclass(frozen=True)
class ComparisonRow:
    """One schedule in one accounting (module docstring). What does not apply is None; ``note`` says why."""

    name: str
    accounting: Accounting
    makespan: float | None = None
    period: float | None = None
    bubble: float | None = None
    bubble_mean: float | None = None
    bubble_ratio: float | None = None
    devices: int = 0
    parameter_copies: float | None = None
    peak_activations: float | None = None
    placement: str | None = None
    bound: float | None = None
    gap: float | None = None
    bound_scope: str | None = None
    rung: str | None = None
    without_baselines: float | None = None
    how: How | None = None
    seconds: float | None = None
    note: str = ""
    plan: Plan | None = None
    measures: Measures | None = None

    @cached_property
    def timeline(self) -> Timeline | None:
        """The simulated timeline, made when it is first asked for; None without a plan."""
        return None if self.plan is None else timeline_of(self.plan)

    def data(self) -> dict[str, Any]:
        """The row as JSON data, without its plan; whole numbers as integers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                  if field.name not in ("plan", "measures", "how")}
        fields["how"] = None if self.how is None else to_data(self.how)
        return {name: int(value) if isinstance(value, float) and value.is_integer() and name != "seconds" else value
                for name, value in fields.items()}


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
    limit = options.time_limit_s
    share = PUBLISHED if PLANNED in chosen else 1.0
    rows: list[ComparisonRow] = []
    longest = 0.0
    for baseline in with_chunks(chunks):
        if baseline.name in chosen:
            tell(baseline.name)
            longest = _rows_in_time(problem, baseline, lambda: share * limit - (time.monotonic() - began), rows,
                                    longest)
    if PLANNED in chosen:
        late = max(0.0, time.monotonic() - began - SPARE * limit)
        ours = dataclasses.replace(options, time_limit_s=max(SPARE * limit, limit - late))
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
    by_folded = {_folded(name): name for name in known}
    unknown = [name for name in names if _folded(name) not in by_folded]
    if unknown:
        raise InputError(f"schedule {unknown[0]!r}: unknown; expected some of {', '.join(known)}")
    return {by_folded[_folded(name)] for name in names}


def baseline_named(name: str) -> Baseline:
    """The published schedule of a name, whatever its case and hyphens (``zb-h1``, ``interleaved``).

    Raises:
        InputError: there is none.
    """
    known = {_folded(baseline.name): baseline for baseline in BASELINES}
    known["interleaved"] = known[_folded("Interleaved 1F1B")]
    if _folded(name) not in known:
        raise InputError(f"schedule {name!r}: unknown; expected one of"
                         f" {', '.join(baseline.name for baseline in BASELINES)}")
    return known[_folded(name)]


def _folded(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def baseline_rows(problem: PlanningProblem, baseline: Baseline) -> Iterator[ComparisonRow]:
    """A published schedule in all its accountings; one row with a note where it does not exist for this size.

    Stages have equally many layers, as in the papers; where stages of about equal time give a shorter makespan (uneven
    models), such a row follows.
    """
    closed = baseline.published(problem)
    if closed is not None:
        yield ComparisonRow(baseline.name, "published", bubble=closed, devices=problem.num_ranks)
    for accounting in (*baseline.accountings, *(("streams",) if _has_streams(problem) else ())):
        given = merge_streams(problem) if accounting == "split" else problem
        split = accounting != "indivisible"
        try:
            row = dataclasses.replace(measured_row(baseline.name, accounting, baseline.plan(given, split=split)),
                                      note=MEGATRON if baseline.name == INTERLEAVED and _moves(problem) else "")
            yield row
            balanced = measured_row(baseline.name, accounting, baseline.plan(given, split=split, cut="balanced"))
        except ProblemError as error:
            yield ComparisonRow(baseline.name, accounting, devices=problem.num_ranks, note=str(error))
            return
        if balanced.makespan < row.makespan:  # type: ignore[operator]
            yield dataclasses.replace(balanced, note="stages cut by time")


def _moves(problem: PlanningProblem) -> bool:
    """Whether a transfer between two ranks takes time."""
    size = max((edge.num_bytes for edge in problem.edges), default=0)
    return problem.num_ranks > 1 and problem.topology.transfer_ns(0, 1, size) > 0


def measured_row(name: str, accounting: Accounting, found: Plan) -> ComparisonRow:
    """The row of a plan."""
    problem = found.problem
    took = measure(found)
    bubbles = [took.makespan_ns - busy for busy in took.busy_ns]
    activations = max(peak - held for peak, held in zip(took.peak_bytes, took.resident_bytes, strict=True))
    ratio = sum(bubbles) / (problem.num_ranks * took.makespan_ns) if took.makespan_ns else 0.0
    return ComparisonRow(name, accounting, makespan=_in_units(took.makespan_ns, problem),
                         period=_units_or_none(quick_period(found), problem),
                         bubble=_in_units(max(bubbles), problem),
                         bubble_mean=_in_units(Fraction(sum(bubbles), len(bubbles)), problem), bubble_ratio=ratio,
                         devices=problem.num_ranks, parameter_copies=in_copies(problem, max(took.resident_bytes)),
                         peak_activations=in_activations(problem, activations), placement=found.placement.name,
                         plan=found, measures=took)


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
    alone = dataclasses.replace(options, time_limit_s=(1 - RESERVE) * options.time_limit_s, use_baselines=False)
    first = plan(problem, alone, lambda state: tell(f"{PLANNED}, {state.phase}, {state.seconds:.0f} s"))
    results = [first]
    own = _units_or_none(first.makespan_ns, problem)
    known = [row for row in rows if options.use_baselines and _within_caps(row, problem)
             and options.placement in ("free", row.placement)]
    best = min(known, key=_makespan, default=None)
    better = best is not None and (own is None or _makespan(best) < own)
    left = options.time_limit_s - (time.monotonic() - began)
    useful = left > (0.5 * RESERVE * options.time_limit_s if first.plan is not None else alone.time_limit_s)
    if better and first.termination is not Termination.INTERRUPTED and useful:
        results.append(plan(problem, dataclasses.replace(options, time_limit_s=left),
                            lambda state: tell(f"{PLANNED}, from published schedules, {state.seconds:.0f} s")))
    seconds = round(time.monotonic() - began, 2)
    result = min(results, key=lambda found: found.makespan_ns or 1 << 62)
    accounting: Accounting = "streams" if _has_streams(problem) else "split"
    if result.plan is not None and not (better and _makespan(best) < _in_units(result.makespan_ns or 0, problem)):
        row, rung, how = measured_row(PLANNED, accounting, result.plan), result.rung, result.how
    elif better and best is not None:
        row, rung = dataclasses.replace(best, name=PLANNED, accounting=accounting, note=""), f"published {best.name}"
        how = How((rung,), (rung,))
    else:
        return ComparisonRow(PLANNED, accounting, devices=problem.num_ranks, seconds=seconds,
                             note=f"{result.termination.value}: {result.reason}")
    tightest = max(results, key=lambda found: found.bound_ns or 0)
    lowest = tightest.bound_ns
    how = dataclasses.replace(how, bound="" if lowest is None else tightest.how.bound)
    if lowest is not None and options.placement != "free" and row.plan is not None and row.plan is not result.plan:
        here = placement_bound(view(problem, row.plan.placement))  # its cuts may be others
        if here.ns < lowest:
            lowest, how = here.ns, dataclasses.replace(how, bound=here.what)
    bound = _units_or_none(lowest, problem)
    scope = "all placements within the caps" if options.placement == "free" else f"placement {options.placement}"
    return dataclasses.replace(row, bound=bound, gap=None if not bound else _makespan(row) / bound - 1,
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


def _has_streams(problem: PlanningProblem) -> bool:
    """Whether some groups run on the collective stream."""
    return any(group.stream is Stream.COLLECTIVE for group in problem.groups)


def _in_units(time_ns: int | Fraction, problem: PlanningProblem) -> float:
    return float(Fraction(time_ns) / problem.unit_ns)


def _units_or_none(time_ns: int | None, problem: PlanningProblem) -> float | None:
    return None if time_ns is None else _in_units(time_ns, problem)
