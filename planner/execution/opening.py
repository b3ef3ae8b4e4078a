"""Which communicators the ranks of a program share, and the order in which they are opened before its first step.

Backends make a communicator at its first use and keep the host there until all members have come (NCCL). A program that
sends first on two ranks would then stop both. So every communicator is used once at start-up, by all ranks in one
global order; `mipipe.planner.check.contact` proves that nothing waits for ever then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mipipe.planner.actions import ActionKind
from mipipe.planner.program import Program


@dataclass(frozen=True, slots=True, order=True)
class Communicator:
    """Ranks with a queue of their own: a directed channel from the first member to the second, or, ``together``, a
    sorted set that reduces."""

    together: bool
    members: tuple[int, ...]

    def __str__(self) -> str:
        return f"sum over ranks {', '.join(map(str, self.members))}" if self.together else \
            f"channel from rank {self.members[0]} to {self.members[1]}"


def opening_order(program: Program, shared: Iterable[Iterable[int]] = ()) -> tuple[Communicator, ...]:
    """Every communicator of the program once: channels, then sets of ranks that reduce, each sorted.

    ``shared``: further sets of ranks that reduce together (tied parameters).
    """
    channels = {(move.source_rank, move.target_rank) for move in program.transfers}
    sets = {tuple(sorted(set(ranks))) for ranks in shared}
    sets |= {tuple(sorted(set(item.peers))) for instructions in program.ranks for item in instructions
             if item.kind is ActionKind.ALL_REDUCE}
    return (*(Communicator(False, pair) for pair in sorted(channels)),
            *(Communicator(True, members) for members in sorted(sets) if len(members) > 1))


def openings(program: Program) -> list[tuple[Communicator, ...]]:
    """For each rank the communicators that it opens, in the global order."""
    order = opening_order(program)
    return [tuple(item for item in order if rank in item.members) for rank in range(len(program.ranks))]
