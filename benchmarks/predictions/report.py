"""Published runs predicted, and how far off: errors by group, ratios inside a container and machine, ranks, memory.

Absolute steps are compared where a group has one software and machine. Rates of NVIDIA's tables move between versions
of their container, so there two runs of one version and machine are compared by the ratio of their rates. Where one
model was run in several ways on one machine in one version, the best by prediction is compared with the best measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from predictions.build import Builder, measured_step
from predictions.rows import Published, Run
from rich.console import Console
from rich.table import Table

from mipipe.graphs.errors import MipipeError
from mipipe.planner.teams.evaluate import TeamResult

ON_DEVICE = ("sailor_sosp25",)
"""Groups whose memory is the device's, in GB; the others' is the allocator's, in GiB."""


@dataclass(frozen=True)
class Row(Published):
    """A run that was predicted: ``workload`` of a step (sequences x tokens), seconds, tokens/s and TFLOP/s per device,
    GB of the fullest device (None: not measured)."""

    degrees: str
    devices: int
    workload: str
    measured_s: float | None
    predicted_s: float
    measured_tokens_s: float | None
    predicted_tokens_s: float
    predicted_tflops: float
    measured_gb: float | None
    predicted_gb: float
    assumed: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Predicted over measured seconds."""
        return self.predicted_s / (self.measured_s or math.nan)


def predict(runs: Sequence[Run], builder: Builder, told: Callable[[str], None]) -> tuple[list[Row], list[Run]]:
    """Rows of the runs that can be built; the others with why not."""
    rows, left, known = [], [], {}
    for number, run in enumerate(runs):
        told(f"row {number + 1} of {len(runs)}: {run.name} {run.model}")
        build = run.build
        if build is None:
            left.append(run)
            continue
        try:
            if repr(build) not in known:
                known[repr(build)] = builder.evaluate(build)
            measured = measured_step(run, builder)
        except MipipeError as error:
            left.append(Run(**{**{name: getattr(run, name) for name in run.__dataclass_fields__}, "build": None,
                               "why": str(error)}))
            continue
        found, tokens = known[repr(build)], build.global_batch * build.seq / build.devices
        rows.append(Row(run.group, run.name, run.model, run.hardware, run.version, run.precision,
                        f"{build.degrees.text()} microbatch={build.degrees.microbatch} zero={build.degrees.zero}"
                        f" {build.schedule} recompute={build.degrees.recompute}", build.devices,
                        f"{build.global_batch} x {build.seq}", measured,
                        found.seconds, tokens / measured if measured else None, tokens / found.seconds,
                        found.flops / found.seconds / build.devices / 1e12, run.memory_gb,
                        _held(run.group, found), build.assumed))
    return rows, left


def _held(group: str, found: TeamResult) -> float:
    """The fullest device's memory as a group counts it."""
    if group in ON_DEVICE:
        return max(item.on_device for item in found.memory) / 1e9
    return max(item.peak for item in found.memory) / 2 ** 30


def errors(rows: Sequence[Row]) -> dict[str, Any]:
    """By group: rows, mean and greatest relative error of the step, its bias, and the same of memory."""
    found: dict[str, Any] = {}
    for group in dict.fromkeys(row.group for row in rows):
        own = [row.ratio - 1 for row in rows if row.group == group and row.measured_s]
        held = [row.predicted_gb / row.measured_gb - 1 for row in rows if row.group == group and row.measured_gb]
        found[group] = {"steps": len(own), **_spread("step", own), "memories": len(held), **_spread("memory", held)}
    return found


def _spread(name: str, off: Sequence[float]) -> dict[str, float | None]:
    sizes = [abs(item) for item in off]
    return {f"{name}_mean": statistics.fmean(sizes) if off else None, f"{name}_most": max(sizes, default=None),
            f"{name}_bias": statistics.fmean(off) if off else None}


def ratios(rows: Sequence[Row], *, one_model: bool = False) -> list[float]:
    """For every two runs of one version and machine (and model) the relative error of the ratio of their rates."""
    found = []
    for at, one in enumerate(rows):
        for other in rows[at + 1:]:
            same = (one.group, one.version, one.hardware) == (other.group, other.version, other.hardware)
            same = same and (not one_model or one.model == other.model)
            if same and one.measured_s and other.measured_s:
                found.append(abs(math.expm1(abs(math.log(one.ratio / other.ratio)))))
    return found


