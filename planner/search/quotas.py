"""List schedules under quotas: at most so many microbatches under way in each stage of a rank. For large instances.

1F1B is such a rule: rank r holds at most P - r microbatches, gradients come first. Quotas that sum to no more than a
rank's memory cannot block it, so the kernel needs no look-ahead and is fast. A `QuotaRule` fits any number of
microbatches, so it is tuned on few and used on many.

`tune` changes quotas and priorities of runs of neighbouring stages at random and keeps what is not much worse. What
is lost is lost at the two ends of the step; in between ranks hardly wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mipipe.planner import clock
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.search import lists
from mipipe.planner.search.orders import Orders
from mipipe.planner.search.quota_kernel import QuotaTask, quota_schedule
from mipipe.planner.sizes import MOST_COUNT


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines are the stages of ranks; per line: ``size`` bytes of one activation, microbatches ``count``, ``machine``,
    ``residence`` from the start of F to the end of the last gradient in an empty pipeline, ``interval`` between two of
    its microbatches on average, ``stage``. Per class its ``line``, and what it is to the kernel."""

    class_ptr: np.ndarray
    class_list: np.ndarray
    line: np.ndarray
    enters: np.ndarray
    leaves: np.ndarray
    filler: np.ndarray
    kind: np.ndarray
    class_stage: np.ndarray
    place: np.ndarray
    cap: np.ndarray
    stage: np.ndarray
    machine: np.ndarray
    size: np.ndarray
    count: np.ndarray
    residence: np.ndarray
    interval: np.ndarray
    time_ns: float


@dataclass(frozen=True, slots=True)
class QuotaRule:
    """``quota`` per line, ``ramp`` until its first microbatch has left; an action's priority is its class's ``offset``
    plus ``age`` times its place in line; a rank waits ``delay`` mean durations for better than a weight gradient."""

    quota: np.ndarray
    ramp: np.ndarray
    offset: np.ndarray
    age: float
    delay: float
    in_turn: bool = False


@dataclass(frozen=True, slots=True)
class TunedQuotas:
    """The best schedule of a tuning run, its rule, and how many were tried."""

    orders: Orders
    rule: QuotaRule
    tried: int


def lines_of(instance: Instance) -> Lines | None:
    """The lines of an instance; None where a rank has two streams, or microbatches of a line differ in size."""
    if len({rank for rank, _ in instance.machine_key}) < instance.num_machines:
        return None
    first = instance.base[:-1]
    if (instance.alloc != instance.alloc[first][instance.cls]).any():
        return None
    kind, stage, machine = instance.kind[first], instance.depth[first], instance.machine[first]
    keys, line = np.unique(np.stack([stage, machine]), axis=1, return_inverse=True)
    line = line.reshape(-1)
    last = np.zeros(keys.shape[1], dtype=np.int64)
    np.maximum.at(last, line, kind)
    begins, ends = np.zeros_like(last), np.zeros_like(last)
    done = instance.head[first] + instance.dur[first]
    enters, leaves = kind == 0, (kind == last[line]) & (kind >= 2)
    begins[line[enters]], ends[line[leaves]] = instance.head[first][enters], done[leaves]
    size, count = np.zeros_like(last), np.zeros_like(last)
    size[line[enters]] = instance.alloc[first][enters]
    count[line[enters]] = np.diff(instance.base)[enters]
    span = lists.period(instance) * instance.view.problem.num_microbatches
    return Lines(np.searchsorted(np.sort(machine), np.arange(instance.num_machines + 1)),
                 np.argsort(machine, kind="stable"), line, enters, leaves, kind == 3, kind, stage,
                 lists.admission(instance)[instance.own_microbatch],
                 instance.cap[np.array([rank for rank, _ in instance.machine_key])], keys[0], keys[1], size, count,
                 np.maximum(0, ends - begins), span / np.maximum(1, count), float(instance.dur.mean()))


