"""That no program waits for ever where the first use of a communicator keeps the host until all members use it.

With gloo SEND and RECV announce and go on, as `mipipe.planner.check.waits` has it. NCCL makes a communicator, or a
connection, inside its first use, and the host stays there until every member has come. The rule here is the stricter
of both: all waits of a program, and in addition each rank's first use of a communicator is over only when every other
member has done all that it does before its own first use. No cycle in these means no deadlock on either backend,
whatever the durations are. What ranks do at start-up (`mipipe.planner.execution.opening`) comes before their programs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from mipipe.graphs.errors import ProgramError
from mipipe.planner.actions import ActionKind
from mipipe.planner.check.facts import Demands
from mipipe.planner.check.waits import Places, deadlock_text, in_order, waits_of
from mipipe.planner.execution.opening import Communicator
from mipipe.planner.program import Program

Openings = Sequence[Sequence[Communicator]]
"""What each rank opens at start-up, in its order."""


def check_contact(facts: Demands, program: Program, places: Places, openings: Openings) -> None:
    """Check that all ranks come to the end where first contact blocks the host; ``openings`` () for no start-up.

    Raises:
        ProgramError: ranks wait for each other, or a rank waits for a member that never comes.
    """
    needs = waits_of(facts, program, places)
    for rank, items in enumerate(openings):
        for index in range(-len(items), 0):
            needs[rank, index] = [(rank, index - 1)] if (rank, index - 1) in needs else []
        if items and program.ranks[rank]:
            needs[rank, 0].append((rank, -1))
    for communicator, first in _first_uses(program, openings).items():
        for rank in communicator.members:
            if rank not in first:
                raise ProgramError(f"program: first contact: rank {rank} never uses the {communicator}, for which"
                                   " others wait")
        for rank, index in first.items():
            needs[rank, index] += [(other, at - 1) for other, at in first.items()
                                   if other != rank and (other, at - 1) in needs]
    order = in_order(needs)
    if len(order) < len(needs):
        text = deadlock_text(program, needs, set(order), openings)
        raise ProgramError(text.replace("program: deadlock: ", "program: deadlock at first contact: ", 1))


def _first_uses(program: Program, openings: Openings) -> dict[Communicator, dict[int, int]]:
    """For each communicator, the index of each rank's first use; negative: at start-up."""
    found: dict[Communicator, dict[int, int]] = defaultdict(dict)
    for rank, items in enumerate(openings):
        for place, communicator in enumerate(items):
            found[communicator].setdefault(rank, place - len(items))
    for rank in range(len(program.ranks)):
        for index, communicator in _uses(program, rank):
            found[communicator].setdefault(rank, index)
    return found


def _uses(program: Program, rank: int) -> Iterator[tuple[int, Communicator]]:
    for index, item in enumerate(program.ranks[rank]):
        if item.kind in (ActionKind.SEND, ActionKind.RECV) and item.transfer is not None:
            move = program.transfers[item.transfer]
            yield index, Communicator(False, (move.source_rank, move.target_rank))
        elif item.kind is ActionKind.ALL_REDUCE and len(set(item.peers)) > 1:
            yield index, Communicator(True, tuple(sorted(set(item.peers))))
