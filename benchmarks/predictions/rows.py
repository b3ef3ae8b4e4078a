"""Rows of published runs as configurations of the product.

A row (the columns of `COLUMNS`) names a model (`predictions/models.py`), a cluster of a shipped device kind, degrees,
schedule, recomputation and precision; `predictions/build.py` evaluates it. What a row does not state is assumed as
`Build.assumed` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from predictions.cells import measured, read_rows, stated, whole
from predictions.models import Model, model_of

from mipipe.graphs.efficiency import LowDtype
from mipipe.graphs.errors import InputError
from mipipe.planner.teams.prices.degrees import Degrees, Recompute

COLUMNS = ("group", "id", "model", "layers", "hidden", "heads", "hardware", "n_gpus", "precision", "seq_len",
           "global_batch", "micro_batch", "tp", "pp", "cp", "vpp", "ep", "dp_or_fsdp", "schedule", "recompute",
           "optimizer_sharding", "layout_or_notes", "meas_tflops_per_gpu", "meas_tokens_per_s_per_gpu",
           "meas_samples_per_s_per_gpu", "meas_step_time_s", "derived_step_time_s", "meas_memory_GB", "date_or_version")
"""What is read of a row."""

HARDWARE: tuple[tuple[str, str, int], ...] = (
    ("gh200", "gh200", 4), ("gb300", "gb300", 64), ("gb200", "gb200", 64), ("b300", "b300", 8), ("b200", "b200", 8),
    ("h100 96gb", "h100_hbm2e", 8), ("h100", "h100", 8), ("h200", "h200", 8), ("h800", "h800", 8),
    ("a100 40gb", "a100_40", 8), ("a100-40", "a100_40", 8), ("a100", "a100", 8),
    ("v100", "v100", 8), ("mi300x", "mi300x", 8))
"""What a row's hardware contains (first match), the device kind, and devices that share a fast link."""

PRECISIONS: tuple[tuple[str, str, LowDtype | None], ...] = (
    ("nvfp4", "bfloat16", "float4"), ("mxfp8", "bfloat16", "float8"), ("fp8", "bfloat16", "float8"),
    ("bf16", "bfloat16", None), ("fp16", "float16", None))
"""What a row's precision contains (first match), the type of parameters, and that of products."""

SCHEDULES = {"1f1b": "1F1B", "interleaved 1f1b": "Interleaved 1F1B", "1f1b-i": "Interleaved 1F1B", "none": "1F1B",
             "interleaved 1f1b + scatter/gather": "Interleaved 1F1B", "zb-1p": "ZB-H1", "zb-2p": "ZB-H2",
             "zb-h1": "ZB-H1", "zb-h2": "ZB-H2", "zb-v": "ZB-V", "gpipe": "GPipe", "dualpipe": "DualPipe",
             "dualpipev": "DualPipeV", "interleaved": "Interleaved 1F1B", "": "1F1B"}


@dataclass(frozen=True)
class Build:
    """A row as it is evaluated. ``fused``, ``flash``, ``cut``, ``overlap``, ``scatter``: as
    of `mipipe.planner.teams.prices.machine.Machine`; ``held`` as of `mipipe.planner.teams.evaluate.evaluate_teams`."""

    model: Model
    seq: int
    kind: str
    devices: int
    per_host: int
    dtype: str
    low: LowDtype | None
    fused: bool
    flash: bool
    cut: bool
    overlap: bool
    scatter: bool
    degrees: Degrees
    global_batch: int
    schedule: str
    held: bool
    layers: tuple[int, ...] | None
    assumed: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """What identifies a published run."""

    group: str
    name: str
    model: str
    hardware: str
    version: str
    precision: str


@dataclass(frozen=True)
class Run(Published):
    """A row: what identifies it, what was measured, and how it is built (or why not)."""

    step_s: float | None
    tflops: float | None
    memory_gb: float | None
    build: Build | None
    why: str = ""

    @property
    def kind(self) -> str:
        """The device kind and what products run in."""
        assert self.build is not None
        return f"{self.build.kind} {self.build.low or '16 bits'}"