def run_rule(instance: Instance, lines: Lines, rule: QuotaRule) -> Orders | None:
    """The list schedule of a rule; None where it runs into its limits for good."""
    return _run(instance, lines, rule)[0]


def _run(instance: Instance, lines: Lines, rule: QuotaRule) -> tuple[Orders | None, float]:
    """The list schedule, and its cost in a search: a slope on the mean end of the ranks on plateaus of the makespan."""
    length = instance.lengths()
    seq = np.full((instance.num_machines, int(length.max())), -1, dtype=np.int64)
    start = np.zeros(instance.size, dtype=np.int64)
    task = QuotaTask(lines.class_ptr, lines.class_list, lines.line, lines.enters, lines.leaves, lines.filler,
                     lines.place, lines.cap, rule.quota, rule.ramp, rule.offset, float(rule.age),
                     int(rule.delay * lines.time_ns), rule.in_turn)
    makespan = quota_schedule(instance.fixed, task, seq, start)
    if makespan < 0:
        return None, np.inf
    last = seq[np.arange(instance.num_machines), length - 1]
    return Orders(seq, length, int(makespan)), makespan + TILT * float((start[last] + instance.dur[last]).mean())


def moved(rule: QuotaRule, old: Lines, new: Lines) -> QuotaRule:
    """A rule for the same placement with another number of microbatches."""
    quota = {key: at for at, key in enumerate(zip(old.stage.tolist(), old.machine.tolist(), strict=True))}
    place = {key: at for at, key in enumerate(zip(old.line.tolist(), old.kind.tolist(), strict=True))}
    own = [quota.get(key, -1) for key in zip(new.stage.tolist(), new.machine.tolist(), strict=True)]
    usual = next(first_rules(new))
    kinds = zip(new.line.tolist(), new.kind.tolist(), strict=True)
    classes = [place.get((own[line], kind), -1) for line, kind in kinds]
    return replace(rule, quota=np.where(np.array(own) >= 0, rule.quota[own], usual.quota),
                   ramp=np.where(np.array(own) >= 0, rule.ramp[own], usual.ramp),
                   offset=np.where(np.array(classes) >= 0, rule.offset[classes], usual.offset))


def quotas(lines: Lines, slack: float) -> np.ndarray:
    """``slack`` times what a steady stream needs, at least 1; then what memory is left, in proportion."""
    need = lines.residence / lines.interval
    quota = np.maximum(1, np.ceil(slack * need)).astype(np.int64)
    for machine, room in enumerate(lines.cap.tolist()):
        own = [number for number in np.flatnonzero(lines.machine == machine).tolist() if lines.size[number] > 0]
        used = sum(int(quota[n] * lines.size[n]) for n in own)
        while used > room and any(quota[n] > 1 for n in own):
            most = max((n for n in own if quota[n] > 1), key=lambda n: int(quota[n] * lines.size[n]))
            quota[most] -= 1
            used -= int(lines.size[most])
        while fitting := [n for n in own if used + lines.size[n] <= room and quota[n] < lines.count[n]]:
            least = min(fitting, key=lambda n: (quota[n] + 1) / max(1e-9, float(need[n])))
            quota[least] += 1
            used += int(lines.size[least])
    quota[lines.size == 0] = MOST_COUNT  # what keeps nothing has no limit
    return quota


