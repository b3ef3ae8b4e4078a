"""Expert loads from the routing that other programs record: who was sent where, counted.

- Megatron Core's router trace (``--moe-routing-trace-path``): JSON lines, one record per step, layer and rank, with
  ``block`` ("decoder", or "mtp" with ``mtp_idx``), ``layer`` and ``top_indices`` [tokens, top-k]; one file a rank.
- vLLM's routed experts (``enable_return_routed_experts``), saved by ``numpy.save`` or ``numpy.savez``: integers
  [tokens, MoE layers, top-k]; several arrays of one file are added up.
- ADRS's load history: ``{"load_history": [{"logical_expert_load": [layers][experts]}, ...]}``, one entry a step.

Loads are tokens per step: the mean over the steps of a trace or history, all tokens of an array.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.read_files import load_json, read_bytes, read_text
from mipipe.planner.sizes import MOST_COUNT

MOST_UNPACKED_BYTES, MOST_UNPACKED = 2**30, 100
"""What a compressed file may unpack to: this much, or beyond it so many times its own size (routes shrink by ten)."""

LayerKey = tuple[str, int, int]
"""Block, number of the multi-token prediction module (-1 outside one), layer: in the order a token meets them."""

Loads = tuple[tuple[float, ...], ...]


def read_trace(path: Path, num_experts: int | None = None) -> Loads:
    """Tokens per step of each layer and expert from Megatron Core's router trace: a file, or a folder with all ranks'.

    Args:
        path: a JSON lines file, or a folder with ``router_trace_rank*.jsonl``.
        num_experts: experts per layer; by default as many as the highest number that any token was sent to says.

    Raises:
        InputError: no trace, a line that is none, an expert beyond ``num_experts``.
    """
    files = sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no router_trace_rank*.jsonl in this folder; expected Megatron Core's router trace")
    counts: dict[LayerKey, np.ndarray] = defaultdict(lambda: np.zeros(0, dtype=np.int64))
    steps: set[int] = set()
    for file in files:
        for number, text in enumerate(read_text(file).splitlines(), start=1):
            if text.strip():
                where = f"{file}, line {number}"
                step, layer, chosen = _record(load_json(text, where, foreign=True), where)
                counts[layer] = _added(counts[layer], chosen, where)
                steps.add(step)
    if not counts:
        raise InputError(f"{path}: holds no record; expected one line per step, layer and rank")
    return _even([counts[layer] / len(steps) for layer in sorted(counts)], num_experts, str(path))


def _record(data: Any, where: str) -> tuple[int, LayerKey, np.ndarray]:
    """Step, layer and chosen experts of one line of a trace."""
    expected = 'expected {"step": 0, "block": "decoder", "layer": 3, "top_indices": [[12, 45], ...]}'
    if not isinstance(data, dict):
        raise InputError(f"{where}: found {shown(data)}, {expected}")
    numbers: dict[str, int] = {}
    for name, missing in (("step", None), ("layer", None), ("mtp_idx", -1)):
        value = data.get(name, missing)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{where}: {name}: found {shown(value)}, {expected}")
        numbers[name] = value
    block = data.get("block", "decoder")
    if not isinstance(block, str):
        raise InputError(f"{where}: block: found {shown(block)}, {expected}")
    try:
        chosen = np.array(data.get("top_indices"))
        if chosen.shape == (0,):  # a rank without tokens in this step
            chosen = np.zeros((0, 1), dtype=np.int64)
    except ValueError:  # rows of different lengths
        chosen = np.zeros(0)
    if chosen.ndim != 2 or chosen.dtype.kind not in "iu":
        raise InputError(f"{where}: top_indices: found {shown(data.get('top_indices'))}, expected the experts of every"
                         " token, [tokens][top-k]")
    return numbers["step"], (block, numbers["mtp_idx"], numbers["layer"]), chosen


def read_arrays(path: Path, num_experts: int | None = None) -> Loads:
    """Tokens of each layer and expert from vLLM's routed experts in a ``.npy`` or ``.npz`` file; see `read_trace`."""
    counts: list[np.ndarray] = []
    for name, chosen in _arrays(path):
        where = f"{path}: {name}"
        if chosen.ndim != 3 or not chosen.size or chosen.dtype.kind not in "iu":  # none may be of 10**12 layers
            raise InputError(f"{where}: found {chosen.dtype} of shape {list(chosen.shape)}, expected the experts of"
                             " every token as integers [tokens, MoE layers, top-k]")
        if chosen.shape[1] > MOST_COUNT:
            raise InputError(f"{where}: found shape {list(chosen.shape)}, expected [tokens, MoE layers, top-k] with at"
                             f" most {MOST_COUNT} layers")
        if counts and len(counts) != chosen.shape[1]:
            raise InputError(f"{where}: {chosen.shape[1]} layers, but the arrays before have {len(counts)}")
        counts = counts or [np.zeros(0, dtype=np.int64)] * chosen.shape[1]
        counts = [_added(known, chosen[:, layer], where) for layer, known in enumerate(counts)]
    if not counts:
        raise InputError(f"{path}: holds no layer; expected integers [tokens, MoE layers, top-k]")
    return _even([layer.astype(float) for layer in counts], num_experts, str(path))


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a file with their names; never unpickles."""
    raw = read_bytes(path)
    try:
        if raw.startswith(b"PK"):
            size = sum(info.file_size for info in ZipFile(io.BytesIO(raw)).infolist())
            if size > max(MOST_UNPACKED_BYTES, MOST_UNPACKED * len(raw)):
                raise ValueError(f"{size} bytes unpacked, from {len(raw)}")
        found = np.load(io.BytesIO(raw), allow_pickle=False)
        if isinstance(found, np.ndarray):
            yield "array", found
        else:
            yield from ((name, found[name]) for name in found.files)
    except Exception as error:  # a header is Python's text to numpy: of damage come errors of its tokenizer, too
        raise InputError(f"{path}: not readable as NumPy's arrays: {shown(str(error), quoted=False)}") from None


def history_loads(data: dict[str, Any], where: str) -> list[list[float]]:
    """Mean tokens per step [layers][experts] of a history of loads (module docstring), for `ExpertLoads` to check."""
    history = data["load_history"]
    if not isinstance(history, list) or not history:
        raise InputError(f"{where}: load_history: found {shown(history)}, expected a list of steps")
    steps = []
    for number, entry in enumerate(history):
        try:
            steps.append(np.array(entry["logical_expert_load"], dtype=float))
        except (TypeError, KeyError, ValueError):
            steps.append(np.zeros(0))
        if steps[-1].ndim != 2 or steps[-1].shape != steps[0].shape:
            raise InputError(f"{where}: load_history[{number}]: expected logical_expert_load as a list of tokens per"
                             " expert for each layer, of the same shape in every step")
    mean: list[list[float]] = np.mean(steps, axis=0).tolist()
    return mean


def _added(counts: np.ndarray, chosen: np.ndarray, where: str) -> np.ndarray:
    """Counts of tokens by expert with more tokens' choices added."""
    if not chosen.size:
        return counts
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= MOST_COUNT:
        raise InputError(f"{where}: a token is sent to expert {low if low < 0 else high}, expected 0 to"
                         f" {MOST_COUNT - 1}")
    more = np.bincount(chosen.ravel().astype(np.int64))
    size = max(len(counts), len(more))
    return np.pad(counts, (0, size - len(counts))) + np.pad(more, (0, size - len(more)))


def _even(layers: list[np.ndarray], num_experts: int | None, where: str) -> Loads:
    """The layers with as many experts each."""
    highest = max(map(len, layers))
    if not highest:
        raise InputError(f"{where}: no token is sent to any expert")
    if num_experts is not None and not highest <= num_experts <= MOST_COUNT:
        raise InputError(f"{where}: tokens are sent to {highest} experts, but --num-experts says {num_experts};"
                         f" expected {highest} to {MOST_COUNT}")
    return tuple(tuple(np.pad(layer, (0, (num_experts or highest) - len(layer))).tolist()) for layer in layers)
