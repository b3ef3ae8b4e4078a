"""How a tensor lies on the members of a team along one axis, and what it takes to lie otherwise.

A `Part` is *whole* (every member has all of it), *divided* along a dimension, *partial* (the tensor is the sum of what
the members have), or *owned*: rows that belong to experts are right on the member that holds the expert, and anything
elsewhere. (GSPMD, Xu et al. 2021, arXiv 2105.04663, has the first three.) *Routed* is what a member's part of the
tokens is on its way through their experts on other devices: divided, in a number and an order of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from mipipe.graphs.operators.collectives import Sections, block_lengths


class Kind(StrEnum):
    """The kinds of a `Part`."""

    WHOLE = "whole"
    DIVIDED = "divided"
    PARTIAL = "partial"
    OWNED = "owned"


@dataclass(frozen=True, slots=True)
class Part:
    """What a member has of a tensor.

    Divided: along ``dim``, of which each block (``sections``: so many equal ones, or the relative lengths of unequal
    ones) is cut into T equal pieces. Owned: rows of
    dimension 0, grouped by the offsets that the value ``offsets`` holds. Routed: divided, and cannot be had otherwise;
    ``sections`` are those of the tokens that it is made of; with ``dim`` -1 its size is that of the whole.
    """

    kind: Kind
    dim: int = 0
    sections: Sections = 1
    offsets: str = ""
    routed: bool = False

    def at(self, dim: int) -> Part:
        """The same division along another dimension."""
        return replace(self, dim=dim)


WHOLE = Part(Kind.WHOLE)
PARTIAL = Part(Kind.PARTIAL)


def divided(dim: int, sections: Sections = 1) -> Part:
    """Divided along a dimension."""
    return Part(Kind.DIVIDED, dim, sections)


def routed(tokens: Part, dim: int = 0) -> Part:
    """What is made of tokens that are divided so where they are sent to their experts: rows, or (-1) how many of
    them."""
    return Part(Kind.DIVIDED, dim, tokens.sections, routed=True)


def side_by_side(lengths: Sequence[int]) -> Sections:
    """The sections of a dimension in which blocks of these lengths lie one after another."""
    if len(set(lengths)) == 1:
        return len(lengths)
    unit = math.gcd(*lengths)
    return tuple(length // unit for length in lengths)


def units(sections: Sections) -> int:
    """How many units blocks have in all: every member has an equal number of elements of each unit."""
    return sections if isinstance(sections, int) else sum(sections)


def within(length: int, part: Part, start: int, stop: int) -> Part | None:
    """How the range from ``start`` to ``stop`` of the divided dimension, of this length, is divided; None where it is
    not made of whole blocks."""
    if isinstance(part.sections, int):
        block = length // part.sections
        whole = start % block == 0 and stop % block == 0 and stop > start
        return replace(part, sections=(stop - start) // block) if whole else None
    blocks = block_lengths(length, part.sections)
    ends = [sum(blocks[:count]) for count in range(len(blocks) + 1)]
    if start not in ends or stop not in ends or stop <= start:
        return None
    return replace(part, sections=side_by_side(blocks[ends.index(start):ends.index(stop)]))


def fits(shape: Sequence[int], part: Part, size: int) -> bool:
    """Whether a tensor of this shape can be divided so among ``size`` members."""
    if part.kind is not Kind.DIVIDED or part.dim < 0:
        return True
    return part.dim < len(shape) and shape[part.dim] > 0 and shape[part.dim] % (units(part.sections) * size) == 0


def local_shape(shape: Sequence[int], part: Part, size: int) -> tuple[int, ...]:
    """The shape of a member's part."""
    if part.kind is not Kind.DIVIDED:
        return tuple(shape)
    return tuple(length // size if dim == part.dim else length for dim, length in enumerate(shape))


def sent(source: Part, target: Part, num_bytes: int) -> float | None:
    """What a change from one part to another sends, in bytes of the whole tensor; None where it is impossible.

    An all-reduce counts twice: it is a reduce-scatter and an all-gather.
    """
    if source == target:
        return 0.0
    if source.routed or target.routed:
        return None
    if source.kind is Kind.WHOLE:
        return 0.0 if target.kind in (Kind.DIVIDED, Kind.OWNED) else None
    if source.kind is Kind.DIVIDED:
        return num_bytes if target.kind is Kind.WHOLE else num_bytes / 2 if target.kind is Kind.DIVIDED else None
    if source.kind is Kind.PARTIAL:
        return 2.0 * num_bytes if target.kind is Kind.WHOLE else num_bytes if target.kind is Kind.DIVIDED else None
    return {Kind.WHOLE: 2.0 * num_bytes, Kind.PARTIAL: 0.0, Kind.DIVIDED: float(num_bytes)}.get(target.kind)


def reshaped(shape: Sequence[int], target: Sequence[int], part: Part, size: int) -> Part | None:
    """How the view ``target`` of a tensor of ``shape`` is divided where the tensor is; None where it is in no such way.

    The division cuts each of ``outer`` blocks of the row-major tensor into pieces; in the view, the dimension that
    holds these blocks must hold whole pieces. For one member it may be one of length 1: the first, as samples are.
    Unequal blocks stay where they are in the dimension that takes the place of theirs.
    """
    equal = isinstance(part.sections, int)
    count, before = units(part.sections), 1
    outer, each = math.prod(shape[:part.dim]) * (count if equal else 1), 1 if equal else count
    for dim, length in enumerate(target):
        if before * length >= outer * each * size:
            sections, left = divmod(outer, before)
            if left or length % sections or (length // sections) % (each * size):
                return None
            if equal:
                return replace(part, dim=dim, sections=sections)
            return part.at(dim) if sections == 1 else None
        before *= length
    return None
