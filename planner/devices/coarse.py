"""A coarse level: classes tied by dear values made one, step by step, until pieces are about as large as a layer.

On a graph of a thousand operators a piece of a few that moves is noise to the loads; on pieces of a layer's time it is
a step. Heavy-edge matching as in multilevel graph partitioning (Karypis and Kumar, SIAM J. Sci. Comput. 1998): rounds
that merge pairs of neighbours, the dearest value for the least work first. Whoever anneals the pieces goes on with the
classes from what the pieces gave.
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.devices.instances.contract import merge_classes
from mipipe.planner.devices.instances.instance import PlaceInstance

PIECES = 12
"""Pieces per device on the coarse level."""

LARGEST = 2.0
"""Work of a piece at most, in equal shares of the whole."""


def coarsen(instance: PlaceInstance, device: np.ndarray | None = None) -> tuple[PlaceInstance, np.ndarray]:
    """The instance of pieces, and the piece of every class [class].

    Args:
        instance: the classes.
        device: an assignment to keep: only classes of one device are merged, so the pieces can still hold it.
    """
    wanted = max(PIECES * instance.num_devices, 2)
    cap = LARGEST * float(instance.acc.sum()) / wanted
    small, piece, home = instance, np.arange(instance.num_classes), device
    while small.num_classes > wanted:
        labels = _matched(small, cap, home, small.num_classes - wanted)
        count = int(labels.max()) + 1
        if count == small.num_classes:
            break
        small, piece = merge_classes(small, labels), labels[piece]
        if home is not None:
            merged_home = np.zeros(count, dtype=np.int64)
            merged_home[labels] = home
            home = merged_home
    return small, piece


def _matched(small: PlaceInstance, cap: float, home: np.ndarray | None, most: int) -> np.ndarray:
    """New numbers [class] after one round of pairs, ``most`` pairs at most."""
    readers = np.diff(small.reader_start)
    source = np.repeat(small.value_source, readers)
    light = small.acc + max(float(small.acc.mean()), 1e-300)
    score = np.repeat(small.value_cost / np.maximum(readers, 1), readers) / (light[source] * light[small.readers])
    partner = np.arange(small.num_classes)
    for pin in np.argsort(-score, kind="stable").tolist():
        a, b = int(source[pin]), int(small.readers[pin])
        if (most > 0 and a != b and partner[a] == a and partner[b] == b and small.acc[a] + small.acc[b] <= cap
                and small.size[a] + small.size[b] <= small.memory / 4 and small.supported[a] == small.supported[b]
                and (home is None or home[a] == home[b])):
            partner[a], partner[b], most = b, a, most - 1
    return np.unique(np.minimum(np.arange(small.num_classes), partner), return_inverse=True)[1]
