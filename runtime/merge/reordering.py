"""How the rows and columns of one model of a merge map to another's: experts, hidden units, heads in another order."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reordering:
    """How one input's rows and columns map to the base's order: lists of source indices, None where unchanged.

    ``blocks`` reorders runs of ``block_rows`` rows (experts of a stacked bank, one row per expert in a router).
    """

    blocks: tuple[int, ...] | None = None
    block_rows: int = 1
    rows: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)
    """Hidden-unit order inside a block, by the block's number in the base's order; -1 of units that a widened tensor
    has from another model alone."""
    instead: str = ""
    """The unit whose tensor of the same model is read in place of this one (experts stored one by one)."""

    def spread(self, value: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of a whole table ``[rows, columns]`` in the wide shape, with zeros in columns that are another model's
        alone; and which of the rows the model has ``[rows, 1]``."""
        rows = self.rows.get(0, torch.arange(len(value)))[start:stop]
        value = value[rows.clamp_min(0)]
        if 0 in self.columns:
            places = self.columns[0]
            value = torch.where((places < 0).to(value.device), 0, value[:, places.clamp_min(0)])
        return value, (rows >= 0).to(value.device)[:, None]
