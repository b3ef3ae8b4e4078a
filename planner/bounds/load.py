"""The quick bound at a placement, by arrays: every stream's earliest start, work, and what must follow it."""

from __future__ import annotations

import numpy as np

from mipipe.planner.actions import Stream
from mipipe.planner.bounds.over_placements import Bound
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.jobs.overlap import pair_gain


def load_bound(instance: Instance) -> Bound:
    """The best over streams of earliest start + load (its share in overlapped pairs) + what must follow."""
    after, gain = instance.tail - instance.dur, pair_gain(instance.view.problem)
    values = []
    for machine in range(instance.num_machines):
        own = instance.machine == machine
        values.append(gain.shortened(int(instance.head[own].min())) + gain.shared(int(instance.dur[own].sum()))
                      + gain.shortened(int(after[own].min())))
    rank, stream = instance.machine_key[int(np.argmax(values))]
    name = "collective stream of rank" if stream is Stream.COLLECTIVE else "rank"
    return Bound(max(values), f"{name} {rank}: earliest start + load + what must follow")
