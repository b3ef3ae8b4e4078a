"""List scheduling: a first schedule at once, and the starts of the search.

Priorities follow what every published schedule does: input gradients first, forwards next, weight gradients in the
gaps; older microbatches before younger ones. `mipipe.planner.search.list_kernel` keeps memory safe.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from mipipe.planner import clock
from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.jobs.dependencies import KINDS
from mipipe.planner.search.list_kernel import ListTask, list_schedule
from mipipe.planner.search.list_steps import interpreted
from mipipe.planner.search.orders import Orders


@dataclass(frozen=True, slots=True)
class TunedList:
    """The best list schedule of a tuning run, and the rule that gave it, which fits any number of microbatches."""

    orders: Orders
    rule: ListRule


@dataclass(frozen=True, slots=True)
class ListRule:
    """Weights of a priority, in periods (a period is the busiest machine's load per microbatch); smaller runs first.

    An action's priority is its microbatch's place in line, plus ``pace`` times its earliest start in an empty pipeline,
    plus ``forward``, ``gradient`` or ``weight`` by its phase, minus ``depth`` times its stage's number, plus noise of
    standard deviation ``noise``. A machine waits up to ``delay`` periods for a more urgent action. At most ``limit``
    microbatches are under way (pairs of them where the instance is halved).
    """

    forward: float = 50.0
    gradient: float = 0.0
    weight: float = 1e4
    pace: float = 0.0
    depth: float = 1e-3
    noise: float = 0.0
    delay: float = 0.0
    limit: int = 1 << 30


RULES = (ListRule(), ListRule(weight=60.0), ListRule(forward=1e3, weight=4.0), ListRule(forward=0.5, weight=1.0),
         ListRule(forward=0.0, gradient=50.0), ListRule(forward=0.0, pace=1.0, weight=2.0),
         ListRule(forward=2.0, pace=1.0, weight=1e3))


def sample(rng: np.random.Generator, ranks: int) -> ListRule:
    """A random rule around those that published schedules follow."""
    return ListRule(forward=float(rng.choice(np.array([rng.uniform(-2, 20), 50.0, 1e3]))),
                    weight=float(rng.choice([rng.uniform(0, 30), 1e4])),
                    pace=float(rng.choice([0.0, rng.uniform(0, 2)])), depth=float(rng.choice([1e-3, 0.05, -1e-3])),
                    noise=float(rng.choice([0.0, rng.uniform(0, 2)])),
                    delay=float(rng.choice([0.0, rng.uniform(0, 0.5)])),
                    limit=int(rng.integers(max(1, ranks // 4), 2 * ranks + 2)) if rng.random() < 0.5 else 1 << 30)


def admission(instance: Instance) -> np.ndarray:
    """For each microbatch its place in line: microbatches of different routes take turns."""
    counts: dict[tuple[int, ...], int] = {}
    place = []
    for m in range(instance.view.problem.num_microbatches):
        route = tuple(stage[m] for stage in instance.view.placement.routes)
        place.append(counts.get(route, 0))
        counts[route] = place[-1] + 1
    totals = [counts[tuple(stage[m] for stage in instance.view.placement.routes)] for m in range(len(place))]
    return np.array([(at + 0.5) / total * len(place) for at, total in zip(place, totals, strict=True)])


def priorities(instance: Instance, rule: ListRule, rng: np.random.Generator | None = None) -> np.ndarray:
    """The priority of every node under a rule."""
    offsets = np.array([rule.forward, rule.gradient - 0.5, rule.gradient, rule.weight])
    result = offsets[instance.kind] + admission(instance)[instance.own_microbatch] - rule.depth * instance.depth
    if rule.pace:
        result = result + rule.pace / max(1, period(instance)) * instance.head
    if rule.noise and rng is not None:
        result = result + rng.normal(0.0, rule.noise, instance.size)
    return result


def period(instance: Instance) -> int:
    """Load of the busiest machine per microbatch."""
    load = np.bincount(instance.machine, weights=instance.dur, minlength=instance.num_machines)
    return int(load.max()) // instance.view.problem.num_microbatches


def vary_list(rule: ListRule, rng: np.random.Generator, ranks: int) -> ListRule:
    """A rule near another one: one or two weights changed."""
    changes: dict[str, float | int] = {}
    names = ["forward", "weight", "pace", "depth", "noise", "delay", "limit", "gradient"]
    for name in (names[at] for at in rng.choice(len(names), 2)):
        if name == "limit":
            base = min(rule.limit, 2 * ranks)
            changes["limit"] = max(1, base + int(rng.integers(-2, 3)))
        elif name == "depth":
            changes["depth"] = float(rng.choice(np.array([1e-3, -1e-3, rule.depth * 2, rule.depth / 2])))
        elif name in ("noise", "delay"):
            changes[name] = float(rng.choice([0.0, rng.uniform(0.0, 0.3)]))
        else:
            now = min(float(getattr(rule, name)), 60.0)
            changes[name] = now + float(rng.normal(0.0, 1.0 + 0.1 * abs(now)))
    return replace(rule, **changes)  # type: ignore[arg-type]


def best_of(instance: Instance, trials: int, rng: np.random.Generator, seconds: float = 0.3) -> TunedList | None:
    """The shortest of the list schedules of all `RULES`, of random ones and of variations of the best so far.

    ``trials`` beyond `RULES`; no new one begins after ``seconds``. None if no rule's schedule fits the memory.
    """
    end = time.monotonic() + seconds
    ranks = instance.view.problem.num_ranks
    best: TunedList | None = None
    chosen = RULES[0]
    for number in range(len(RULES) + trials):
        clock.ask()
        rule = RULES[number] if number < len(RULES) else sample(rng, ranks) if number % 3 else vary_list(chosen, rng,
                                                                                                         ranks)
        if number > len(RULES) + 30:
            rule = vary_list(chosen, rng, ranks) if number % 3 else sample(rng, ranks)
        found = schedule(instance, rule, rng)
        if found is not None and (best is None or found.makespan_ns < best.orders.makespan_ns):
            best, chosen = TunedList(found, rule), rule
        if time.monotonic() > end:
            break
    return best


def schedule(instance: Instance, rule: ListRule, rng: np.random.Generator | None = None, *,
             compiled: bool = True) -> Orders | None:
    """The list schedule of a rule; None where the memory does not suffice for one microbatch at a time.

    ``compiled=False`` interprets the kernel: slower by a factor of a hundred, but without waiting for a compiler.
    """
    length = instance.lengths()
    seq = np.full((instance.num_machines, int(length.max())), -1, dtype=np.int64)
    start = np.zeros(instance.size, dtype=np.int64)
    chosen = list_schedule if compiled else interpreted(list_schedule)
    task = ListTask(instance.kind <= KINDS.index(ActionKind.RECOMPUTE), instance.kind == KINDS.index(ActionKind.W),
                    priorities(instance, rule, rng), int(rule.delay * period(instance)), rule.limit,
                    instance.view.problem.num_microbatches)
    makespan = chosen(instance.fixed, task, seq, start)
    return None if makespan < 0 else Orders(seq, length, int(makespan))
