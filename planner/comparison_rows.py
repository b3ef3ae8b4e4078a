"""A schedule's row in a comparison, counted in its stated way.

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
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.serialize import to_data
from mipipe.planner.actions import Stream
from mipipe.planner.execution.measure import Measures, measure
from mipipe.planner.execution.quick_timeline import timeline_of
from mipipe.planner.execution.steps import quick_period
from mipipe.planner.how import How
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import in_activations, in_copies, in_units
from mipipe.planner.schedules import INTERLEAVED, Baseline, merge_streams
from mipipe.planner.timeline import Timeline

Accounting = Literal["published", "indivisible", "split", "streams"]
MEGATRON = ("Megatron-LM's order, which takes about as many transfers as there are ranks longer than the 1F1B-I of the"
            " zero-bubble paper's tables")
"""Said of interleaved 1F1B where transfers take time."""


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


def baseline_rows(problem: PlanningProblem, baseline: Baseline) -> Iterator[ComparisonRow]:
    """A published schedule in all its accountings; one row with a note where it does not exist for this size.

    Stages have equally many layers, as in the papers; where stages of about equal time give a shorter makespan (uneven
    models), such a row follows.
    """
    closed = baseline.published(problem)
    if closed is not None:
        yield ComparisonRow(baseline.name, "published", bubble=closed, devices=problem.num_ranks)
    for accounting in (*baseline.accountings, *(("streams",) if has_streams(problem) else ())):
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
    return ComparisonRow(name, accounting, makespan=in_units(problem, took.makespan_ns),
                         period=units_or_none(quick_period(found), problem),
                         bubble=in_units(problem, max(bubbles)),
                         bubble_mean=in_units(problem, Fraction(sum(bubbles), len(bubbles))), bubble_ratio=ratio,
                         devices=problem.num_ranks, parameter_copies=in_copies(problem, max(took.resident_bytes)),
                         peak_activations=in_activations(problem, activations), placement=found.placement.name,
                         plan=found, measures=took)


def has_streams(problem: PlanningProblem) -> bool:
    """Whether some groups run on the collective stream."""
    return any(group.stream is Stream.COLLECTIVE for group in problem.groups)


def units_or_none(time_ns: int | None, problem: PlanningProblem) -> float | None:
    return None if time_ns is None else in_units(problem, time_ns)