def read_runs(path: Path) -> list[Run]:
    """The rows of a file.

    Raises:
        InputError: a column is missing, or there is no row.
    """
    rows = read_rows(path, COLUMNS)
    sizes = {row["model"]: row for row in reversed(rows) if row["tp"] and row["layers"]}
    found = []
    for row in rows:
        full = _completed(row, sizes)
        facts = row["group"], row["id"], row["model"], row["hardware"], row["date_or_version"], row["precision"]
        try:
            build = _build(full)
            found.append(Run(*facts, _step(full, build), measured(row, "meas_tflops_per_gpu"),
                             measured(row, "meas_memory_GB"), build))
        except InputError as error:
            found.append(Run(*facts, None, None, None, None, str(error)))
    return found


def _completed(row: Mapping[str, str], sizes: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """A row of memory alone has the sizes and degrees that another row gives for the model."""
    if row["tp"] or row["model"] not in sizes:
        return dict(row)
    return {name: value or sizes[row["model"]][name] if not name.startswith(("meas", "derived")) else value
            for name, value in row.items()}


def _step(row: Mapping[str, str], build: Build) -> float | None:
    """Measured seconds of a step; of tokens or samples per second where these were measured."""
    tokens, samples = measured(row, "meas_tokens_per_s_per_gpu"), measured(row, "meas_samples_per_s_per_gpu")
    if tokens:
        return build.global_batch * build.seq / tokens / build.devices
    if samples:
        return build.global_batch / samples / build.devices
    return measured(row, "meas_step_time_s") or measured(row, "derived_step_time_s")


def _build(row: Mapping[str, str]) -> Build:
    assumed: list[str] = []
    if "LoRA" in row["layout_or_notes"]:
        raise InputError("fine-tuning with adapters that the row does not describe")
    seq = whole(row, "seq_len")
    model = model_of(row["model"], row["layers"], row["hidden"], row["heads"], seq, row["layout_or_notes"])
    if model.note:
        assumed.append(model.note)
    hardware = next(((kind, size) for text, kind, size in HARDWARE if text in row["hardware"].lower()), None)
    if hardware is None:
        raise InputError(f"hardware {row['hardware']}: no such device kind ships")
    precision = next(((dtype, low) for text, dtype, low in PRECISIONS if text in row["precision"].lower()), None)
    if precision is None:
        raise InputError(f"precision {row['precision']}: expected one of {', '.join(item[0] for item in PRECISIONS)}")
    count = whole(row, "n_gpus")
    degrees, batch, schedule = _degrees(row, count, model, assumed)
    modern = row["group"] not in UNFUSED
    per_host = next(size for size in range(min(hardware[1], count), 0, -1) if count % size == 0)
    if count > per_host and per_host < hardware[1]:
        assumed.append(f"hosts with {per_host} of {hardware[1]} devices")
    return Build(model, seq, hardware[0], count, per_host, *precision,
                 fused="eager" not in row["layout_or_notes"], flash=modern, cut=modern,
                 overlap=row["group"] in OVERLAP or "async" in row["layout_or_notes"].lower(),
                 scatter=row["group"] not in WHOLE, degrees=degrees, global_batch=batch, schedule=schedule,
                 held=row["group"] in HELD, layers=_layers(row),
                 assumed=tuple(assumed))


def _degrees(row: Mapping[str, str], count: int, model: Model, assumed: list[str]) -> tuple[Degrees, int, str]:
    tensor, ranks, context = (stated(row, name) or 1 for name in ("tp", "pp", "cp"))
    copies, left = divmod(count, tensor * ranks * context)
    if left or not copies:
        raise InputError(f"tp {tensor} x pp {ranks} x cp {context} does not divide {count} devices")
    batch = whole(row, "global_batch")
    microbatch, each = stated(row, "micro_batch"), batch // copies
    schedule = row["schedule"].split(" (")[0].lower()
    if schedule == "not stated":
        schedule = "interleaved 1f1b" if ranks > 1 else "1f1b"
        assumed.append(f"schedule {schedule}")
    if not schedule and (stated(row, "vpp") or 1) > 1:
        schedule = "interleaved 1f1b"
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {row['schedule']}: expected one of {', '.join(SCHEDULES)}")
    name = SCHEDULES[schedule]
    chunks = _chunks(row, model, ranks, name, assumed)
    if microbatch is None:
        microbatch = _microbatch(row, each, ranks * chunks)
        assumed.append(f"microbatch {microbatch}")
    if chunks > 1 and (each // microbatch) % ranks:
        raise InputError(f"interleaved 1F1B of {each // microbatch} microbatches on {ranks} ranks is not published")
    fsdp = re.search(r"fsdp=(\d+)", row["dp_or_fsdp"])
    sharding = row["optimizer_sharding"]
    titan = row["group"] == "torchtitan"  # divides parameters over the context axis too; its pipelines keep them whole
    shards, apart = int(fsdp[1]) * (context if titan else 1) if fsdp else 1, titan and ranks > 1
    zero = (1 if apart else 3) if shards > 1 else \
        0 if sharding.startswith("none") or row["group"] == "sailor_sosp25" else 1
    again = row["recompute"].lower()
    sequence = tensor > 1 and ("no sequence" not in again and "no sp" not in again) and (
        "sequence parallel" in again or "+ sp" in again or row["group"] not in OLD)
    if "tokendrop" in row["model"]:
        assumed.append("tokens that are dropped count as computed")
    if 'granularity="full"' in again:
        assumed.append("nothing runs again: how many layers do is not stated")
    recompute: Recompute = "full" if again.startswith("full") else \
        "selective" if again.startswith(("selective", "per-op")) else \
        "latents" if again.startswith('recompute_modules=["mla_up_proj"]') else "none"
    if recompute == "none" and again and not again.startswith("no"):
        assumed.append("parts of layers that run again count as kept")
    expert = stated(row, "ep") or 1
    return (Degrees(ranks, tensor, sequence, context, expert, copies, chunks, microbatch, zero, recompute), batch,
            name if chunks > 1 or name != "Interleaved 1F1B" else "1F1B")


OLD = ("megatron_sc21_table1", "mt_nlg_530b", "korthikanti_table5", "korthikanti_fig1_memory", "sailor_sosp25")
"""Groups of runs from before sequence parallelism, or that state where it is used."""


UNFUSED = (*OLD, "zero_bubble_iclr24")
"""Groups whose attention writes its scores, and whose kernels keep what autograd saves."""

OVERLAP = ("nvidia_megatron_bridge", "megatron_readme_h100", "megatron_llama_example_h100")
"""Groups whose recipes run the tensor axis's collectives behind products."""

WHOLE = ("mt_nlg_530b", "sailor_sosp25")
"""Groups of DeepSpeed's pipelines, whose tensor members each send all of a value."""

HELD = ("megatron_sc21_table1", "mt_nlg_530b", "korthikanti_table5", "zero_bubble_iclr24", "sailor_sosp25")
"""Groups whose transfers and reductions run beside nothing."""


def _chunks(row: Mapping[str, str], model: Model, ranks: int, schedule: str, assumed: list[str]) -> int:
    if ranks == 1 or schedule != "Interleaved 1F1B":
        return 1
    chunks = stated(row, "vpp")
    if chunks is not None:
        return chunks
    layers = next((int(value) for name, value in model.overrides.items() if name in ("n_layer", "num_hidden_layers")),
                  stated(row, "layers") or 0)
    if row["vpp"].startswith("max"):
        return -(-layers // ranks)
    chunks = max(size for size in range(1, layers // ranks + 1) if layers % (size * ranks) == 0 and size <= 6) \
        if layers and layers % ranks == 0 else 2
    assumed.append(f"{chunks} stages per rank")
    return chunks


def _microbatch(row: Mapping[str, str], each: int, stages: int) -> int:
    """Sequences of a microbatch where none is stated: torchtitan divides a copy's batch into as many as it has stages;
    1 elsewhere."""
    return max(1, each // stages) if row["group"] == "torchtitan" and stages > 1 and each % stages == 0 else 1


def _layers(row: Mapping[str, str]) -> tuple[int, ...] | None:
    """Layers of every stage where the row says them; the embedding and the head count as layers there."""
    found = re.search(r"layers per stage \[([\d, ]+)\]", row["layout_or_notes"])
    if found is None:
        return None
    counts = [int(size) for size in re.findall(r"\d{1,6}", found[1])]
    if not counts or min(counts) < 1:
        raise InputError(f"layers per stage [{found[1]}]: expected numbers of at least 1")
    return None if len(counts) == 1 else (counts[0] - 1, *counts[1:-1], counts[-1] - 1)
