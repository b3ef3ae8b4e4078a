"""Predictions beside what others measured and published.

    python benchmarks/published.py --runs runs.csv
    python benchmarks/published.py --zero-bubble zero_bubble.csv --sailor sailor.csv --profiles profiles.json [--json]

``--runs``: every row is built as `benchmarks/published_runs.py` says (the model captured on the meta device, degrees,
schedule, recomputation and precision as given, costs of the shipped device kinds, the simulator) and reported as
`benchmarks/published_report.py` says; a second run finds the captures kept. Rows that cannot be built are listed with
the reason.

``--zero-bubble``: rows of arXiv 2401.10241, tables 3 to 6 (columns p, m, micro_batch, T_F, T_B, T_W, T_comm in ms, the
printed bubble rates and measured samples per second and GPU). Printed rates are simulated ones of equal stages whose
transfers run beside the compute; measured steps come from Megatron-LM, whose transfers hold the compute stream
(`mipipe.planner.problems.held_transfers`). Both are predicted by the product's own schedules and simulator, and nothing
is fitted. Left out of the prediction: the optimizer, the embedding and the head, overheads of launching.

``--sailor`` and ``--profiles``: steps of Sailor's artifact (SOSP 2025) by its own measured times of layers on one
device (as ``mipipe plan --layer-times --held``): 1F1B, transfers that hold the compute stream, the reduction of
gradients by the cost model of collectives; and the peak memory. Nothing is fitted. Rows with several kinds of devices
are listed, not built.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from published_models import model_of
from published_plot import draw
from published_report import predict, show, summary
from published_runs import Build, Builder, read_runs
from rich.console import Console
from rich.table import Table

from mipipe.graphs.errors import InputError, MipipeError
from mipipe.planner.plan import Plan
from mipipe.planner.problems.from_layers import read_layer_times
from mipipe.planner.problems.held_transfers import hold_transfers
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.teams.degrees import Degrees

RATES = ("1F1B", "ZB-H1")
"""Schedules whose printed bubble rates are those of a whole step."""

STEPS = (("1F1B", "1F1B"), ("ZB-H1", "ZB-1p"))
"""Schedules whose steps were measured: ours, and the name of the column (ZB-1p's printed rates are ZB-H1's)."""


SAILOR_MODELS = {"GPT-Neo-2.7B": "GPT-Neo-2.7", "OPT-350M": "OPT-350"}
"""Names in the profiles."""

SAILOR_KINDS = {"GH-96": ("gh200", 4)}
"""The device kind, and devices on a host."""

SAILOR_SEQ = 2048


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


@dataclass(frozen=True, slots=True)
class SailorRow:
    """A measured step in seconds and ours; ``why`` says why there is none."""

    plan: str
    model: str
    stages: int
    devices: int
    microbatches: int
    measured: float
    predicted: float | None
    measured_bytes: float
    predicted_bytes: int | None
    why: str = ""


def zero_bubble(path: Path) -> tuple[list[RateRow], list[StepRow]]:
    """Bubble rates and steps of every row."""
    rates, steps = [], []
    for row in _rows(path, "p", "m", "model", "micro_batch", "T_F", "T_B", "T_W", "T_comm",
                     *(f"bubble_{name}" for name in RATES), *(f"samples_s_gpu_{column}" for _, column in STEPS)):
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


def sailor(path: Path, profiles: Path, builder: Builder) -> list[SailorRow]:
    """The steps and memory of every row."""
    found = []
    for row in _rows(path, "file", "model", "layers_per_stage", "dp", "tp", "gpus", "gpu_kinds", "mbs", "gbs",
                     "real_step_s", "grad_allreduce_s", "max_mem_bytes"):
        kinds, cut, copies = (json.loads(row[name]) for name in ("gpu_kinds", "layers_per_stage", "dp"))
        size, tensor = int(row["mbs"]), json.loads(row["tp"])
        facts = (row["file"].removesuffix(".json"), row["model"], len(cut), int(row["gpus"]),
                 int(row["gbs"]) // (size * copies[0]), float(row["real_step_s"]))
        try:
            if len(kinds) > 1 or len(set(tensor)) > 1 or len(set(copies)) > 1:
                raise InputError("several kinds of devices, or degrees by stage")
            if kinds[0] not in SAILOR_KINDS or row["model"] not in SAILOR_MODELS:
                raise InputError(f"{row['model']} on {kinds[0]}: not known here")
            name, device = SAILOR_MODELS[row["model"]], SAILOR_KINDS[kinds[0]]
            layers = read_layer_times(profiles, name, kinds[0], size, tensor[0])
            inner = (cut[0] - 1, *cut[1:-1], cut[-1] - 1)
            degrees = Degrees(ranks=len(cut), tensor=tensor[0], copies=copies[0], microbatch=size, zero=0)
            build = Build(model_of(row["model"], "", "", "", SAILOR_SEQ, ""), SAILOR_SEQ, device[0], int(row["gpus"]),
                          device[1], "float16", None, fused=True, flash=False, cut=False, overlap=False, scatter=False,
                          degrees=degrees, global_batch=int(row["gbs"]), schedule="1F1B", held=True,
                          layers=inner if len(cut) > 1 else None, assumed=())
            result = builder.evaluate(build, measured=layers)
        except MipipeError as error:
            found.append(SailorRow(*facts, None, float(row["max_mem_bytes"]), None, str(error)))
            continue
        found.append(SailorRow(*facts, result.seconds, float(row["max_mem_bytes"]),
                               max(item.on_device for item in result.memory)))
    return found


def _plan(problem: object, name: str) -> Plan:
    baseline = next(baseline for baseline in BASELINES if baseline.name == name)
    return baseline.plan(problem, split=name != "1F1B")


def _ms(plan: Plan) -> float:
    assert plan.makespan_ns is not None
    return plan.makespan_ns / plan.problem.unit_ns


def _rows(path: Path, *columns: str) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"{path}: no column {missing[0]!r}; expected the columns {', '.join(columns)}")
    return rows


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


def show_sailor(console: Console, rows: list[SailorRow]) -> None:
    table = Table(title="Sailor (SOSP 2025): measured steps, and predicted from its profiles of layers")
    for name in ("plan", "model", "stages", "devices", "microbatches", "measured s", "predicted", "ratio", "GB",
                 "predicted", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = (row.plan, row.model, *map(str, (row.stages, row.devices, row.microbatches)), f"{row.measured:.3f}")
        held = f"{row.measured_bytes / 1e9:.2f}"
        table.add_row(*cells, *((row.why, "", held) if row.predicted is None or row.predicted_bytes is None else
                                (f"{row.predicted:.3f}", f"{row.predicted / row.measured:.3f}", held,
                                 f"{row.predicted_bytes / 1e9:.2f}",
                                 f"{row.predicted_bytes / row.measured_bytes:.3f}")))
    console.print(table)
    built = [row for row in rows if row.predicted is not None]
    piped = [row for row in built if row.stages > 1 and row.microbatches > 1]
    errors = [row.predicted / row.measured - 1 for row in piped if row.predicted is not None]
    console.print(f"{len(piped)} rows with a pipeline and more than one microbatch: mean error"
                  f" {sum(map(abs, errors)) / len(errors):.1%}, bias {sum(errors) / len(errors):+.1%}; {len(built)} of"
                  f" {len(rows)} rows built")
    off = [row.predicted_bytes / row.measured_bytes - 1 for row in built if row.predicted_bytes is not None]
    console.print(f"peak memory of {len(off)} rows: mean error {sum(map(abs, off)) / len(off):.1%}, bias"
                  f" {sum(off) / len(off):+.1%}")
    groups: dict[tuple[str, int], list[SailorRow]] = {}
    for row in built:
        groups.setdefault((row.model, row.devices), []).append(row)
    pairs = [(one, two) for own in groups.values() for n, one in enumerate(own) for two in own[n + 1:]]
    right = sum((one.measured < two.measured) == ((one.predicted or 0) < (two.predicted or 0)) for one, two in pairs)
    console.print(f"pairs of plans for the same model and devices ranked as measured: {right} of {len(pairs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--zero-bubble", type=Path)
    parser.add_argument("--sailor", type=Path)
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--plot", type=Path, help="with --runs: also draw them as an SVG picture")
    parser.add_argument("--brief", action="store_true", help="with --runs: errors by source, not every row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.runs is None and options.zero_bubble is None and options.sailor is None:
        parser.error("give --runs FILE, --zero-bubble FILE, or --sailor FILE with --profiles FILE")
    if (options.sailor is None) != (options.profiles is None):
        parser.error("--sailor and --profiles go together")
    progress = Console(stderr=True)
    try:
        builder = Builder()
        with progress.status("reading") as status:
            runs, left = ([], []) if options.runs is None else predict(read_runs(options.runs), builder, status.update)
        rates, steps = ([], []) if options.zero_bubble is None else zero_bubble(options.zero_bubble)
        plans = [] if options.sailor is None else sailor(options.sailor, options.profiles, builder)
    except (OSError, ValueError, MipipeError) as error:
        sys.exit(f"published: {error}")
    if options.plot is not None and any(row.measured_tokens_s for row in runs):
        draw(runs, options.plot)
    console = Console(width=140)
    if options.json:
        json.dump({"runs": [asdict(row) for row in runs], "runs_summary": summary(runs, left),
                   "zero_bubble": {"rates": [asdict(row) for row in rates], "steps": [asdict(row) for row in steps]},
                   "sailor": [asdict(row) for row in plans]}, sys.stdout, indent=1)
        return
    if runs or left:
        show(Console(width=130 if options.brief else 200), runs, left, brief=options.brief)
    if rates:
        show_zero_bubble(console, rates, steps)
    if plans:
        show_sailor(console, plans)


if __name__ == "__main__":
    main()
