"""What ranks tell each other during a merge: small objects, gathered by all; alone, the identity."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(days=7)
"""Ranks wait for the slowest. A rank that died needs no timeout: whoever started the ranks then ends the others."""


class MergeRanks:
    """The ranks of a merge. A context manager: torch.distributed with gloo when there is more than one rank."""

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    def alone(cls) -> MergeRanks:
        """One rank, whatever the environment says."""
        return cls(0, 1, 0)

    @classmethod
    def from_torchrun(cls) -> MergeRanks:
        """This process's place among torchrun's."""
        return cls(*(int(os.environ.get(name, default)) for name, default
                     in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))))

    def __enter__(self) -> MergeRanks:
        if self.size > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.size > 1 and kind is None:
            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)
