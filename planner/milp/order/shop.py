"""The data of one disjunctive model: jobs with release times and tails, arcs, machines, memory. Plain integers.

A `Shop` is a whole placement (`whole`) or a window of a schedule (`mipipe.planner.milp.order.windows`): what lies
before a window becomes release times and memory in use, what lies after it becomes tails. `tighten` fixes the pairs
whose order follows from a horizon, which is what makes the disjunctive model small.

A transfer is a job of its own, as long as it occupies its channel, only where the channel could make it wait: if no
transfer occupies a channel longer than the shortest of the jobs that feed it, all of them on one machine, then each is
through before the next is ready. Latency occupies nothing and is a lag.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from mipipe.planner.bounds.at_placement import heads_and_tails, reduce_tails
from mipipe.planner.jobs.job_shop import Jobs
from mipipe.planner.jobs.longest import heads_of
from mipipe.planner.sizes import NEVER_NS

NO_PATH = -NEVER_NS
"""Length of a path that is none: with any time added it is still below 0."""


@dataclass(slots=True)
class Shop:
    """Jobs 0..n-1. A job runs in ``[release, ...)`` on ``machine``; ``tail`` must follow its end.

    ``arcs``: (first, second, lag). ``rank[j]`` is -1 for transfers, whose ``tied[j]`` is the producing job. ``base``
    (in use before the first job) and ``capacity`` are bytes per rank; ``name[j]`` is the job's number in the `Jobs` the
    shop was cut from, -1 for a transfer.
    """

    durations: list[int]
    machine: list[int]
    rank: list[int]
    release: list[int]
    tail: list[int]
    arcs: list[tuple[int, int, int]]
    alloc: list[int]
    free: list[int]
    workspace: list[int]
    base: list[int]
    capacity: list[int]
    name: list[int]
    tied: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.durations)


@dataclass(slots=True)
class Tight:
    """What a horizon implies: ``before[a, b]`` where a surely ends before b starts; windows ``[release, latest]``."""

    horizon: int
    distance: np.ndarray
    release: np.ndarray
    latest: np.ndarray
    before: np.ndarray
    open_pairs: list[tuple[int, int]]


def whole(jobs: Jobs) -> Shop:
    """The shop of a whole placement.

    Raises:
        PlanError: some activations never fit together.
    """
    heads, tails = heads_and_tails(jobs)
    reduce_tails(jobs, tails)
    after = [tail - duration for tail, duration in zip(tails, jobs.durations, strict=True)]
    shop = Shop(list(jobs.durations), list(jobs.machine), [machine // 2 for machine in jobs.machine], heads, after,
                [], list(jobs.alloc), list(jobs.free), list(jobs.workspace), [0] * len(jobs.capacity),
                list(jobs.capacity), list(range(jobs.count)))
    add_transfers(shop, jobs, {job: job for job in range(jobs.count)})
    return shop


def add_transfers(shop: Shop, jobs: Jobs, number: dict[int, int]) -> None:
    """Add the arcs between the jobs in ``number``, and jobs for transfers that may have to wait; in place.

    An arc between two jobs is data, FIFO or memory; the transfer of a data arc becomes a job if its channel is
    contended.
    """
    contended = contended_channels(jobs)
    moved = {(producer, consumer): (channel, occupied) for producer, releases in enumerate(jobs.compiled.releases)
             for consumer, channel, _, _, _, occupied in releases if channel in contended and occupied}
    for first, second, lag in jobs.arcs:
        if first not in number or second not in number:
            continue
        channel, occupied = moved.get((first, second), (-1, 0))
        extra = jobs.extra[first] if jobs.extra else 0
        if not occupied:
            shop.arcs.append((number[first], number[second], lag))
            continue
        job = shop.count
        shop.durations.append(occupied)
        shop.machine.append(-2 - channel)
        shop.rank.append(-1)
        shop.release.append(shop.release[number[first]] + shop.durations[number[first]] + extra)
        shop.tail.append(lag - extra - occupied + shop.tail[number[second]] + shop.durations[number[second]])
        for column in (shop.alloc, shop.free, shop.workspace):
            column.append(0)
        shop.name.append(-1)
        if not jobs.extra:  # the two halves of a pair end together: their transfers come in any order
            shop.tied[job] = number[first]
        shop.arcs += [(number[first], job, extra), (job, number[second], lag - extra - occupied)]


def contended_channels(jobs: Jobs) -> set[int]:
    """Channels on which a transfer may have to wait for another one."""
    producers: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for producer, releases in enumerate(jobs.compiled.releases):
        for _, channel, _, _, _, occupied in releases:
            if channel >= 0 and occupied:
                producers[channel].append((producer, occupied))
    found = set()
    for channel, feeding in producers.items():
        once = len({producer for producer, _ in feeding}) == len(feeding)
        machines = {jobs.machine[producer] for producer, _ in feeding}
        longest = max(duration for _, duration in feeding)
        if not once or len(machines) > 1 or longest > min(jobs.durations[producer] for producer, _ in feeding):
            found.add(channel)
    return found


def tighten(shop: Shop, horizon: int) -> Tight | None:
    """Distances, windows and decided pairs under a horizon; None if no schedule of this length exists."""
    count = shop.count
    durations = np.array(shop.durations, dtype=np.int64)
    arcs = list(shop.arcs)
    by_machine: dict[int, list[int]] = defaultdict(list)
    for job, machine in enumerate(shop.machine):
        by_machine[machine].append(job)
    while True:
        distance = _distances(count, durations, arcs)
        if distance is None:
            return None
        release = np.array(shop.release, dtype=np.int64)
        release = np.maximum(release, (release[:, None] + distance).max(axis=0, initial=NO_PATH))
        latest = horizon - np.array(shop.tail, dtype=np.int64) - durations
        latest = np.minimum(latest, (latest[None, :] - distance).min(axis=1, initial=-NO_PATH))
        if (release > latest).any():
            return None
        before = distance >= durations[:, None]
        new, pairs = _decide(by_machine, durations, release, latest, before)
        if new is None:
            return None
        new += _follow_producers(shop, pairs, before)
        if not new:
            return Tight(horizon, distance, release, latest, before, pairs)
        arcs += new


def _decide(by_machine: dict[int, list[int]], durations: np.ndarray, release: np.ndarray, latest: np.ndarray,
            before: np.ndarray) -> tuple[list[tuple[int, int, int]] | None, list[tuple[int, int]]]:
    """Arcs for the pairs of which only one order fits the windows (None: neither does), and the open pairs."""
    new, pairs = [], []
    for members in by_machine.values():
        jobs = np.array(members)
        fits = (release + durations)[jobs][:, None] <= latest[jobs][None, :]
        known = before[np.ix_(jobs, jobs)]
        undecided = np.triu(~(known | known.T), 1)
        if (undecided & ~fits & ~fits.T).any():
            return None, []
        forced = undecided & (fits ^ fits.T)
        for a, b in zip(*np.nonzero(forced), strict=True):
            first, second = (a, b) if fits[a, b] else (b, a)
            new.append((int(jobs[first]), int(jobs[second]), 0))
        pairs += [(int(jobs[a]), int(jobs[b])) for a, b in zip(*np.nonzero(undecided & fits & fits.T), strict=True)]
    return new, pairs


def _follow_producers(shop: Shop, pairs: list[tuple[int, int]], before: np.ndarray) -> list[tuple[int, int, int]]:
    """Arcs between open transfers whose producers' order is known: a channel serves them as they become ready."""
    new = []
    for a, b in pairs:
        if a in shop.tied and b in shop.tied:
            first, second = shop.tied[a], shop.tied[b]
            if first == second or before[first, second]:
                new.append((a, b, 0))
            elif before[second, first]:
                new.append((b, a, 0))
    return new


def _distances(count: int, durations: np.ndarray, arcs: list[tuple[int, int, int]]) -> np.ndarray | None:
    """Longest paths from start to start, `NO_PATH` where there is none; None if the arcs form a cycle."""
    lags: dict[tuple[int, int], int] = {}
    for first, second, lag in arcs:
        lags[first, second] = max(lag, lags.get((first, second), 0))
    found = heads_of(durations.tolist(), ((first, second, lag) for (first, second), lag in lags.items()))
    if len(found.order) < count:
        return None
    distance = np.full((count, count), NO_PATH, dtype=np.int64)
    for job in reversed(found.order):
        row = distance[job]
        for second, lag in found.after[job]:
            step = int(durations[job]) + lag
            np.maximum(row, distance[second] + step, out=row)
            row[second] = max(row[second], step)
        row[row < 0] = NO_PATH
    return distance


def time_unit(shop: Shop, horizon: int) -> int:
    """The unit in which a solver should see times: their greatest common divisor, or a 10^6-th of the horizon."""
    values = [horizon, *shop.durations, *shop.release, *shop.tail, *(lag for _, _, lag in shop.arcs)]
    exact = math.gcd(*values) or 1
    return exact if horizon // exact <= 10**6 else max(1, horizon // 10**6)
