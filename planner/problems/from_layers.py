"""Measured times of layers, to plan from in place of estimates: profile a layer once, predict the cluster.

A table holds for every layer of a model what its forward, its backward and its parameters' update took on one kind of
device at one microbatch size and tensor degree, in the form of Sailor's artifact (Strati et al., SOSP 2025), seconds:
``{model: {device: {microbatch: {tensor degree: {layer: [forward, backward, update]}}}}}``. The backward is not
divided into I and W, which the table does not tell apart, so schedules that divide it cannot be planned from one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.read_files import load_json, read_text


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of one layer: forward and backward of a microbatch, and the update of its parameters (None: not
    measured). ``weights``: of the weight gradients, where they were measured apart; ``backward`` is without them."""

    forward: float
    backward: float
    update: float | None
    weights: float | None = None


def read_layer_times(path: Path, model: str, device: str, microbatch: int, tensor: int) -> tuple[LayerTimes, ...]:
    """The layers of one entry of a table, in order.

    Raises:
        InputError: no such table, or no such entry (says which there are).
    """
    found: Any = load_json(read_text(path), str(path))
    where = str(path)
    for what, key in (("model", model), ("device", device), ("microbatch", str(microbatch)),
                      ("tensor degree", str(tensor))):
        if not isinstance(found, dict):
            raise InputError(f"{where}: found {shown(found)}, expected times by {what}")
        if key not in found:
            raise InputError(f"{where}: no {what} {shown(key)}; it has {', '.join(sorted(map(str, found)))}")
        found, where = found[key], f"{where}: {key}"
    if not isinstance(found, dict) or set(found) != {str(number) for number in range(len(found))} or not found:
        raise InputError(f"{where}: found {shown(found)}, expected layers 0, 1, ... with three times each")
    return tuple(_times(found[str(number)], f"{where}: layer {number}") for number in range(len(found)))


def entry_of(path: Path, entry: str | None) -> tuple[str, str]:
    """The model and device of a table: those of ``MODEL/DEVICE``, or the only ones.

    Raises:
        InputError: several and none named, or an entry that is none of these.
    """
    table = load_json(read_text(path), str(path))
    known = [f"{model}/{device}" for model, devices in table.items() if isinstance(devices, dict)
             for device in devices] if isinstance(table, dict) else []
    if not known:
        raise InputError(f"{path}: found {shown(table)}, expected times by model and device")
    if entry not in known and (entry is not None or len(known) > 1):
        raise InputError(f"{path}: --layer-entry {'is missing' if entry is None else shown(entry)}; expected one of"
                         f" {', '.join(known)}")
    model, _, device = (entry or known[0]).rpartition("/")
    return model, device


def _times(values: Any, where: str) -> LayerTimes:
    if not (isinstance(values, list) and len(values) == 3
            and all(isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6
                    for value in values)):
        raise InputError(f"{where}: found {shown(values)}, expected [forward, backward, update] in seconds")
    return LayerTimes(*map(float, values))
