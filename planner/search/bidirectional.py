"""List schedules that are good at both ends: one made forwards in time, one backwards, and one that follows both.

A list schedule is made from the beginning: warm-up comes out well, while the cool-down is what is left over. Backwards
in time the cool-down is the warm-up: weight gradients let input gradients go, these let forwards go, and an activation
is held from W to F. So the same kernel schedules the reversed instance under quotas of its own, and `blend` makes a
third list in which early microbatches keep the forward schedule's moments as priorities, late ones the backward one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mipipe.planner.jobs.arcs import longest, to_csr
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.search import quotas
from mipipe.planner.search.orders import Orders, start_times
from mipipe.planner.search.quotas import Lines, QuotaRule

WINDOWS = ((0.0, 1.0), (0.2, 0.8), (0.3, 0.5), (0.5, 0.7), (0.1, 0.5), (0.5, 0.9))
"""Where, by a microbatch's place in line, priorities pass from the forward schedule to the backward one; where there
are many microbatches also two to one before the end for each rank."""


def backwards(instance: Instance, lines: Lines) -> tuple[Instance, Lines, np.ndarray]:
    """The instance and its lines in reversed time; each node's number there (and back: the map is its own inverse)."""
    image = instance.base[instance.cls] + instance.base[instance.cls + 1] - 1 - np.arange(instance.size)
    source = np.repeat(np.arange(instance.size), np.diff(instance.succ_ptr))
    arcs = image[instance.succ], image[source], instance.lag
    succ_ptr, succ, lag = to_csr(instance.size, arcs)
    pred_ptr, pred, pred_lag = to_csr(instance.size, (arcs[1], arcs[0], arcs[2]))
    dur = instance.dur[image]
    mirrored = replace(
        instance, dur=dur, succ_ptr=succ_ptr, succ=succ, lag=lag, pred_ptr=pred_ptr, pred=pred, pred_lag=pred_lag,
        alloc=instance.free[image], free=instance.alloc[image], work=instance.work[image],
        head=longest(pred_ptr, pred, pred_lag, succ_ptr, succ, lag, dur) - dur,
        tail=longest(succ_ptr, succ, lag, pred_ptr, pred, pred_lag, dur))
    turned = replace(lines, enters=lines.leaves, leaves=lines.enters, filler=np.zeros_like(lines.filler),
                     place=(lines.place.max() + lines.place.min() - lines.place)[image])
    return mirrored, turned, image


def backward_rules(lines: Lines) -> Iterator[QuotaRule]:
    """Rules for reversed time: forwards, which end a microbatch's stay, before its gradients; W before its own I."""
    even = quotas.even_quotas(lines)
    for slack in (1.5, 1.0, 2.0):
        quota = quotas.quotas(lines, slack)
        for ahead in (1e4, 16.0, 4.0):
            offset = np.array([-2 * ahead, -ahead, -ahead, 0.0])[lines.kind] + 1e-3 * lines.class_stage
            for age in (1e-6, 1.0, 0.1):
                for ramp in (quota, even):
                    yield QuotaRule(quota, ramp, offset, age, 0.0)


def blend(instance: Instance, lines: Lines, forward: Orders, mirrored: Instance, image: np.ndarray,
          backward: Orders) -> Orders:
    """The best list that passes from one schedule's moments to the other's; the forward one if none is better.

    ``mirrored`` and ``image`` are from `backwards`, ``backward`` orders ``mirrored``.
    """
    begin = start_times(instance, forward)
    end = forward.makespan_ns - (start_times(mirrored, backward) + mirrored.dur)[image]
    place = lines.place / max(float(lines.place.max()), 1e-9)
    early = 1e-7 * instance.head / max(1, int(instance.head.max()))  # a topological order among equals
    best, count = forward, np.maximum(1, lines.count)
    last = 2 * instance.view.problem.num_ranks / instance.view.problem.num_microbatches
    for low, high in (*WINDOWS, (1 - last, 1 - last / 2)) if last < 0.5 else WINDOWS:
        share = np.clip((high - place) / (high - low), 0.0, 1.0)
        moment = (share * begin + (1 - share) * end) / max(1, forward.makespan_ns) * 100
        for weight in (0.0, 1.0, 1e4):
            rule = QuotaRule(count, count, np.where(lines.kind == 3, weight, 0.0), 1.0, 0.25, True)
            orders = quotas.run_rule(instance, replace(lines, place=moment + early), rule)
            if orders is not None and orders.makespan_ns < best.makespan_ns:
                best = orders
    return best
