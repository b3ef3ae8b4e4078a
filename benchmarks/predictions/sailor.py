"""Steps and memory of Sailor's artifact (SOSP 2025) by its own measured times of layers on one device.

As ``mipipe plan --layer-times --held``: 1F1B, transfers that hold the compute stream, the reduction of gradients by the
cost model of collectives; and the peak memory. Nothing is fitted. Rows with several kinds of devices are listed, not
built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from predictions.build import Builder
from predictions.cells import listed, measured, read_rows, whole, whole_numbers
from predictions.models import model_of
from predictions.rows import Build
from rich.console import Console
from rich.table import Table

from mipipe.graphs.errors import InputError, MipipeError, shown
from mipipe.graphs.read_files import load_json
from mipipe.graphs.serialize import read_text
from mipipe.planner.problems.from_layers import read_layer_times
from mipipe.planner.teams.prices.degrees import Degrees

MODELS = {"GPT-Neo-2.7B": "GPT-Neo-2.7", "OPT-350M": "OPT-350", "LLAMA-3-8B": "LLAMA-3-8", "OPT-30B": "OPT-30"}
"""Names in the profiles."""

KINDS = {"GH-96": ("gh200", 4), "A100-40": ("a100_40", 4), "A100-80": ("a100", 4), "V100-16": ("v100", 4)}
"""The device kind, and devices on a host."""

SEQ = 2048

COLUMNS = ("file", "model", "layers_per_stage", "dp", "tp", "gpus", "gpu_kinds", "mbs", "gbs", "real_step_s",
           "max_mem_bytes")


@dataclass(frozen=True, slots=True)
class SailorRow:
    """A measured step in seconds and ours, and the peak memory (None: not measured); ``why`` says why there is no
    prediction."""

    plan: str
    model: str
    stages: int
    devices: int
    microbatches: int
    measured: float | None
    predicted: float | None
    measured_bytes: float | None
    predicted_bytes: int | None
    why: str = ""


def sailor(path: Path, profiles: Path, builder: Builder, told: Callable[[str], None]) -> list[SailorRow]:
    """The steps and memory of every row.

    Raises:
        InputError: no table of such rows, or no profiles of any model.
    """
    rows = read_rows(path, COLUMNS)
    known = load_json(read_text(profiles), str(profiles))
    if not isinstance(known, dict) or not known:
        raise InputError(f"{profiles}: found {shown(known)}, expected times of layers by model, device, microbatch and"
                         " tensor degree")
    found = []
    for at, row in enumerate(rows):
        told(f"Sailor's row {at + 1} of {len(rows)}: {row['model']}")
        plan, held = row["file"].removesuffix(".json"), None
        sizes: tuple[int, int, int, float | None] = (0, 0, 0, None)
        try:
            cut, copies, tensor = (whole_numbers(row, name) for name in ("layers_per_stage", "dp", "tp"))
            size, batch, devices = (whole(row, name) for name in ("mbs", "gbs", "gpus"))
            sizes = len(cut), devices, batch // (size * copies[0]), measured(row, "real_step_s")
            held = measured(row, "max_mem_bytes")
            build, kind = _build(row, cut, copies, tensor, size, batch, devices)
            layers = read_layer_times(profiles, MODELS[row["model"]], kind, size, tensor[0])
            result = builder.evaluate(build, measured=layers)
        except MipipeError as error:
            found.append(SailorRow(plan, row["model"], *sizes, None, held, None, str(error)))
            continue
        found.append(SailorRow(plan, row["model"], *sizes, result.seconds, held,
                               max(item.on_device for item in result.memory)))
    return found


def _build(row: Mapping[str, str], cut: Sequence[int], copies: Sequence[int], tensor: Sequence[int], size: int,
           batch: int, devices: int) -> tuple[Build, str]:
    """A row as it is evaluated, and its device's name in the profiles."""
    kinds = listed(row, "gpu_kinds")
    if not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise InputError(f"gpu_kinds: found {row['gpu_kinds']!r}, expected a list of names")
    if len(set(kinds)) > 1 or len(set(tensor)) > 1 or len(set(copies)) > 1:
        raise InputError("several kinds of devices, or degrees by stage")
    if kinds[0] not in KINDS or row["model"] not in MODELS:
        raise InputError(f"{row['model']} on {kinds[0]}: not known here")
    degrees = Degrees(ranks=len(cut), tensor=tensor[0], copies=copies[0], microbatch=size, zero=0)
    if degrees.devices != devices:
        raise InputError(f"gpus: found {devices}, but stages x tp x dp are {degrees.devices}")
    device, per_host = KINDS[kinds[0]]
    inner = (cut[0] - 1, *cut[1:-1], cut[-1] - 1)
    build = Build(model_of(row["model"], "", "", "", SEQ, ""), SEQ, device, devices, min(per_host, devices), "float16",
                  None, fused=True, flash=False, cut=False, overlap=False, scatter=False, degrees=degrees,
                  global_batch=batch, schedule="1F1B", held=True, layers=inner if len(cut) > 1 else None, assumed=())
    return build, kinds[0]


