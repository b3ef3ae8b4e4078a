"""What a checkpoint holds, by names that no plan and no layout of experts shows in.

``model.<parameter>`` and ``optimizer.<parameter>.<state>``; a bank of experts that several ranks share is stored expert
by expert, ``model.<bank>[7]``. Whatever wrote a checkpoint, whole banks are read from experts and experts from banks.
Tensors are in safetensors files (`mipipe.runtime.weights.checkpoint_files`), numbers of the optimizer in
``state.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.optim import local_optimizer
from mipipe.runtime.weights.checkpoint_files import Stored, read_tensor, stored_tensors
from mipipe.runtime.weights.checkpoint_folder import State

RowsOf = Mapping[str, Sequence[int]]
"""The experts a rank holds of each bank that it shares with other ranks, in the order of its rows."""


def shared_rows(engine: Engine) -> RowsOf:
    """The rows of this rank's shared banks; none without expert parallelism."""
    experts = engine.compiled.experts
    return {} if experts is None else experts.rows()


def model_tensors(engine: Engine) -> dict[str, Tensor]:
    """This rank's parameters and buffers by their names in a checkpoint."""
    rows, tensors = shared_rows(engine), {}
    for name, item in (*engine.weights.parameters.items(), *engine.weights.buffers.items()):
        tensors.update(_split(_model_key(name), item.detach(), rows.get(name)))
    return tensors


def optimizer_tensors(engine: Engine, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The optimizer state of this rank's parameters by its names in a checkpoint."""
    found: dict[str, Any] = {}
    if optimizer is not None:
        rows, state = shared_rows(engine), local_optimizer(optimizer).state
        for name, parameter in engine.named_parameters():
            for key, item in state.get(parameter, {}).items():
                split = isinstance(item, Tensor) and item.shape == parameter.shape
                found.update(_split(_state_key(name, key), item, rows.get(name) if split else None))
    return found


def host_copies(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Copies in host memory, and what to call before they are read.

    Those of a CUDA device go to page-locked memory in the order of the device's work: the host does not wait for them,
    and what the device computes later does not show in them.
    """
    device = next((item.device for item in tensors.values() if item.is_cuda), None)
    if device is None:
        return {name: item.to("cpu", copy=True) for name, item in tensors.items()}, lambda: None
    copies = {name: torch.empty_like(item, device="cpu", pin_memory=item.is_cuda).copy_(item, non_blocking=True)
              for name, item in tensors.items()}
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return copies, done.synchronize


KeyOf = Callable[[int | None], str]
"""Row -> name in the checkpoint; None: of the whole tensor."""


def _model_key(name: str) -> KeyOf:
    return lambda row: f"model.{name}" if row is None else f"model.{name}[{row}]"


def _state_key(name: str, state: str) -> KeyOf:
    return lambda row: f"optimizer.{name}.{state}" if row is None else f"optimizer.{name}[{row}].{state}"


def _split(key: KeyOf, item: Any, rows: Sequence[int] | None) -> dict[str, Any]:
    return {key(None): item} if rows is None else {key(row): item[place] for place, row in enumerate(rows)}


@dataclass(slots=True)
class Wanted:
    """What is to be read: tensors to fill by stored name, tensors that take some rows of one read whole, and tensors
    that equal another."""

    folder: Path
    stored: Mapping[str, Stored]
    fill: dict[str, Tensor] = field(default_factory=dict)
    picks: list[tuple[Tensor, str, Sequence[int]]] = field(default_factory=list)
    twins: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, key: KeyOf, tensor: Tensor, rows: Sequence[int] | None) -> None:
        """Ask for a tensor, or for ``rows`` of it.

        Raises:
            InputError: it is not there, or has another shape.
        """
        if key(None) not in self.stored and key(rows[0] if rows is not None else 0) in self.stored:
            for place, row in enumerate(range(tensor.shape[0]) if rows is None else rows):
                self._expect(key(row), tuple(tensor.shape[1:]))
                if key(row) in self.fill:  # a rank may hold two replicas of one expert
                    self.twins.append((tensor[place], self.fill[key(row)]))
                else:
                    self.fill[key(row)] = tensor[place]  # a view: reading fills the tensor itself
        elif rows is None:
            self._expect(key(None), tuple(tensor.shape))
            self.fill[key(None)] = tensor
        else:
            size = self._expect(key(None), None)
            self.fill[key(None)] = torch.empty(size, dtype=tensor.dtype)
            self.picks.append((tensor, key(None), rows))

    def _expect(self, name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        entry = self.stored.get(name)
        if entry is None or (shape is not None and entry.shape != shape):
            found = "absent" if entry is None else f"{entry.shape}"
            raise InputError(f"checkpoint {self.folder}: {name} is {found}, expected shape {shape}; it is of another"
                             " model")
        return entry.shape

    def read(self) -> None:
        """Read everything."""
        for name, tensor in self.fill.items():
            read_tensor(self.folder, self.stored[name], tensor)
        for tensor, name, rows in self.picks:
            tensor.copy_(self.fill[name][torch.tensor(rows)])
        for tensor, first in self.twins:
            tensor.copy_(first)


def load_tensors(folder: Path, state: State, engine: Engine, optimizer: torch.optim.Optimizer | None) -> None:
    """Fill the engine's weights and the optimizer's state from a checkpoint, whatever plan wrote it.

    Raises:
        InputError: a weight is missing, or has another shape.
    """
    stored = stored_tensors(folder, state.files)
    rows, wanted = shared_rows(engine), Wanted(folder, stored)
    for name, item in (*engine.weights.parameters.items(), *engine.weights.buffers.items()):
        wanted.add(_model_key(name), item.detach(), rows.get(name))
    slots: list[tuple[torch.nn.Parameter, str, Any]] = []
    tensors, values = _states(stored), _states(state.values)
    local = local_optimizer(optimizer) if optimizer is not None else None
    mine = {id(item) for group in local.param_groups for item in group["params"]} if local is not None else set()
    counted_there = counted_on_device(local) if local is not None else set()
    for name, parameter in engine.named_parameters():
        if id(parameter) not in mine:
            continue
        for kind, (whole, entry) in tensors.get(name, {}).items():
            shaped = not whole or entry.shape == parameter.shape or (name in rows and len(entry.shape) > 0)
            made = torch.empty(parameter.shape if shaped else entry.shape, dtype=entry.dtype,
                               device=parameter.device if shaped or id(parameter) in counted_there else "cpu")
            wanted.add(_state_key(name, kind), made, rows.get(name) if shaped else None)
            slots.append((parameter, kind, made))
        slots += [(parameter, kind, value) for kind, (_, value) in values.get(name, {}).items()]
    wanted.read()
    for parameter, kind, made in slots:
        assert local is not None
        local.state[parameter][kind] = made


def counted_on_device(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters whose count of steps their optimizer reads on their device: fused and capturable
    ones."""
    return {id(item) for group in optimizer.param_groups if group.get("fused") or group.get("capturable")
            for item in group["params"]}


def _states(stored: Mapping[str, Any]) -> dict[str, dict[str, tuple[bool, Any]]]:
    """For each parameter its stored states: whether whole (or by experts), and what is stored of one."""
    found: dict[str, dict[str, tuple[bool, Any]]] = {}
    for key, entry in stored.items():
        if key.startswith("optimizer."):
            name, _, state = key.removeprefix("optimizer.").rpartition(".")
            bank, bracket, row = name.removesuffix("]").rpartition("[")
            whole = not (bracket and row.isdigit())
            found.setdefault(name if whole else bank, {})[state] = (whole, entry)
    return found