def bests(rows: Sequence[Row]) -> list[tuple[str, int, float]]:
    """For every model and workload that was run in several ways on the same devices in one version: its name, the ways,
    and by how much the rate of the best by prediction is below the best rate."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.measured_s:
            groups.setdefault(_choice(row), []).append(row)
    found = []
    for key, own in groups.items():
        if len(own) > 1:
            best = max(row.measured_tokens_s or 0.0 for row in own)
            chosen = max(own, key=lambda row: row.predicted_tokens_s)
            found.append((" ".join(key[1:]), len(own), 1 - (chosen.measured_tokens_s or 0.0) / best))
    return found


def _choice(row: Row) -> tuple[str, ...]:
    """What rows have in common that are ways to do the same work on the same machine with the same software."""
    return row.group, row.version, row.model, row.hardware, str(row.devices), row.workload


def ranks(rows: Sequence[Row]) -> tuple[int, int]:
    """How many pairs of ways to run a model on one machine in one version are ranked as measured, of how many."""
    right = total = 0
    for at, one in enumerate(rows):
        for other in rows[at + 1:]:
            if _choice(one) == _choice(other) and one.measured_s and other.measured_s \
                    and one.measured_s != other.measured_s:
                total += 1
                right += ((one.measured_tokens_s or 0) < (other.measured_tokens_s or 0)) == (
                    one.predicted_tokens_s < other.predicted_tokens_s)
    return right, total


def summary(rows: Sequence[Row], left: Sequence[Run]) -> dict[str, Any]:
    """All of the above as data."""
    compared = [row for row in rows if row.group in ("nvidia_megatron_bridge", "torchtitan")]
    own, alike, chosen = ratios(compared), ratios(compared, one_model=True), bests(rows)
    right, total = ranks(rows)
    return {"rows": len(rows), "not_built": [{"id": run.name, "model": run.model, "why": run.why} for run in left],
            "groups": errors(rows), "ratio_pairs": len(own),
            "ratio_error_median": statistics.median(own) if own else None,
            "one_model_pairs": len(alike), "one_model_ratio_error_median": statistics.median(alike) if alike else None,
            "groups_with_a_choice": len(chosen),
            "best_within_3_percent": sum(loss <= 0.03 for _, _, loss in chosen),
            "pairs_ranked_right": right, "pairs_ranked": total}


def show(console: Console, rows: Sequence[Row], left: Sequence[Run], *, brief: bool = False) -> None:
    """Tables of every row (unless ``brief``), of groups, and lines of the rest."""
    if not brief:
        _show_rows(console, rows)
    notes = sorted({note for row in rows for note in row.assumed})
    for note in notes:
        console.print(f"assumed for {sum(note in row.assumed for row in rows)} rows: {note}", soft_wrap=True,
                      markup=False)
    for why, own in _by_reason(left).items():
        console.print(f"not built: {', '.join(own)}: {why}", soft_wrap=True, markup=False)
    data = summary(rows, left)
    table = Table(title="Errors of predicted steps and memory, by where the rows are from")
    for name in ("source", "steps", "mean", "most", "bias", "memories", "mean", "most", "bias"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for group, own in data["groups"].items():
        table.add_row(group, *(_share(own[name]) if "_" in name else str(own[name]) for name in (
            "steps", "step_mean", "step_most", "step_bias", "memories", "memory_mean", "memory_most", "memory_bias")))
    console.print(table)
    if data["ratio_pairs"]:
        console.print(f"ratios of rates within one version and machine: median error {data['ratio_error_median']:.1%}"
                      f" of {data['ratio_pairs']} pairs"
                      + (f", {data['one_model_ratio_error_median']:.1%} of the {data['one_model_pairs']} of one model"
                         if data['one_model_pairs'] else ""), soft_wrap=True)
    console.print(f"best of {data['groups_with_a_choice']} groups of ways to run a model: predicted, or within 3 % of"
                  f" it, in {data['best_within_3_percent']}; pairs ranked as measured: {data['pairs_ranked_right']} of"
                  f" {data['pairs_ranked']}", soft_wrap=True)
    console.print(f"{len(rows)} rows built, {len(left)} not")


def _by_reason(left: Sequence[Run]) -> dict[str, list[str]]:
    """Names of rows by why they were not built."""
    found: dict[str, list[str]] = {}
    for run in left:
        found.setdefault(run.why, []).append(f"{run.name} ({run.model})")
    return found


def _show_rows(console: Console, rows: Sequence[Row]) -> None:
    table = Table(title="Published runs: measured, and predicted")
    for name in ("row", "model", "machine, version", "configuration", "step s", "predicted", "ratio", "tokens/s",
                 "predicted", "TFLOP/s", "GB", "predicted"):
        table.add_column(name, justify="left" if name in ("row", "model", "configuration") else "right",
                         overflow="fold")
    for row in rows:
        table.add_row(row.name, row.model, f"{row.devices} {row.hardware[:24]}, {row.version}",
                      f"{row.degrees} {row.precision}", _cell(row.measured_s), _cell(row.predicted_s),
                      f"{row.ratio:.3f}" if row.measured_s else "", _cell(row.measured_tokens_s),
                      _cell(row.predicted_tokens_s), _cell(row.predicted_tflops), _cell(row.measured_gb),
                      _cell(row.predicted_gb))
    console.print(table)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
