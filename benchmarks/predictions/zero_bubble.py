"""The zero-bubble paper's bubble rates and steps from its measured phases (arXiv 2401.10241, tables 3 to 6).

Printed rates are simulated ones of equal stages whose transfers run beside the compute; measured steps come from
Megatron-LM, whose transfers hold the compute stream (`mipipe.planner.problems.held_transfers`). Both are predicted by
the product's own schedules and simulator, and nothing is fitted. Left out of the prediction: the optimizer, the
embedding and the head, overheads of launching.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from predictions.cells import number, read_rows, whole
from rich.console import Console
from rich.table import Table

from mipipe.graphs.errors import InputError, MipipeError
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.held_transfers import hold_transfers
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES

RATES = ("1F1B", "ZB-H1")
"""Schedules whose printed bubble rates are those of a whole step."""

STEPS = (("1F1B", "1F1B"), ("ZB-H1", "ZB-1p"))
"""Schedules whose steps were measured: ours, and the name of the column (ZB-1p's printed rates are ZB-H1's)."""

COLUMNS = ("p", "m", "model", "micro_batch", "T_F", "T_B", "T_W", "T_comm", *(f"bubble_{name}" for name in RATES),
           *(f"samples_s_gpu_{column}" for _, column in STEPS))
"""What is read of a row; times in ms."""

MOST = 200_000
"""Microbatches on all ranks together that a row may have."""


@dataclass(frozen=True, slots=True)
class RateRow:
    """A printed bubble rate and ours."""

    model: str
    ranks: int
    microbatches: int
    schedule: str
    printed: float
    simulated: float


@dataclass(frozen=True, slots=True)
class StepRow:
    """A measured step in ms, and ours with transfers beside the compute and in its stream."""

    model: str
    ranks: int
    microbatches: int
    schedule: str
    measured: float
    beside: float
    held: float


def zero_bubble(path: Path) -> tuple[list[RateRow], list[StepRow], list[str]]:
    """Bubble rates and steps of every row; and of those that cannot be built why not."""
    rates, steps, left = [], [], []
    for at, row in enumerate(read_rows(path, COLUMNS)):
        try:
            own_rates, own_steps = _row(row)
        except MipipeError as error:
            left.append(f"row {at + 1} ({row['model']}): {error}")
            continue
        rates += own_rates
        steps += own_steps
    return rates, steps, left


def _row(row: Mapping[str, str]) -> tuple[list[RateRow], list[StepRow]]:
    ranks, count, size = (whole(row, name) for name in ("p", "m", "micro_batch"))
    if ranks * count > MOST:
        raise InputError(f"p x m: found {ranks} x {count}, expected at most {MOST:,} together")
    work = sum(number(row, name) for name in ("T_F", "T_B", "T_W"))
    problem = uniform_problem(ranks=ranks, microbatches=count, f=row["T_F"], i=row["T_B"], w=row["T_W"],
                              comm=row["T_comm"], layers=ranks, copies=1, activations=ranks)
    plans = {name: _plan(problem, name) for name, _ in STEPS}
    ms = {name: _ms(plan) for name, plan in plans.items()}
    rates = [RateRow(row["model"], ranks, count, name, number(row, f"bubble_{name}"),
                     round(1 - count * work / ms[name], 4)) for name in RATES if row[f"bubble_{name}"]]
    steps = [StepRow(row["model"], ranks, count, name,
                     count * size / (number(row, f"samples_s_gpu_{column}") * ranks) * 1e3, ms[name],
                     _ms(_plan(hold_transfers(problem), name))) for name, column in STEPS
             if row[f"samples_s_gpu_{column}"]]
    return rates, steps


def _plan(problem: PlanningProblem, name: str) -> Plan:
    baseline = next(baseline for baseline in BASELINES if baseline.name == name)
    return baseline.plan(problem, split=name != "1F1B")


def _ms(plan: Plan) -> float:
    assert plan.makespan_ns is not None
    return plan.makespan_ns / plan.problem.unit_ns


def show_zero_bubble(console: Console, rates: list[RateRow], steps: list[StepRow], left: list[str]) -> None:
    """Tables of rates and steps, and lines of their errors."""
    table = Table(title="Bubble rates: printed in arXiv 2401.10241, and simulated")
    for name in ("model", "ranks", "microbatches", "schedule", "printed", "simulated"):
        table.add_column(name, justify="right")
    for row in rates:
        table.add_row(row.model, str(row.ranks), str(row.microbatches), row.schedule, f"{row.printed:.4f}",
                      f"{row.simulated:.4f}")
    console.print(table)
    equal = sum(row.printed == row.simulated for row in rates)
    console.print(f"equal to all four decimals: {equal} of {len(rates)}")
    table = Table(title="Steps: measured with Megatron-LM on A100, and predicted (ratio to measured)")
    for name in ("model", "ranks", "microbatches", "schedule", "measured ms", "beside the compute", "held"):
        table.add_column(name, justify="right")
    for step in steps:
        table.add_row(step.model, str(step.ranks), str(step.microbatches), step.schedule, f"{step.measured:.1f}",
                      f"{step.beside / step.measured:.3f}", f"{step.held / step.measured:.3f}")
    console.print(table)
    for name, _ in STEPS:
        own = [step for step in steps if step.schedule == name]
        if not own:
            continue
        beside, held = (sum(abs(getattr(step, kind) / step.measured - 1) for step in own) / len(own)
                        for kind in ("beside", "held"))
        console.print(f"{name}: mean error {beside:.1%} with transfers beside the compute, {held:.1%} with transfers"
                      " that hold it")
    for line in left:
        console.print(f"not built: {line}", soft_wrap=True, markup=False)
