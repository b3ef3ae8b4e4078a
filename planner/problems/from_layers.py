"""A planning problem from measured times of layers, without a model: profile a layer once, predict the cluster.

A table holds for every layer of a model what its forward, its backward and its parameters' update took on one kind of
device at one microbatch size and tensor degree, in the form of Sailor's artifact (Strati et al., SOSP 2025), seconds:
``{model: {device: {microbatch: {tensor degree: {layer: [forward, backward, update]}}}}}``. A stage of layers is one
group on one rank; its backward is not divided into I and W, which the table does not tell apart, so schedules that
divide it cannot be planned from one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError, ProblemError, shown
from mipipe.graphs.read_files import load_json, read_text
from mipipe.graphs.topology import UNLIMITED_BYTES, Device, Link, Topology
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem

KIND = "measured"


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


def problem_of_layers(layers: Sequence[LayerTimes], layers_per_stage: Sequence[int], *, num_microbatches: int,
                      link: Link, message_bytes: int, reduce_s: float = 0.0, name: str = "layers") -> PlanningProblem:
    """The problem of a chain of stages of measured layers, stage s on rank s.

    Args:
        layers: the model's layers.
        layers_per_stage: how many of them each stage has, in order.
        num_microbatches: of one step of one copy.
        link: between two ranks.
        message_bytes: of the value that a stage gives to the next for one microbatch, and of its gradient.
        reduce_s: seconds by which the reduction of gradients over copies lengthens the step.
        name: of the problem.

    Raises:
        ProblemError: the stages do not add up to the layers, or one is empty.
    """
    if sum(layers_per_stage) != len(layers) or min(layers_per_stage, default=0) < 1:
        raise ProblemError(f"layers per stage: {', '.join(map(str, layers_per_stage))} make {sum(layers_per_stage)};"
                           f" expected at least one each, and the {len(layers)} measured layers together")
    groups, first = [], 0
    for stage, count in enumerate(layers_per_stage):
        own = layers[first:first + count]
        first += count
        forward, update = (round(1e9 * sum(getattr(layer, phase) or 0.0 for layer in own))
                           for phase in ("forward", "update"))
        backward = round(1e9 * sum(layer.backward + (layer.weights or 0.0) for layer in own))
        groups.append(Group(f"stage {stage}", {KIND: PhaseTimes(forward, backward, None)},
                            update_ns=update + round(1e9 * reduce_s)))
    edges = tuple(GroupEdge(stage, (stage + 1,), message_bytes, message_bytes, f"stage {stage}.out")
                  for stage in range(len(groups) - 1))
    devices = tuple(Device(f"rank{number}", KIND, UNLIMITED_BYTES, f"host{number}") for number in range(len(groups)))
    return PlanningProblem(name, tuple(groups), edges, Topology(devices, link, link), num_microbatches)
