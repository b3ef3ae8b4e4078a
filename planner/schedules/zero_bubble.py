"""Schedules that put weight gradients off to fill bubbles (Qi et al., Zero Bubble Pipeline Parallelism, 2023).

W starts on rank r once r + 1 input gradients are done there: later ranks, which hold fewer microbatches, keep more
weight gradients back, so all ranks hold about the same memory and gradients travel towards the first rank sooner.
"""

from __future__ import annotations

from collections.abc import Sequence

from mipipe.planner.actions import Action
from mipipe.planner.schedules.one_f_one_b import CHUNKS, check_rounds, interleaved_step
from mipipe.planner.schedules.pattern import (
    EvenTimes,
    StagePattern,
    forward,
    input_gradient,
    one_copy,
    weight_gradient,
)


def zb_h1(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """1F1B's memory: P microbatches at most on every rank (section 2.3, ZB-H1)."""
    return one_copy(range(ranks), microbatches,
                    [_delayed(rank, microbatches, ranks - rank - 1, rank) for rank in range(ranks)], "chain")


def zb_h2(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """More forwards in the warm-up, 2 P - 1 microbatches of memory at most (section 2.3, ZB-H2)."""
    return one_copy(range(ranks), microbatches,
                    [_delayed(rank, microbatches, 2 * (ranks - rank - 1), 2 * rank) for rank in range(ranks)], "chain")


def zb1p(ranks: int, microbatches: int, times: EvenTimes | None = None, chunks: int = CHUNKS) -> StagePattern:
    """Interleaved zero bubble: interleaved 1F1B's order, with W put off by rank; with one chunk it is ZB-H1.

    Raises:
        ProblemError: the microbatches do not make whole rounds.
    """
    check_rounds(ranks, microbatches, "ZB1P")
    orders = []
    total = microbatches * chunks
    for rank in range(ranks):
        ahead = min(ranks - rank - 1 + (chunks - 1) * ranks, total)
        steps = [(interleaved_step(ranks, chunks, rank, k, True), interleaved_step(ranks, chunks, rank, k, False))
                 for k in range(total)]
        orders.append(_put_off([step for step, _ in steps], [step for _, step in steps], ahead, rank))
    return one_copy([stage % ranks for stage in range(ranks * chunks)], microbatches, orders,
                    "interleaved" if chunks > 1 else "chain")


def _delayed(rank: int, microbatches: int, ahead: int, behind: int) -> list[Action]:
    steps = [(rank, m) for m in range(microbatches)]
    return _put_off(steps, steps, min(ahead, microbatches), behind)


def _put_off(forwards: Sequence[tuple[int, int]], gradients: Sequence[tuple[int, int]], ahead: int,
             behind: int) -> list[Action]:
    """A rank's order: ``ahead`` forwards first, and ``behind`` more input than weight gradients on the way."""
    order = [forward(*step) for step in forwards[:ahead]]
    for k, step in enumerate(gradients):
        if ahead + k < len(forwards):
            order.append(forward(*forwards[ahead + k]))
        order.append(input_gradient(*step))
        if k >= behind:
            order.append(weight_gradient(*gradients[k - behind]))
    return order + [weight_gradient(*step) for step in gradients[max(0, len(gradients) - behind):]]
