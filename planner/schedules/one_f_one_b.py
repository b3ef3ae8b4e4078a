"""GPipe, 1F1B and interleaved 1F1B: backward is one action, I and W together."""

from __future__ import annotations

from mipipe.graphs.errors import ProblemError
from mipipe.planner.actions import Action
from mipipe.planner.schedules.pattern import EvenTimes, StagePattern, backward, forward, one_copy

CHUNKS = 2
"""Stages per rank of the interleaved schedules; the papers leave it open, 2 is the least that interleaves."""


def gpipe(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """All forwards, then all backwards (Huang et al., 2019)."""
    orders = [[step(rank, m) for step in (forward, backward) for m in range(microbatches)] for rank in range(ranks)]
    return one_copy(range(ranks), microbatches, orders, "chain")


def one_f_one_b(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """Warm up with one forward for each later stage, then alternate (Narayanan et al., PipeDream-Flush, 2021)."""
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, microbatches)
        order = [forward(rank, m) for m in range(ahead)]
        for m in range(microbatches - ahead):
            order += [forward(rank, ahead + m), backward(rank, m)]
        order += [backward(rank, m) for m in range(microbatches - ahead, microbatches)]
        orders.append(order)
    return one_copy(range(ranks), microbatches, orders, "chain")


def interleaved(ranks: int, microbatches: int, times: EvenTimes | None = None, chunks: int = CHUNKS) -> StagePattern:
    """1F1B with ``chunks`` stages per rank, microbatches in rounds of one per rank (Narayanan et al., 2021, fig. 4).

    The order is Megatron-LM's. Where transfers take time it takes about P of them longer than the figure that the
    zero-bubble paper prints as 1F1B-I, whose order it does not give.

    Raises:
        ProblemError: the microbatches do not make whole rounds.
    """
    check_rounds(ranks, microbatches, "interleaved 1F1B")
    orders: list[list[Action]] = []
    total = microbatches * chunks
    for rank in range(ranks):
        ahead = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, total)
        order = [forward(*interleaved_step(ranks, chunks, rank, k, True)) for k in range(ahead)]
        for k in range(total - ahead):
            order.append(forward(*interleaved_step(ranks, chunks, rank, ahead + k, True)))
            order.append(backward(*interleaved_step(ranks, chunks, rank, k, False)))
        order += [backward(*interleaved_step(ranks, chunks, rank, k, False)) for k in range(total - ahead, total)]
        orders.append(order)
    return one_copy([stage % ranks for stage in range(ranks * chunks)], microbatches, orders, "interleaved")


def check_rounds(ranks: int, microbatches: int, name: str) -> None:
    """Raise `ProblemError` unless the microbatches make whole rounds of one per rank."""
    if microbatches % ranks:
        raise ProblemError(f"{name}: {microbatches} microbatches on {ranks} ranks; it exists only for a multiple of the"
                           " ranks")


def interleaved_step(ranks: int, chunks: int, rank: int, step: int, ahead: bool) -> tuple[int, int]:
    """(stage, microbatch) of a rank's k-th forward or backward: a round through one chunk, then through the next."""
    turn, place = divmod(step, ranks * chunks)
    chunk, number = divmod(place, ranks)
    if not ahead:
        chunk = chunks - 1 - chunk
    return chunk * ranks + rank, turn * ranks + number