def show_sailor(console: Console, rows: list[SailorRow]) -> None:
    """A table of the rows, and lines of their errors and ranks."""
    table = Table(title="Sailor (SOSP 2025): measured steps, and predicted from its profiles of layers")
    for name in ("plan", "model", "stages", "devices", "microbatches", "measured s", "predicted", "ratio", "GB",
                 "predicted", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.predicted is not None and row.predicted_bytes is not None:
            table.add_row(_short(row.plan), row.model, *map(str, (row.stages, row.devices, row.microbatches)),
                          *_beside(row.measured, row.predicted, 1, 3), *_beside(row.measured_bytes, row.predicted_bytes,
                                                                               1e9, 2))
    built = [row for row in rows if row.predicted is not None]
    if built:
        console.print(table)
    for row in rows:
        if row.predicted is None:
            console.print(f"not built: {row.plan} ({row.model}): {row.why}", soft_wrap=True, markup=False)
    if not built:
        console.print(f"none of {len(rows)} rows built")
        return
    piped = [row for row in built if row.stages > 1 and row.microbatches > 1]
    errors = [row.predicted / row.measured - 1 for row in piped if row.predicted is not None and row.measured]
    if errors:
        console.print(f"{len(errors)} rows with a pipeline and more than one microbatch: mean error"
                  f" {sum(map(abs, errors)) / len(errors):.1%}, bias {sum(errors) / len(errors):+.1%}; {len(built)} of"
                  f" {len(rows)} rows built")
    off = [row.predicted_bytes / row.measured_bytes - 1 for row in built
           if row.predicted_bytes is not None and row.measured_bytes]
    if off:
        console.print(f"peak memory of {len(off)} rows: mean error {sum(map(abs, off)) / len(off):.1%}, bias"
                      f" {sum(off) / len(off):+.1%}")
    groups: dict[tuple[str, int], list[SailorRow]] = {}
    for row in built:
        if row.measured:
            groups.setdefault((row.model, row.devices), []).append(row)
    pairs = [(one, two) for own in groups.values() for n, one in enumerate(own) for two in own[n + 1:]]
    right = sum(((one.measured or 0) < (two.measured or 0)) == ((one.predicted or 0) < (two.predicted or 0))
                for one, two in pairs)
    console.print(f"pairs of plans for the same model and devices ranked as measured: {right} of {len(pairs)}")


def _short(plan: str) -> str:
    """A plan's machine and number: of ``clariden/GPT-NEO/N16/plan_config_N16_D4`` its first and last part."""
    parts = plan.split("/")
    return "/".join((parts[0], parts[-1].removeprefix("plan_config_"))) if len(parts) > 1 else plan


def _beside(measured: float | None, predicted: float, unit: float, digits: int) -> tuple[str, str, str]:
    """Cells of a measurement (empty where there is none), a prediction and their ratio."""
    own = f"{predicted / unit:.{digits}f}"
    return (f"{measured / unit:.{digits}f}", own, f"{predicted / measured:.3f}") if measured else ("", own, "")
