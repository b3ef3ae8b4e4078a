"""What a checkpoint holds, by names that no plan and no layout of experts shows in.

``model.<parameter>`` and ``optimizer.<parameter>.<state>``; a bank of experts that several ranks share is stored expert
by expert, ``model.<bank>[7]``, and what a team divides piece by piece, ``model.<parameter>@0:0-16`` (rows 0 to 15).
Whatever wrote a checkpoint, any piece is read from whole tensors, experts or other pieces.
Tensors are in safetensors files (`mipipe.runtime.checkpoints.checkpoint_files`), numbers of the optimizer in
``state.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.runtime.checkpoints.checkpoint_files import CheckpointTensor, read_tensor, stored_tensors
from mipipe.runtime.checkpoints.checkpoint_folder import CheckpointState
from mipipe.runtime.engine.compiling.team import member_pieces
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.optim import local_optimizer
from mipipe.runtime.weights.pieces import Box, Piece, Ranges, overlap, parse_piece

RowsOf = Mapping[str, Sequence[int]]
"""The experts a rank holds of each bank that it shares with other ranks, in the order of its rows."""


def shared_rows(engine: Engine) -> RowsOf:
    """The rows of this rank's shared banks; none without expert parallelism."""
    experts = engine.compiled.experts
    return {} if experts is None else experts.rows()


def held_pieces(engine: Engine) -> dict[str, Piece]:
    """What this member of a team holds of tensors that its team divides; none where ranks are single devices."""
    return member_pieces(engine.compiled, engine.graph, engine.mesh)


def model_tensors(engine: Engine) -> dict[str, Tensor]:
    """This rank's parameters and buffers by their names in a checkpoint."""
    rows, pieces, tensors = shared_rows(engine), held_pieces(engine), {}
    for name, item in (*engine.weights.parameters.items(), *engine.weights.buffers.items()):
        tensors.update(_split(_model_key(name), item.detach(), rows.get(name), pieces.get(name)))
    return tensors


