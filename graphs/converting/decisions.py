"""Decisions of conversions that need statistics but no tensors: how many groups, who joins whom, which neuron where."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


def groups_per_layer(usage: Sequence[Sequence[float]], average: int, whole: Collection[int] = ()) -> list[int]:
    """The number of merged experts in each layer, ``average`` on average (M-SMoE, arXiv 2310.01334).

    Each layer's usage is scaled to a maximum of one; the threshold is the value at place ``average * layers`` of all
    values in descending order, and a layer keeps as many groups as it has values above it, at least one. Equal values
    at the threshold make fewer groups. Layers ``whole`` count with all their experts.
    """
    scaled = [np.ones(len(row)) if number in whole else np.asarray(row, np.float64) / (max(row) or 1.0)
              for number, row in enumerate(usage)]
    values = np.sort(np.concatenate(scaled))[::-1]
    threshold = values[min(average * len(scaled), len(values) - 1)]
    return [len(row) if number in whole else max(1, int((row > threshold).sum())) for number, row in enumerate(scaled)]


def join_groups(usage: Sequence[float], similarity: Table, count: int, capacity: int | None = None) -> list[list[int]]:
    """Groups of experts, each led by one of the ``count`` most used ones (M-SMoE).

    The others join, in order of falling usage, the leader they are most similar to that has room left (of ``capacity``
    experts in all); where none has, the most similar one.
    """
    order = sorted(range(len(usage)), key=lambda expert: (-usage[expert], expert))
    groups = {leader: [leader] for leader in order[:count]}
    for expert in order[count:]:
        open_ones = [leader for leader, members in groups.items() if capacity is None or len(members) < capacity]
        groups[max(open_ones or groups, key=lambda leader: similarity[expert, leader])].append(expert)
    return list(groups.values())


def pseudo_groups(saliency: Sequence[float], distance: Table, count: int, size: int) -> list[list[int]]:
    """Groups by their leaders' numbers, each led by one of the ``count`` most salient experts (REAM, arXiv 2604.04356).

    From the most salient leader on, each takes the ``size - 1`` nearest experts that are left; where none is, groups
    are single.
    """
    order = sorted(range(len(saliency)), key=lambda expert: (-saliency[expert], expert))
    groups, left = {leader: [leader] for leader in order[:count]}, order[count:]
    for leader, members in groups.items():
        nearest = sorted(left, key=lambda expert: (distance[leader, expert], expert))[:size - 1]
        members += nearest
        left = [expert for expert in left if expert not in nearest]
    return [groups[leader] for leader in sorted(groups)]


def alike_neighbours(similarity: Table, group: int) -> list[int]:
    """An order of the experts in which those that are alike are neighbours: each run of ``group`` starts with the first
    expert that is left and takes the ones most similar to it on average over the run."""
    left, order = list(range(len(similarity))), list[int]()
    while left:
        run = [left.pop(0)]
        while left and len(run) < group:
            nearest = max(left, key=lambda expert: (similarity[expert, run].mean(), -expert))
            left.remove(nearest)
            run.append(nearest)
        order += run
    return order


def snake_deal(importance: Sequence[float], experts: int, shared: int = 0) -> tuple[list[int], list[list[int]]]:
    """Neurons of the shared expert, and of each of the others, by falling importance (arXiv 2512.02351).

    The first ``shared`` go to the shared expert, the rest row by row to the experts, every other row in reverse. What
    does not fill a row goes to the shared expert as well.
    """
    order = sorted(range(len(importance)), key=lambda neuron: (-importance[neuron], neuron))
    shared += (len(order) - shared) % experts
    rows = np.array(order[shared:], dtype=int).reshape(-1, experts)
    rows[1::2] = rows[1::2, ::-1]
    return order[:shared], [column.tolist() for column in rows.T]


def cluster_domains(losses: Table, count: int) -> list[list[int]]:
    """Domains in ``count`` clusters by affinity (DIVE, arXiv 2506.09351; reconstructed from the abstract).

    ``losses[a, b]``: the log perplexity on b of the model pruned for a. Each column less its mean, the table is made
    symmetric; domains whose rows correlate are alike, and merge by average linkage.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # here: few conversions cluster, and scipy takes 40 MB

    centred = losses - losses.mean(0, keepdims=True)
    affinity = (centred + centred.T) / 2
    with np.errstate(invalid="ignore"):  # of rows without any differences
        distance = 1 - np.corrcoef(affinity)
    upper = distance[np.triu_indices(len(losses), 1)]
    labels = fcluster(linkage(np.nan_to_num(upper, nan=1.0), "average"), count, "maxclust")
    found = [[int(item) for item in np.flatnonzero(labels == label)] for label in sorted(set(labels.tolist()))]
    while len(found) < count:  # ties of distances join more than asked for
        largest = max(found, key=len)
        found.append([largest.pop()])
    return found


def low_rank(rows: int, columns: int, ratio: float) -> int:
    """The rank at which two factors have ``ratio`` of a matrix's parameters, rounded up (MC-SMoE)."""
    return min(-(-round(ratio * 1e9) * rows * columns // (10**9 * (rows + columns))), rows, columns)


def kept_fraction(step: int, first: int, last: int, final: float) -> float:
    """The share of rows that are left at a step: one before ``first``, ``final`` from ``last`` on, cubic between
    (MC-SMoE)."""
    if step < first:
        return 1.0
    if step >= last:
        return final
    return final + (1 - final) * (1 - (step - first) / (last - first)) ** 3
