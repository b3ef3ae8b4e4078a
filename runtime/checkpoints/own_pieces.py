"""What a rank writes of a model: its whole tensors that no rank before it holds, and, for the first member of a team,
those that the team divides, put together one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.operators.collectives import whole_of
from mipipe.graphs.tracing.parameter_slices import parse_slice
from mipipe.runtime.checkpoints.checkpoint_tensors import held_pieces, shared_rows
from mipipe.runtime.engine.compiling.team import axes_of
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import gather, rank
from mipipe.runtime.weights.reader import TORCH_DTYPES
from mipipe.runtime.weights.stored_names import StoredView

StoredPiece = tuple[str, tuple[int, int] | None]
"""A parameter, or some of its rows."""


def divided_names(engine: Engine) -> list[str]:
    """The parameters and buffers that are divided among this process and others, and that no rank before this one
    holds: all processes that have parts of one name it. All ranks must call."""
    mesh, pieces = engine.mesh, held_pieces(engine)
    held = [name for name in (*engine.weights.parameters, *engine.weights.buffers)
            if name in pieces and (not mesh.copy or engine.compiled.apart(name) or name in engine.compiled.banks)]
    earlier = {name for rank, names in gather((mesh.rank, held)) for name in names if rank < mesh.rank}
    return [name for name in held if name not in earlier]


def put_together(engine: Engine, names: Iterable[str]) -> Iterator[tuple[StoredPiece, Tensor]]:
    """What is divided, whole, one tensor after the other, for the first process; banks expert by expert for the first
    that has each. All that have parts must take all."""
    compiled, mesh = engine.compiled, engine.mesh
    slots = _first_slots(engine)
    axes = axes_of(mesh, compiled.waits)
    for name in names:
        tensor = engine.weights.parameters.get(name, engine.weights.buffers.get(name))
        assert tensor is not None
        whole = tensor.detach()
        for item in reversed(compiled.divisions[name]):
            whole = whole_of(axes[item.axis].gather(whole), item.dim, item.sections)
        if name in slots:
            yield from (((name, (row, row + 1)), whole[slot:slot + 1]) for slot, row in slots[name])
        elif name not in compiled.banks and not mesh.member and not mesh.copy:
            yield parse_slice(name), whole


def _first_slots(engine: Engine) -> dict[str, list[tuple[int, int]]]:
    """Of banks the slots here, with their experts, that no process before this one has of these."""
    exchange = engine.compiled.experts
    if exchange is None or engine.mesh.seat >= exchange.size:
        return {}
    return {bank: [(slot, int(exchange.tables[number].experts[exchange.rank, slot]))
                   for slot in exchange.tables[number].first_of(exchange.rank)]
            for number in exchange.local for bank in exchange.layers[number].banks}


def divided_shapes(engine: Engine, names: Iterable[str]) -> dict[StoredPiece, Tensor]:
    """What `put_together` will give, on the meta device."""
    pieces, slots, found = held_pieces(engine), _first_slots(engine), dict[StoredPiece, Tensor]()
    first = not engine.mesh.member and not engine.mesh.copy
    for name in names:
        tensor = engine.weights.parameters.get(name, engine.weights.buffers.get(name))
        assert tensor is not None
        whole = torch.empty(pieces[name].shape, dtype=tensor.dtype, device="meta")
        if name in slots:
            found |= {(name, (row, row + 1)): whole[row:row + 1] for _, row in slots[name]}
        elif first and name not in engine.compiled.banks:
            found[parse_slice(name)] = whole
    return found


def own_pieces(engine: Engine) -> dict[StoredPiece, Tensor]:
    """What this rank writes: its whole parameters and buffers that no rank before it holds. All ranks must call."""
    shared, divided = shared_rows(engine), engine.compiled.divisions
    local: dict[StoredPiece, Tensor] = {}
    for name, item in (*engine.weights.parameters.items(), *engine.weights.buffers.items()):
        base, rows = parse_slice(name)
        if name in divided:
            continue
        if name in shared:
            local.update({(base, (row, row + 1)): item[place:place + 1].detach()
                          for place, row in enumerate(shared[name])})
        else:
            local[base, rows] = item.detach()
    earlier = {piece for pieces in gather(list(local))[:rank()] for piece in pieces}
    return {piece: tensor for piece, tensor in local.items() if piece not in earlier}


def byte_slice(view: StoredView, rows: tuple[int, int] | None, tensor: Tensor) -> tuple[int, Tensor | None]:
    """What a parameter, or rows of it, gives to a stored tensor, and at which byte; None where it gives nothing.

    Raises:
        InputError: the stored tensor mixes rows that are held apart.
    """
    tensor = tensor.contiguous()
    place = tensor.storage_offset()
    if rows is None:
        return 0, torch.as_strided(tensor, view.shape, view.stride, place + view.offset)
    row = tensor.numel() // (rows[1] - rows[0])
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
    begin, end = rows[0] * row, rows[1] * row
    if begin <= view.offset and last < end:
        return 0, torch.as_strided(tensor, view.shape, view.stride, place + view.offset - begin)
    if last < begin or end <= view.offset:
        return 0, None
    width = math.prod(view.shape[1:])
    if view.offset or view.stride != torch.empty(view.shape, device="meta").stride() or width != row:
        raise InputError(f"save: {view.name} mixes rows of {view.fqn} that different ranks hold")
    return begin * TORCH_DTYPES[view.dtype].itemsize, tensor
