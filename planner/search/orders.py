"""Orders of a search's nodes on every machine: timed, held against the memory, read from a schedule.

The clock is the search's own: longest paths under the orders (`mipipe.planner.jobs.paths`), without queueing on
channels and without values in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mipipe.planner.jobs import paths
from mipipe.planner.jobs.arrays import Instance, orders_from, to_array
from mipipe.planner.plan import Schedule


@dataclass(frozen=True, slots=True)
class Orders:
    """``seq[k, :length[k]]`` is the order of machine k; ``makespan_ns`` without queueing on channels."""

    seq: np.ndarray
    length: np.ndarray
    makespan_ns: int

    def lists(self) -> list[list[int]]:
        """The orders as lists, one per machine."""
        return [[int(n) for n in row[:size]] for row, size in zip(self.seq, self.length, strict=True)]


def timed(instance: Instance, seq: np.ndarray, length: np.ndarray) -> Orders | None:
    """The orders with their makespan; None where they deadlock."""
    makespan, _ = _times(instance, seq, length)
    return Orders(seq, length, makespan) if makespan >= 0 else None


def start_times(instance: Instance, orders: Orders) -> np.ndarray:
    """The earliest start of every node under the orders, in ns."""
    return _times(instance, orders.seq, orders.length)[1]


def memory_holds(instance: Instance, seq: np.ndarray, length: np.ndarray) -> bool:
    """Whether the saved tensors and workspace of every machine's order keep within its rank's capacity."""
    return all(paths.memory_fits(seq, k, 0, length[k] - 1, 0, instance.alloc, instance.free, instance.work,
                                 instance.cap[instance.rank[seq[k, 0]]]) for k in range(instance.num_machines))


def orders_of_schedule(instance: Instance, schedule: Schedule) -> Orders | None:
    """A schedule's orders, its blocks and pairs in parts; None where they deadlock."""
    return timed(instance, to_array(orders_from(instance, schedule)), instance.lengths())


def _times(instance: Instance, seq: np.ndarray, length: np.ndarray) -> tuple[int, np.ndarray]:
    """(makespan, earliest start of every node); the makespan is -1 where the orders deadlock."""
    start, *spare = (np.zeros(instance.size, dtype=np.int64) for _ in range(4))
    makespan = paths.times(seq, length, instance.dur, instance.succ_ptr, instance.succ, instance.lag, instance.waits,
                           start, *spare)
    return int(makespan), start
