"""DualPipe and its V-shaped half, DualPipeV (DeepSeek-V3 technical report, 2024; eight phases as in its release).

Both let each rank hold two stages, 0 and 1, and run the same eight phases; in DualPipe the two are replicas for the two
directions of a two-way chain, in DualPipeV the two ends of a V. A forward and a backward that run together are one
OVERLAP_F_B action; a backward with its weight gradient put off is an I whose W comes later, oldest first.
"""

from __future__ import annotations

from collections import deque

from mipipe.graphs.errors import ProblemError
from mipipe.planner.actions import Action
from mipipe.planner.schedules.pattern import (
    EvenTimes,
    StagePattern,
    backward,
    forward,
    input_gradient,
    one_copy,
    overlapped,
    weight_gradient,
)


def dualpipe(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """A chain of one stage per rank, run from both ends: the first half of the microbatches down, the others up.

    Raises:
        ProblemError: an odd number of ranks or of microbatches, or fewer than two microbatches per rank.
    """
    if ranks % 2 or microbatches % 2 or microbatches < 2 * ranks:
        raise ProblemError(f"DualPipe: {microbatches} microbatches on {ranks} ranks; it exists only for an even number"
                           " of ranks and an even number of microbatches, at least twice the ranks")
    half, each = ranks // 2, microbatches // 2
    stages = tuple((stage, ranks - 1 - stage) for stage in range(ranks))
    routes = tuple((stage,) * each + (ranks - 1 - stage,) * each for stage in range(ranks))
    orders = []
    for rank in range(ranks):
        down, up = (rank, 0), (ranks - 1 - rank, each)  # the two stages here, and their first microbatches
        near = (down, up) if rank < half else (up, down)
        orders.append(_eight_phases(min(rank, ranks - 1 - rank), half, each, near))
    return StagePattern(stages, routes, tuple(map(tuple, orders)), "two-way")


def dualpipe_v(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """A V of two stages per rank: the half of DualPipe that its mirror image completes.

    Raises:
        ProblemError: fewer than two microbatches per rank.
    """
    if microbatches < 2 * ranks:
        raise ProblemError(f"DualPipeV: {microbatches} microbatches on {ranks} ranks; it exists only for at least twice"
                           " as many microbatches as ranks")
    last = 2 * ranks - 1
    orders = [_eight_phases(rank, ranks, microbatches, ((rank, 0), (last - rank, 0))) for rank in range(ranks)]
    return one_copy([*range(ranks), *reversed(range(ranks))], microbatches, orders, "v")


def _eight_phases(place: int, places: int, count: int, stages: tuple[tuple[int, int], tuple[int, int]]) -> list[Action]:
    """The order of the rank that is ``place``-th of ``places`` from its end, with ``count`` microbatches per stage.

    ``stages`` are (stage, first microbatch) of the near (0) and the far (1) stage. The release's names of the phases
    are in the comments.
    """
    order: list[Action] = []
    put_off: deque[tuple[int, int]] = deque()
    started, returned = [0, 0], [0, 0]

    def take(counter: list[int], which: int) -> tuple[int, int]:
        stage, first = stages[which]
        counter[which] += 1
        return stage, first + counter[which] - 1

    def ahead(which: int) -> None:
        order.append(forward(*take(started, which)))

    def back(which: int, later: bool = False) -> None:
        target = take(returned, which)
        order.append(input_gradient(*target) if later else backward(*target))
        if later:
            put_off.append(target)

    def both(which: int) -> None:
        order.append(overlapped(take(started, which), take(returned, 1 - which)))

    def weight() -> None:
        order.append(weight_gradient(*put_off.popleft()))

    beyond = places - place - 1
    for _ in range(2 * beyond):  # nF0
        ahead(0)
    for _ in range(place + 1):  # nF0F1
        ahead(0)
        ahead(1)
    for _ in range(beyond):  # nB1W1F1
        back(1, later=True)
        weight()
        ahead(1)
    for step in range(count - 2 * places + place + 1):  # nF0B1F1B0
        if step == 0 and beyond == 0:
            ahead(0)  # the innermost rank does not overlap its first pair
            back(1)
        else:
            both(0)
        both(1)
    for _ in range(beyond):  # nB1F1B0
        back(1)
        both(1)
    later = False
    for step in range(place + 1):  # nB1B0, of which the second half puts its weight gradients off
        later = later or (step == (place + 1) // 2 and place % 2 == 1)
        back(1, later)
        later = later or (step == (place + 1) // 2 and place % 2 == 0)
        back(0, later)
    for _ in range(beyond):  # nWB0
        weight()
        back(0, later=True)
    for _ in range(place + 1):  # nW
        weight()
    return order