def even_quotas(lines: Lines) -> np.ndarray:
    """Equally many microbatches for every line of a rank, as many as fit."""
    total = np.zeros(len(lines.cap), dtype=np.int64)
    np.add.at(total, lines.machine, lines.size)
    return np.where(lines.size > 0, np.maximum(1, lines.cap // np.maximum(1, total))[lines.machine], MOST_COUNT)


def first_rules(lines: Lines) -> Iterator[QuotaRule]:
    """Rules to begin with: input gradients first, weight gradients last, older or farther microbatches first."""
    even = even_quotas(lines)
    for slack in (1.5, 1.0, 2.0):
        quota = quotas(lines, slack)
        for ahead in (1e4, 16.0, 4.0):
            offset = np.array([0.0, -ahead, -ahead, 1e6])[lines.kind] - 1e-3 * lines.class_stage
            for age in (1e-6, 1.0, 0.1):
                for delay in (0.25, 0.0, 0.1):
                    for ramp in (quota, even):
                        yield QuotaRule(quota, ramp, offset, age, delay)


def tune(instance: Instance, lines: Lines, seconds: float, seed: int, *, start: QuotaRule | None = None,
         rules: Callable[[Lines], Iterator[QuotaRule]] = first_rules, evaluations: int = 1 << 40,
         stop: Callable[[], bool] = lambda: False) -> TunedQuotas | None:
    """The best rule found in some seconds or evaluations, whichever end first; None if none gives a schedule.

    It starts from ``start`` or from the best of ``rules``. Where evaluations decide, a seed always gives one rule. As
    long as none gives a schedule, the seconds do not count before all of ``rules`` were tried.
    """
    rng = np.random.default_rng(seed)
    began = time.monotonic()
    best = current = None
    best_cost = current_cost = np.inf
    fresh = iter([start]) if start is not None else rules(lines)
    tried = 0
    while tried < evaluations and not stop():
        clock.ask()
        over = time.monotonic() - began >= seconds
        if best is not None and over:
            break
        rule = next(fresh, None)
        if rule is None:
            if current is None or over:
                return None
            rule = vary_quotas(lines, current, rng)
        orders, cost = _run(instance, lines, rule)
        tried += 1
        if tried == 1:
            began = time.monotonic()  # the first one may have waited for the compiler
        left = 1 - max(tried / evaluations, (time.monotonic() - began) / max(seconds, 1e-9))
        if cost <= current_cost - HOT * lines.time_ns * max(0.0, left) * np.log(rng.random()):
            current, current_cost = rule, cost
        if orders is not None and cost < best_cost:
            best, best_cost = TunedQuotas(orders, rule, tried), cost
    return None if best is None else replace(best, tried=tried)


HOT = 0.4
"""Temperature at the beginning of `tune`, in mean durations; it falls to 0."""

TILT = 0.02
"""Weight of the ranks' mean end in a rule's cost."""


def vary_quotas(lines: Lines, rule: QuotaRule, rng: np.random.Generator) -> QuotaRule:
    """A rule near another one: a quota, an offset, the age or the delay changed, for a run of neighbouring stages."""
    quota, ramp, offset, age, delay = rule.quota.copy(), rule.ramp.copy(), rule.offset.copy(), rule.age, rule.delay
    stages = int(lines.class_stage.max()) + 1
    for _ in range(int(rng.integers(1, 3))):
        choice = rng.random()
        size = int(rng.choice([1, 1, 2, 4, 8, max(1, stages // 8), max(1, stages // 4), stages]))
        low = int(rng.integers(-size + 1, stages))
        if choice < 0.45:
            inside = (lines.stage >= low) & (lines.stage < low + size) & (lines.size > 0)
            step = int(rng.choice([-2, -1, 1, 2]))
            chosen = quota if rng.random() < 0.5 else ramp
            chosen[inside] = np.clip(chosen[inside] + step, 1, lines.count[inside])
        elif choice < 0.9:
            inside = (lines.class_stage >= low) & (lines.class_stage < low + size)
            inside &= lines.kind == int(rng.choice([0, 2, 3]))
            offset[inside] += rng.normal() * float(rng.choice([0.5, 2.0, 8.0]))
        elif choice < 0.95:
            delay = max(0.0, delay + 0.1 * rng.normal())
        else:
            age = float(np.clip(age * np.exp(0.5 * rng.normal()), 1e-6, 3.0))
    return QuotaRule(quota, ramp, offset, age, delay, rule.in_turn)