def optimizer_tensors(engine: Engine, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The optimizer state of this rank's parameters by its names in a checkpoint."""
    found: dict[str, Any] = {}
    if optimizer is not None:
        rows, pieces, state = shared_rows(engine), held_pieces(engine), local_optimizer(optimizer).state
        for name, parameter in engine.named_parameters():
            for key, item in state.get(parameter, {}).items():
                split = isinstance(item, Tensor) and item.shape == parameter.shape
                found.update(_split(_state_key(name, key), item, rows.get(name) if split else None,
                                    pieces.get(name) if split else None))
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


KeyOf = Callable[[str], str]
"""What tells a part from the whole (``[7]``, a piece's suffix, nothing) -> name in the checkpoint."""


def _model_key(name: str) -> KeyOf:
    return lambda part: f"model.{name}{part}"


def _state_key(name: str, state: str) -> KeyOf:
    return lambda part: f"optimizer.{name}{part}.{state}"


def _split(key: KeyOf, item: Any, rows: Sequence[int] | None, piece: Piece | None) -> dict[str, Any]:
    if piece is not None and rows is not None:  # of each expert a part
        return {key(_of_rows(piece, [row]).suffix): item[place:place + 1] for place, row in enumerate(rows)}
    if piece is not None:
        return {key(piece.suffix): item}
    return {key(""): item} if rows is None else {key(f"[{row}]"): item[place] for place, row in enumerate(rows)}


def _of_rows(piece: Piece, rows: Sequence[int]) -> Piece:
    """Of these rows what a piece of a bank has of all."""
    return Piece(piece.shape, {**piece.ranges, 0: tuple((row, row + 1) for row in rows)})


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A stored tensor as a piece of the one that ``key("")`` names; ``row``: it lacks the first dimension."""

    name: str
    ranges: Mapping[int, Ranges]
    row: bool = False


def stored_parts(stored: Mapping[str, Any]) -> dict[str, list[StoredPart]]:
    """The parts in which tensors are stored, by the name of the whole; those stored whole have one."""
    found: dict[str, list[StoredPart]] = {}
    for name in stored:
        head, dot, state = name.rpartition(".") if name.startswith("optimizer.") else (name, "", "")
        base, ranges = parse_piece(head)
        bank, bracket, row = base.removesuffix("]").rpartition("[")
        if not ranges and bracket and row.isdigit() and base.endswith("]"):
            found.setdefault(bank + dot + state, []).append(StoredPart(name, {0: ((int(row), int(row) + 1),)}, True))
        found.setdefault(base + dot + state, []).append(StoredPart(name, ranges))
    return found


@dataclass(slots=True)
class Wanted:
    """What is to be read: tensors to fill by stored name, and boxes of others that are put together from several."""

    folder: Path
    stored: Mapping[str, CheckpointTensor]
    fill: dict[str, Tensor] = field(default_factory=dict)
    boxes: dict[str, list[tuple[Tensor, Box, Box, bool]]] = field(default_factory=dict)
    parts: dict[str, list[StoredPart]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = stored_parts(self.stored)

    def add(self, key: KeyOf, tensor: Tensor, rows: Sequence[int] | None, piece: Piece | None) -> None:
        """Ask for a tensor, for ``rows`` of it, for a piece, or for what a piece has of rows.

        Raises:
            InputError: it is not there, or has another shape.
        """
        if piece is not None and rows is not None:
            piece, rows = _of_rows(piece, rows), None
        target = piece or Piece(tuple(tensor.shape), {} if rows is None else
                                {0: tuple((row, row + 1) for row in rows)})
        parts = self.parts.get(key(""), [])
        same = next((part for part in parts if dict(part.ranges) == dict(target.ranges) and not part.row
                     and rows is None), None)
        if same is not None and same.name not in self.fill:
            self._expect(same.name, tuple(tensor.shape))
            self.fill[same.name] = tensor
            return
        covered = 0
        for part in sorted(parts, key=lambda part: bool(part.ranges)):  # whole ones first: nothing else is needed then
            entry = self.stored[part.name]
            if part.ranges or rows is None:
                source = Piece(target.shape, part.ranges)
                if len(entry.shape) + part.row != len(target.shape) or max(part.ranges, default=0) >= len(target.shape):
                    self._expect(part.name, target.shape)
                boxes = overlap(target, source)
                if boxes:
                    self._expect(part.name, source.local_shape[int(part.row):])
            else:
                self._expect(part.name, (*entry.shape[:1], *target.shape[1:]))
                boxes = overlap(target, Piece(entry.shape))
            for ours, theirs in boxes:
                covered += math.prod(side.stop - side.start for side in ours)
                self.boxes.setdefault(part.name, []).append((tensor, ours, theirs, part.row))
            if covered >= tensor.numel():
                break
        if covered != tensor.numel():
            raise InputError(f"checkpoint {self.folder}: {key('')} is {'in part ' * bool(covered)}absent, expected"
                             f" shape {target.shape}; it is of another model")

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if self.stored[name].shape != shape:
            raise InputError(f"checkpoint {self.folder}: {name} is {self.stored[name].shape}, expected shape {shape};"
                             " it is of another model")

    def read(self) -> None:
        """Read everything, of a tensor that is put together one stored part after the other."""
        for name, tensor in self.fill.items():
            read_tensor(self.folder, self.stored[name], tensor)
        for name, found in self.boxes.items():
            self._read_boxes(self.stored[name], found)

    def _read_boxes(self, stored: CheckpointTensor, found: Sequence[tuple[Tensor, Box, Box, bool]]) -> None:
        """Read as many rows as are needed, and put them where they belong."""
        if found[0][3] or not stored.shape:
            buffer = torch.empty(stored.shape, dtype=stored.dtype)
            read_tensor(self.folder, stored, buffer)
            buffer, low = (buffer.unsqueeze(0) if found[0][3] else buffer), 0
        else:
            low, high = min(box[0].start for _, _, box, _ in found), max(box[0].stop for _, _, box, _ in found)
            if high > stored.shape[0]:
                raise InputError(f"checkpoint {self.folder}: {stored.place.name} is {stored.shape}, expected at least"
                                 f" {high} rows; it is of another model")
            buffer = torch.empty((high - low, *stored.shape[1:]), dtype=stored.dtype)
            read_tensor(self.folder, stored, buffer, low)
        for tensor, ours, theirs, _ in found:
            first = (slice(theirs[0].start - low, theirs[0].stop - low), *theirs[1:]) if theirs else theirs
            tensor.detach()[ours].copy_(buffer[first])


def load_tensors(folder: Path, state: CheckpointState, engine: Engine, optimizer: torch.optim.Optimizer | None) -> None:
    """Fill the engine's weights and the optimizer's state from a checkpoint, whatever plan and degrees wrote it.

    Raises:
        InputError: a weight is missing, or has another shape.
    """
    stored = stored_tensors(folder, state.files)
    rows, pieces, wanted = shared_rows(engine), held_pieces(engine), Wanted(folder, stored)
    for name, item in (*engine.weights.parameters.items(), *engine.weights.buffers.items()):
        wanted.add(_model_key(name), item.detach(), rows.get(name), pieces.get(name))
    slots: list[tuple[torch.nn.Parameter, str, Any]] = []
    tensors, values = _states(stored), _states(state.values)
    local = local_optimizer(optimizer) if optimizer is not None else None
    mine = {id(item) for group in local.param_groups for item in group["params"]} if local is not None else set()
    counted_there = counted_on_device(local) if local is not None else set()
    for name, parameter in engine.named_parameters():
        if id(parameter) not in mine:
            continue
        piece = pieces.get(name)
        whole = tuple(parameter.shape) if piece is None else piece.shape
        for kind, entry in tensors.get(name, {}).items():
            shaped = entry is None or entry.shape == whole or (name in rows and len(entry.shape) > 0)
            made = torch.empty(parameter.shape if entry is None or shaped else entry.shape,
                               dtype=parameter.dtype if entry is None else entry.dtype,
                               device=parameter.device if shaped or id(parameter) in counted_there else "cpu")
            wanted.add(_state_key(name, kind), made, rows.get(name) if shaped else None, piece if shaped else None)
            slots.append((parameter, kind, made))
        slots += [(parameter, kind, value) for kind, value in values.get(name, {}).items()]
    wanted.read()
    for parameter, kind, made in slots:
        assert local is not None
        local.state[parameter][kind] = made


def counted_on_device(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters whose count of steps their optimizer reads on their device: fused and capturable
    ones."""
    return {id(item) for group in optimizer.param_groups if group.get("fused") or group.get("capturable")
            for item in group["params"]}


def _states(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each parameter its stored states: what is stored of one, None where it is stored in parts."""
    found: dict[str, dict[str, Any]] = {}
    for key, parts in stored_parts(stored).items():
        if key.startswith("optimizer."):
            name, _, state = key.removeprefix("optimizer.").rpartition(".")
            entry = None if any(part.ranges for part in parts) else stored[parts[0].name]
            found.setdefault(name, {})[state] = entry
    return found
