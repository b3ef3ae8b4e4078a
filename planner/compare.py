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
over devices. Times are in the problem's unit. A schedule that does not exist for a size has a row that says so.

The gradient reduction between copies costs what the problem says; closed forms leave it out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from mipipe.graphs.errors import InputError, ProblemError
from mipipe.planner.actions import Stream
from mipipe.planner.lower import lower
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.schedules import BASELINES, Baseline, merge_streams
from mipipe.planner.simulate import simulate
from mipipe.planner.solve import Termination, plan
from mipipe.planner.timeline import Timeline
from mipipe.planner.uniform import in_activations, in_copies

Accounting = Literal["published", "indivisible", "split", "streams"]
PLANNED = "mipipe"
"""The name of the planned row."""
RESERVE = 0.2
"""Share of the time limit kept for a second solve from published schedules, in case one of them is better."""


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule in one accounting (module docstring). What does not apply is None; ``note`` says why."""

    name: str
    accounting: Accounting
    makespan: float | None = None
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
    seconds: float | None = None
    note: str = ""
    timeline: Timeline | None = None
    plan: Plan | None = None

    def data(self) -> dict[str, Any]:
        """The row as JSON data, without its timeline and plan; whole numbers as integers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                  if field.name not in ("timeline", "plan")}
        return {name: int(value) if isinstance(value, float) and value.is_integer() and name != "seconds" else value
                for name, value in fields.items()}


def compare(problem: PlanningProblem, names: Sequence[str] | None = None, options: PlanOptions | None = None,
            on_progress: Callable[[str], None] | None = None) -> list[Row]:
    """The rows of the named schedules (default: all, the planned one last) on a problem.

    ``options`` steer the planned row; ``on_progress`` is told what is being worked on.

    Raises:
        InputError: an unknown name.
        InfeasibleError: the planner proved that no plan fits the caps (only when it is the only row asked for).
    """
    chosen = _choose(names)
    tell = on_progress or (lambda text: None)
    rows: list[Row] = []
    for baseline in BASELINES:
        if baseline.name in chosen:
            tell(baseline.name)
            rows += baseline_rows(problem, baseline)
    if PLANNED in chosen:
        rows.append(planned_row(problem, options or PlanOptions(), rows, tell))
    return rows


def _choose(names: Sequence[str] | None) -> set[str]:
    known = [*(baseline.name for baseline in BASELINES), PLANNED]
    if names is None:
        return set(known)
    by_folded = {_folded(name): name for name in known}
    unknown = [name for name in names if _folded(name) not in by_folded]
    if unknown:
        raise InputError(f"schedule {unknown[0]!r}: unknown; expected some of {', '.join(known)}")
    return {by_folded[_folded(name)] for name in names}


def _folded(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def baseline_rows(problem: PlanningProblem, baseline: Baseline) -> Iterator[Row]:
    """A published schedule in all its accountings; one row with a note where it does not exist for this size.

    Stages have equally many layers, as in the papers; where stages of about equal time give a shorter makespan (uneven
    models), such a row follows.
    """
    closed = baseline.published(problem)
    if closed is not None:
        yield Row(baseline.name, "published", bubble=closed, devices=problem.num_ranks)
    for accounting in (*baseline.accountings, *(("streams",) if _has_streams(problem) else ())):
        given = merge_streams(problem) if accounting == "split" else problem
        split = accounting != "indivisible"
        try:
            row = measured_row(baseline.name, accounting, baseline.plan(given, split=split))
            yield row
            balanced = measured_row(baseline.name, accounting, baseline.plan(given, split=split, cut="balanced"))
        except ProblemError as error:
            yield Row(baseline.name, accounting, devices=problem.num_ranks, note=str(error))
            return
        if balanced.makespan < row.makespan:  # type: ignore[operator]
            yield dataclasses.replace(balanced, note="stages cut by time")


def measured_row(name: str, accounting: Accounting, found: Plan) -> Row:
    """The row of a plan: lowered, simulated, measured."""
    problem = found.problem
    timeline = simulate(found, lower(found))
    unit = problem.unit_ns
    bubbles = timeline.bubbles_ns()
    activations = max(timeline.peak_bytes(rank) - timeline.resident_bytes[rank] for rank in range(problem.num_ranks))
    return Row(name, accounting, makespan=_in_units(timeline.makespan_ns, unit), bubble=_in_units(max(bubbles), unit),
               bubble_mean=_in_units(Fraction(sum(bubbles), len(bubbles)), unit), bubble_ratio=timeline.bubble_ratio,
               devices=problem.num_ranks, parameter_copies=in_copies(problem, max(timeline.resident_bytes)),
               peak_activations=in_activations(problem, activations), placement=found.placement.name,
               timeline=timeline, plan=found)


def planned_row(problem: PlanningProblem, options: PlanOptions, rows: Sequence[Row],
                tell: Callable[[str], None]) -> Row:
    """The planner's row: its plan, bound and gap, and what the planner found without published schedules as starts.

    The planner first works without them; only if one of ``rows`` within the same caps is better does it start from
    published schedules, in the last fifth of the time, so that it is never worse than what is already known.
    """
    began = time.monotonic()
    accounting: Accounting = "streams" if _has_streams(problem) else "split"
    alone = dataclasses.replace(options, time_limit_s=(1 - RESERVE) * options.time_limit_s, use_baselines=False)
    result = first = plan(problem, alone, lambda state: tell(f"{PLANNED}, {state.phase}, {state.seconds:.0f} s"))
    known = [row.makespan for row in rows if row.makespan is not None and _within_caps(row, problem)]
    best = min(known, default=None)
    own = None if first.makespan_ns is None else _in_units(first.makespan_ns, problem.unit_ns)
    interrupted = first.termination is Termination.INTERRUPTED
    if options.use_baselines and not interrupted and best is not None and (own is None or best < own):
        left = max(options.time_limit_s - (time.monotonic() - began), RESERVE * options.time_limit_s)
        again = plan(problem, dataclasses.replace(options, time_limit_s=left),
                     lambda state: tell(f"{PLANNED}, from published schedules, {state.seconds:.0f} s"))
        if again.makespan_ns is not None and (first.makespan_ns is None or again.makespan_ns < first.makespan_ns):
            result = again
    seconds = round(time.monotonic() - began, 2)
    if result.plan is None:
        return Row(PLANNED, accounting, devices=problem.num_ranks, seconds=seconds,
                   note=f"{result.termination.value}: {result.reason}")
    row = measured_row(PLANNED, accounting, result.plan)
    bound = max((found.bound_ns for found in (first, result) if found.bound_ns is not None), default=None)
    scope = "all placements within the caps" if options.placement == "free" else f"placement {options.placement}"
    return dataclasses.replace(
        row, bound=None if bound is None else _in_units(bound, problem.unit_ns),
        gap=None if not bound or result.makespan_ns is None else result.makespan_ns / bound - 1, bound_scope=scope,
        rung=result.rung, without_baselines=own, seconds=seconds)


def _within_caps(row: Row, problem: PlanningProblem) -> bool:
    """Whether a measured row keeps the problem's limits, so that the planner could have given its plan."""
    if row.makespan is None or row.timeline is None or row.accounting == "indivisible":
        return False
    limits, devices = problem.limits, problem.topology.devices
    for rank in range(problem.num_ranks):
        resident, peak = row.timeline.resident_bytes[rank], row.timeline.peak_bytes(rank)
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


def _in_units(time_ns: int | Fraction, unit_ns: int) -> float:
    return float(Fraction(time_ns) / unit_ns)
