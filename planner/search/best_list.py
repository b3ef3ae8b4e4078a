"""The best list schedule an instance offers: lists by priorities, and lists under tuned quotas where they are longer.

Quotas make the difference where many microbatches stream through: they find the steady state in which forwards of one
direction run while gradients of the other are on their way, which annealing from a worse list does not.
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.search import lists, quotas
from mipipe.planner.search.orders import Orders

QUOTA_S = 0.3
"""Seconds in which quotas are tuned for a list, for each `QUOTA_NODES` nodes."""

QUOTA_NODES = 800
"""Nodes from which quotas are tuned: lists of smaller problems are good as they are, and annealed at once."""

MOST_S = 1.5
"""Seconds after which tuning for one list ends: a placement of many has no more, and the search goes on from there."""


def best_list(instance: Instance, seed: int, trials: int = 1000, *, few: int = QUOTA_NODES) -> Orders | None:
    """The shortest list schedule found, None where none fits the memory; ``few``: nodes from which quotas are tuned."""
    tuned = lists.best_of(instance, trials, np.random.default_rng(seed))
    lines = quotas.lines_of(instance) if instance.size >= few else None
    seconds = min(MOST_S, QUOTA_S * max(1.0, instance.size / QUOTA_NODES))
    other = quotas.tune(instance, lines, seconds, seed) if lines is not None else None
    return min((made.orders for made in (tuned, other) if made is not None),
               key=lambda orders: orders.makespan_ns, default=None)
