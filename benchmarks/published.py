"""Predictions beside what others measured and published.

    python benchmarks/published.py --zero-bubble zero_bubble.csv [--json]

``--zero-bubble``: rows of arXiv 2401.10241, tables 3 to 6 (columns p, m, micro_batch, T_F, T_B, T_W, T_comm in ms, the
printed bubble rates and measured samples per second and GPU). Printed rates are simulated ones of equal stages whose
transfers run beside the compute; measured steps come from Megatron-LM, whose transfers hold the compute stream
(`mipipe.planner.problems.held_transfers`). Both are predicted by the product's own schedules and simulator, and nothing
is fitted. Left out of the prediction: the optimizer, the embedding and the head, overheads of launching.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mipipe.graphs.errors import MipipeError
from mipipe.planner.plan import Plan
from mipipe.planner.problems.held_transfers import hold_transfers
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES

RATES = ("1F1B", "ZB-H1")
"""Schedules whose printed bubble rates are those of a whole step."""

STEPS = (("1F1B", "1F1B"), ("ZB-H1", "ZB-1p"))
"""Schedules whose steps were measured: ours, and the name of the column (ZB-1p's printed rates are ZB-H1's)."""


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


def zero_bubble(path: Path) -> tuple[list[RateRow], list[StepRow]]:
    """Bubble rates and steps of every row."""
    rates, steps = [], []
    for row in _rows(path):
        ranks, count = int(row["p"]), int(row["m"])
        work = sum(float(row[name]) for name in ("T_F", "T_B", "T_W"))
        problem = uniform_problem(ranks=ranks, microbatches=count, f=row["T_F"], i=row["T_B"], w=row["T_W"],
                                  comm=row["T_comm"], layers=ranks, copies=1, activations=ranks)
        plans = {name: _plan(problem, name) for name, _ in STEPS}
        ms = {name: _ms(plan) for name, plan in plans.items()}
        for name in RATES:
            rates.append(RateRow(row["model"], ranks, count, name, float(row[f"bubble_{name}"]),
                                 round(1 - count * work / ms[name], 4)))
        for name, column in STEPS:
            measured = count * int(row["micro_batch"]) / (float(row[f"samples_s_gpu_{column}"]) * ranks) * 1e3
            steps.append(StepRow(row["model"], ranks, count, name, measured, ms[name],
                                 _ms(_plan(hold_transfers(problem), name))))
    return rates, steps


def _plan(problem: object, name: str) -> Plan:
    baseline = next(baseline for baseline in BASELINES if baseline.name == name)
    return baseline.plan(problem, split=name != "1F1B")


def _ms(plan: Plan) -> float:
    assert plan.makespan_ns is not None
    return plan.makespan_ns / plan.problem.unit_ns


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def show_zero_bubble(console: Console, rates: list[RateRow], steps: list[StepRow]) -> None:
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
        beside, held = (sum(abs(getattr(step, kind) / step.measured - 1) for step in own) / len(own)
                        for kind in ("beside", "held"))
        console.print(f"{name}: mean error {beside:.1%} with transfers beside the compute, {held:.1%} with transfers"
                      " that hold it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero-bubble", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        rates, steps = zero_bubble(options.zero_bubble)
    except (OSError, KeyError, ValueError, MipipeError) as error:
        sys.exit(f"{options.zero_bubble}: not readable as a table of this kind: {error!r}")
    if options.json:
        json.dump({"zero_bubble": {"rates": [asdict(row) for row in rates], "steps": [asdict(row) for row in steps]}},
                  sys.stdout, indent=1)
    else:
        show_zero_bubble(Console(width=120), rates, steps)


if __name__ == "__main__":
    main()
