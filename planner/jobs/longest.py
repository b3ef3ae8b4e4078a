"""Longest paths through jobs and arcs given as lists. `mipipe.planner.jobs.arcs.longest` is for arrays.

An arc is (first, second, lag): second starts at least ``lag`` after the end of first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mipipe.planner import clock


@dataclass(frozen=True, slots=True)
class Heads:
    """``after[j]``: what waits for job j, with its lag; ``order``: the jobs, each after all it waits for, those behind
    a cycle left out; ``heads[j]``: the longest path to the start of j."""

    after: list[list[tuple[int, int]]]
    order: list[int]
    heads: list[int]


def heads_of(durations: Sequence[int], arcs: Iterable[tuple[int, int, int]]) -> Heads:
    """Longest paths to the start of every job."""
    count = len(durations)
    after: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    waits = [0] * count
    for first, second, lag in arcs:
        after[first].append((second, lag))
        waits[second] += 1
    order = [job for job in range(count) if not waits[job]]
    heads = [0] * count
    for job in clock.asking(order):
        end = heads[job] + durations[job]
        for second, lag in after[job]:
            if heads[second] < end + lag:
                heads[second] = end + lag
            waits[second] -= 1
            if not waits[second]:
                order.append(second)
    return Heads(after, order, heads)


def tails_of(found: Heads, durations: Sequence[int], beyond: Sequence[int] = ()) -> list[int]:
    """Longest path from the start of every job to the end; ``beyond``: what follows a job that nothing waits for."""
    after, tails = found.after, [0] * len(durations)
    for job in reversed(found.order):
        last = beyond[job] if beyond else 0
        tails[job] = durations[job] + max((lag + tails[second] for second, lag in after[job]), default=last)
    return tails
