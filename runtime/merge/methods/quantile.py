"""The k-th largest value of tensors that are never in memory at once, by counting bit patterns.

The bits of a non-negative float32, read as an integer, are in the order of the values. One pass counts the upper half
of each pattern, a second the lower half inside the one bin that holds the k-th value: two passes give it exactly. The
counts are integers, so tiles, tensors and ranks may add them in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

LOW_BITS = 16
NUM_HIGH = 2**15
"""Upper patterns of a non-negative float32: 31 bits less the lower 16."""
NUM_LOW = 2**LOW_BITS


def magnitude_keys(values: Tensor) -> Tensor:
    """int32 patterns of ``|values|`` in float32: larger magnitude, larger key."""
    return values.to(torch.float32).contiguous().view(torch.int32) & 0x7FFFFFFF


def count_high(keys: Tensor) -> Tensor:
    """Counts of the upper halves of non-negative float32 patterns, ``[2**15]``."""
    return torch.bincount((keys >> LOW_BITS).flatten(), minlength=NUM_HIGH)


def count_low(keys: Tensor, high: int) -> Tensor:
    """Counts of the lower halves of the patterns whose upper half is ``high``, ``[2**16]``; none for ``high < 0``."""
    inside = keys.flatten()[where_equal(keys >> LOW_BITS, high)]
    return torch.bincount(inside & (NUM_LOW - 1), minlength=NUM_LOW)


def where_equal(values: Tensor, value: int) -> Tensor:
    """Flat positions of the entries equal to ``value``. numpy's comparison is several times faster on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(values.numpy() == value))
    return (values.flatten() == value).nonzero().flatten()


def find_bin(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the ``rank``-th largest entry (1-based), and the entry's rank inside it.

    Returns ``(-1, 0)`` for rank 0: nothing is selected.
    """
    if rank <= 0:
        return -1, 0
    above = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(above, torch.tensor(rank, device=above.device)))
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, rank - before


@dataclass(frozen=True, slots=True)
class Threshold:
    """The pattern of the k-th largest magnitude. ``quota`` entries equal to it belong to the top k, the others do not.

    A quota of None keeps every entry equal to it (the k-th value rule).
    """

    key: int
    quota: int | None

    @classmethod
    def nothing(cls) -> Threshold:
        """Selects no entry: the pattern of infinity, with no quota."""
        return cls(0x7F800000, 0)

    @property
    def value(self) -> float:
        """The magnitude itself."""
        return float(torch.tensor(self.key, dtype=torch.int32).view(torch.float32))


@dataclass(slots=True)
class TopK:
    """Selects the top k of a piece while its tiles pass in order; entries equal to the k-th are taken as they come."""

    threshold: Threshold
    used: int = field(default=0)
    factor: float = 1.0
    """What takes the place of 1 in `mask`."""

    def mask(self, values: Tensor) -> Tensor:
        """1 for the entries of the next tile that belong to the top k, 0 for the others, in the values' dtype.

        Made with floating arithmetic: torch's operations on truth values take several times longer on a CPU.
        """
        size = values.abs().to(torch.float32)
        if self.threshold.quota is None:
            chosen = size.neg_().add_(self.threshold.value).sign_().clamp_min_(0).neg_().add_(1)
            return (chosen if self.factor == 1.0 else chosen.mul_(self.factor)).to(values.dtype)
        chosen = (size - self.threshold.value).sign_().clamp_min_(0)
        left = self.threshold.quota - self.used
        if left > 0:
            equal = where_equal(magnitude_keys(values), self.threshold.key)[:left]
            self.used += len(equal)
            chosen.view(-1)[equal] = 1.0
        return (chosen if self.factor == 1.0 else chosen.mul_(self.factor)).to(values.dtype)


def top_k_mask(values: Tensor, count: int) -> Tensor:
    """True for exactly ``count`` entries of largest magnitude; of equal ones the first in row order."""
    keys = magnitude_keys(values)
    high, rank = find_bin(count_high(keys), count)
    if high < 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    low, quota = find_bin(count_low(keys, high), rank)
    return TopK(Threshold((high << LOW_BITS) | low, quota)).mask(values.contiguous()).bool()
