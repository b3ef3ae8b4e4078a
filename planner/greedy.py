"""List scheduling: a first schedule at once, and the starts of the search.

Priorities follow what every published schedule does: input gradients first, forwards next, weight gradients in the
gaps; older microbatches before younger ones. `mipipe.planner.kernels.list_schedule` keeps memory safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mipipe.planner import kernels
from mipipe.planner.instance import Instance


@dataclass(frozen=True, slots=True)
class Orders:
    """``seq[k, :length[k]]`` is the order of machine k; ``makespan_ns`` without queueing on channels."""

    seq: np.ndarray
    length: np.ndarray
    makespan_ns: int

    def lists(self) -> list[list[int]]:
        """The orders as lists, one per machine."""
        return [[int(n) for n in row[:size]] for row, size in zip(self.seq, self.length, strict=True)]


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights of a priority: smaller runs first. ``forward``, ``gradient``, ``weight`` are offsets in microbatches.

    ``depth`` breaks ties in favour of later stages; ``noise`` is a standard deviation in microbatches; ``delay_ns`` lets
    a machine wait that long for a more urgent action.
    """

    forward: float = 50.0
    gradient: float = 0.0
    weight: float = 1e4
    depth: float = 1e-3
    noise: float = 0.0
    delay_ns: int = 0


RULES = (Rule(), Rule(weight=60.0), Rule(forward=1e3, weight=4.0), Rule(forward=0.5, gradient=0.0, weight=1.0),
         Rule(forward=0.0, gradient=50.0, weight=1e4), Rule(forward=2.0, gradient=0.0, weight=4.0, depth=0.2))


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


def priorities(instance: Instance, rule: Rule, rng: np.random.Generator | None = None) -> np.ndarray:
    """The priority of every node under a rule."""
    offsets = np.array([rule.forward, rule.gradient - 0.5, rule.gradient, rule.weight])
    microbatch = np.array([instance.compiled.actions[n].microbatch for n in instance.origin])
    result = offsets[instance.kind] + admission(instance)[microbatch] - rule.depth * instance.depth
    if rule.noise and rng is not None:
        result = result + rng.normal(0.0, rule.noise, instance.size)
    return result


def schedule(instance: Instance, rule: Rule, rng: np.random.Generator | None = None, *,
             compiled: bool = True) -> Orders | None:
    """The list schedule of a rule; None where the memory does not suffice for one microbatch at a time.

    ``compiled=False`` interprets the kernel: slower by a factor of a hundred, but without waiting for a compiler.
    """
    length = instance.lengths()
    seq = np.full((instance.num_machines, int(length.max())), -1, dtype=np.int64)
    start = np.zeros(instance.size, dtype=np.int64)
    kernel = kernels.list_schedule if compiled else kernels.list_schedule.py_func
    makespan = kernel(instance.machine, instance.rank, instance.dur, instance.succ_ptr, instance.succ, instance.lag,
                      instance.waits, instance.base, instance.machine[instance.base[:-1]], instance.alloc, instance.free,
                      instance.work, instance.cap, instance.microbatch, instance.view.problem.num_microbatches,
                      instance.num_machines, priorities(instance, rule, rng), rule.delay_ns, seq, start)
    return None if makespan < 0 else Orders(seq, length, int(makespan))
