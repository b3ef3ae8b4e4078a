"""Overlapped pairs in a placement's job shop: a relaxation without pairs, and a bound that counts them.

**Shares** (`relaxed`). Within a pair let F, then I, then W take r times their own durations, one after the other
(r: `mipipe.planner.jobs.overlap`). These shares lie inside the pair, so they never meet on a machine; each starts no
sooner than its predecessors allow, takes its memory no sooner and returns it no later than the pair does. What waits
for F waits for the pair's end, at least ``min(f, r (f + b))`` after F's share starts; what waits for I, at least
``min(i, r (i + w))`` after I's. So every schedule with pairs is one of a plain job shop with shorter jobs and some
lags, and bounds on that one hold. FIFO and memory arcs stay: they compare starts and ends of shares, which sorting
keeps (`mipipe.planner.jobs.job_shop`).

**Counting** (`pairing_bound`). A pair needs its input gradient, so forwards that start before any gradient can are
alone, and as many backwards stay alone; a pair ends with its forward, so backwards that end later than any forward can
are alone, and as many forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.jobs.job_shop import Jobs
from mipipe.planner.jobs.overlap import pair_gain


def relaxed(jobs: Jobs) -> Jobs:
    """The job shop of which every schedule with pairs is one; the given one where pairs gain nothing.

    Its ``extra[j]``, part of the arcs' lags, is how long after the end of j's share what waits for j goes on waiting.
    """
    gain = pair_gain(jobs.view.problem)
    if gain.ratio == 1:
        return jobs
    actions, index, shares, extra = jobs.compiled.actions, jobs.compiled.index, [], []
    for action, duration in zip(actions, jobs.durations, strict=True):
        share = least = duration
        partner = _backward(action)
        if action.kind is ActionKind.F:
            share, least = gain.shared(duration), gain.shortened(duration)
        elif action.kind is ActionKind.B:
            share = least = gain.shared(duration)
        elif partner is not None and partner in index:
            share = gain.shared(duration)
            both = gain.shared(duration + jobs.durations[index[partner]])
            least = min(duration, both) if action.kind is ActionKind.I else share
        shares.append(share)
        extra.append(least - share)
    arcs = [(first, second, lag if _backward(actions[first]) == actions[second] else lag + extra[first])
            for first, second, lag in jobs.arcs]
    return replace(jobs, durations=shares, arcs=arcs, extra=extra)


def _backward(action: Action) -> Action | None:
    """The other gradient of an I or a W: the two are the backward half of a pair."""
    other = {ActionKind.I: ActionKind.W, ActionKind.W: ActionKind.I}.get(action.kind)
    return None if other is None else Action(action.stage, other, action.microbatch)


def pairing_bound(jobs: Jobs, members: Sequence[int], heads: Sequence[int], tails: Sequence[int]) -> int:
    """The least makespan of one machine's jobs, by the number of pairs it can have (module docstring).

    Args:
        jobs: the relaxed shop; true durations are those it was compiled with.
        members: the machine's jobs.
        heads, tails: earliest starts, and longest paths from them, of the relaxed shop.
    """
    if not jobs.extra:
        return 0
    durations, actions = jobs.compiled.durations, jobs.compiled.actions
    forwards = [j for j in members if actions[j].kind is ActionKind.F]
    backwards: list[tuple[int, ...]] = [(j,) for j in members if actions[j].kind is ActionKind.B]
    for j in members:
        partner = _backward(actions[j])
        if actions[j].kind is ActionKind.I and partner is not None and partner in jobs.compiled.index:
            backwards.append((j, jobs.compiled.index[partner]))
    if not forwards or not backwards:
        return 0
    after = {j: tails[j] - jobs.durations[j] - jobs.extra[j] for j in members}
    one, two = [durations[j] for j in forwards], [sum(durations[j] for j in parts) for parts in backwards]
    load = sum(durations[j] for j in members)
    rest = load - sum(one) - sum(two)
    first_gradient, after_forward = min(heads[parts[0]] for parts in backwards), min(after[j] for j in forwards)
    start, end = min(heads[j] for j in members), min(after.values())
    ratio = pair_gain(jobs.view.problem).ratio
    begin = _gained(one, two, ratio, first_gradient - start, rest, len(one) if rest else _held_at_once(jobs, forwards))
    finish = _gained(two, one, ratio, after_forward - end, rest, len(two))
    return load + max(first_gradient - begin + end, after_forward - finish + start)


def _held_at_once(jobs: Jobs, forwards: Sequence[int]) -> int:
    """Most of a machine's forwards that fit its rank's memory before anything is returned."""
    sizes = sorted(max(0, jobs.alloc[j] - jobs.free[j]) for j in forwards)
    room = jobs.capacity[jobs.machine[forwards[0]] // 2]
    return sum(total <= room for total in accumulate(sizes))


def _gained(alone: Sequence[int], other: Sequence[int], ratio: Fraction, window: int, rest: int, most: int) -> int:
    """Most time gained by work done in a window without pairs, and by pairs outside it.

    Up to ``most`` of ``alone``, with all ``rest`` of the work, run in the window (partly), and are in no pair.
    """
    largest, others = [0, *accumulate(sorted(alone, reverse=True))], [0, *accumulate(sorted(other, reverse=True))]
    best = 0
    for count in range(most + 1):
        pairs = min(len(alone) - count, len(other))
        done = min(max(0, window), largest[count] + rest)
        best = max(best, done + int((1 - ratio) * (largest[pairs] + others[pairs])))
        if done >= window:
            break
    return best
