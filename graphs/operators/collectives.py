"""The operators by which the members of a team talk, and the one by which a member takes its part of what it has.

- ``mipipe::all_reduce``: the sum (or maximum) of all members' tensors, on every member.
- ``mipipe::all_gather``: all members' parts put together along a dimension.
- ``mipipe::reduce_scatter``: the member's part of the sum.
- ``mipipe::exchange_parts``: parts along one dimension become parts along another (an all-to-all).
- ``mipipe::take_part``: the member's part of a tensor that it has in whole; nothing is sent.

A stored program names the axis of the team, never a process group: whoever runs it gives the implementations
(`mipipe.runtime.engine.compiling.team`). ``sections`` says that several blocks lie side by side along the dimension,
each of which is divided: a member's part is its part of every block. A number: so many of one length (a fused gate and
up projection has 2, a flattened batch of sequences that are divided has one for each sequence); several numbers: the
relative lengths of as many blocks (queries, keys and values in one tensor, with fewer key heads: 4, 1, 1).

Legend: T members along the axis (``size``), member m of 0 .. T - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import GraphError

Sections = int | tuple[int, ...]
"""Blocks along a dimension: how many equal ones, or the relative lengths, without a common divisor, of two or more."""


def block_lengths(length: int, sections: int | Sequence[int]) -> list[int]:
    """The lengths of the blocks of a dimension of this length."""
    if isinstance(sections, int):
        return [length // sections] * sections
    return [length * share // sum(sections) for share in sections]


def _listed(sections: int | Sequence[int]) -> int | Sequence[int]:
    """Sections as an operator has them, where one number comes as a list."""
    return sections if isinstance(sections, int) or len(sections) > 1 else sections[0]


def part_of(x: Tensor, member: int, size: int, dim: int, sections: int | Sequence[int]) -> Tensor:
    """The part of member ``member``: a view where ``sections`` is 1."""
    sections = _listed(sections)
    if not isinstance(sections, int):
        blocks = torch.split(x, block_lengths(x.shape[dim], sections), dim)
        return torch.cat([part_of(block, member, size, dim, 1) for block in blocks], dim)
    length = x.shape[dim] // (sections * size)
    if sections == 1:
        return x.narrow(dim, member * length, length)
    equal = x.unflatten(dim, (sections, size, length))  # type: ignore[no-untyped-call]
    return equal.select(dim + 1, member).flatten(dim, dim + 1)


def whole_of(parts: list[Tensor], dim: int, sections: int | Sequence[int]) -> Tensor:
    """The tensor whose parts these are, by member: the inverse of `part_of`."""
    sections = _listed(sections)
    if not isinstance(sections, int):
        pieces = [torch.split(x, block_lengths(x.shape[dim], sections), dim) for x in parts]
        return torch.cat([piece for block in zip(*pieces, strict=True) for piece in block], dim)
    if sections == 1:
        return torch.cat(parts, dim)
    length = parts[0].shape[dim] // sections
    blocks = torch.stack([x.unflatten(dim, (sections, length)) for x in parts],  # type: ignore[no-untyped-call]
                         dim + 1)
    return blocks.flatten(dim, dim + 2)


def _alone(name: str) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        raise GraphError(f"operator mipipe.{name}: a member's program runs in a team only")
    return run


def _scaled(x: Tensor, dim: int, up: int, down: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * up // down
    return x.new_empty(shape)


SHAPED: dict[str, Callable[..., Tensor]] = {
    "all_reduce": lambda x, op, size, axis: x.new_empty(x.shape),
    "all_gather": lambda x, dim, sections, size, axis: _scaled(x, dim, size, 1),
    "reduce_scatter": lambda x, dim, sections, size, axis: _scaled(x, dim, 1, size),
    "exchange_parts": lambda x, source, target, size, axis: _scaled(_scaled(x, source[0], size, 1), target[0], 1, size),
    "take_part": lambda x, dim, sections, size, axis: _scaled(x, dim, 1, size)}
"""A new tensor as each operator's result is, with nothing in it."""
SILENT = {"take_part"}
"""Those in which nobody talks."""


def _define() -> None:
    """Register the operators with fake implementations; what they compute is given by whoever runs them."""
    divided = "(Tensor x, int dim, int[1] sections, int size, str axis) -> Tensor"
    schemas = {"all_reduce": "(Tensor x, str op, int size, str axis) -> Tensor", "all_gather": divided,
               "reduce_scatter": divided, "take_part": divided,
               "exchange_parts": "(Tensor x, int[] from_dim, int[] to_dim, int size, str axis) -> Tensor"}
    for name, schema in schemas.items():
        torch.library.define(f"mipipe::{name}", schema)
        torch.library.impl(f"mipipe::{name}", "CompositeExplicitAutograd", _alone(name))
        torch.library.register_fake(f"mipipe::{name}", SHAPED[name])


_define()
