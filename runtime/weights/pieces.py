"""Pieces of tensors: what a member of a team holds of a parameter, by where it is in the whole.

A piece has, along some dimensions, ranges of the whole, one after another; all else is whole. A tensor divided along
two axes, or into sections, is a piece like any other, so files name pieces and never the degrees they come from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product

import torch
from torch import Tensor

from mipipe.graphs.operators.collectives import block_lengths
from mipipe.graphs.sharding.team_graph import Division

Ranges = tuple[tuple[int, int], ...]
"""``[start, stop)``, one after another."""
Box = tuple[slice, ...]
"""A range of every dimension."""


@dataclass(frozen=True)
class Piece:
    """Part of a tensor of ``shape``: ``ranges`` by dimension, those left out whole."""

    shape: tuple[int, ...]
    ranges: Mapping[int, Ranges] = field(default_factory=dict)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the piece."""
        return tuple(sum(stop - start for start, stop in self.ranges[dim]) if dim in self.ranges else length
                     for dim, length in enumerate(self.shape))

    @property
    def suffix(self) -> str:
        """What tells a piece's name from that of the whole, such as ``@0:0-8,16-24@1:0-4``; empty for the whole."""
        return "".join(f"@{dim}:" + ",".join(f"{start}-{stop}" for start, stop in self.ranges[dim])
                       for dim in sorted(self.ranges))

    def cut(self, whole: Tensor) -> Tensor:
        """The piece of a whole tensor; a view where it has one range along each dimension."""
        for dim, ranges in self.ranges.items():
            parts = [whole.narrow(dim, start, stop - start) for start, stop in ranges]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return whole

    def blocks(self) -> list[tuple[Box, Box]]:
        """The boxes that a piece is made of: where each is in the whole and in the piece."""
        lines = []
        for dim, length in enumerate(self.shape):
            place, found = 0, []
            for start, stop in self.ranges.get(dim, ((0, length),)):
                found.append((slice(start, stop), slice(place, place + stop - start)))
                place += stop - start
            lines.append(found)
        return [(tuple(there for there, _ in box), tuple(here for _, here in box)) for box in product(*lines)]

    def put(self, target: Tensor, tensor: Tensor) -> None:
        """Put the piece where it is in the whole."""
        for there, here in self.blocks():
            target[there] = tensor[here]


def piece_of(shape: Sequence[int], divisions: Sequence[Division], coordinates: Mapping[str, int]) -> Piece:
    """What the member at these coordinates holds of a tensor of the whole ``shape``."""
    ranges: dict[int, Ranges] = {}
    for item in divisions:
        before = ranges.get(item.dim, ((0, shape[item.dim]),))
        length = sum(stop - start for start, stop in before)
        member, blocks = coordinates[item.axis], block_lengths(length, item.sections)
        ranges[item.dim] = tuple(found for start, block in zip(accumulate(blocks, initial=0), blocks, strict=False)
                                 for found in _within(before, start + member * (block // item.size),
                                                      block // item.size))
    return Piece(tuple(shape), ranges)


def _within(ranges: Ranges, place: int, length: int) -> Ranges:
    """``length`` elements from the place-th on of what ranges hold."""
    found = []
    for start, stop in ranges:
        first, last = max(start, start + place), min(stop, start + place + length)
        if first < last:
            found.append((first, last))
        place -= stop - start
    return tuple(found)


_SUFFIX = re.compile(r"(@\d{1,2}:\d{1,18}-\d{1,18}(,\d{1,18}-\d{1,18})*)+$")


def parse_piece(name: str) -> tuple[str, dict[int, Ranges]]:
    """A name without a piece's suffix, and the ranges that it says."""
    match = _SUFFIX.search(name)
    if match is None:
        return name, {}
    ranges: dict[int, Ranges] = {}
    for part in match[0].split("@")[1:]:
        dim, _, texts = part.partition(":")
        ends = [text.split("-") for text in texts.split(",")]
        ranges[int(dim)] = tuple((int(start), int(stop)) for start, stop in ends)
    return name[:match.start()], ranges


def overlap(target: Piece, source: Piece) -> list[tuple[Box, Box]]:
    """The boxes that two pieces of one tensor share: where each is in the target and in the source."""
    lines = []
    for dim, lengths in enumerate(zip(target.shape, source.shape, strict=True)):
        found, here = [], 0
        for start, stop in target.ranges.get(dim, ((0, lengths[0]),)):
            there = 0
            for first, last in source.ranges.get(dim, ((0, lengths[1]),)):
                low, high = max(start, first), min(stop, last)
                if low < high:
                    found.append((slice(here + low - start, here + high - start),
                                  slice(there + low - first, there + high - first)))
                there += last - first
            here += stop - start
        lines.append(found)
    return [(tuple(ours for ours, _ in box), tuple(theirs for _, theirs in box)) for box in product(*lines)]
