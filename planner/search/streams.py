"""Problems with a collective stream, seen without it: what runs there becomes latency between compute actions.

A move of one compute action seldom helps while the order of its dispatch and combine stays: the two streams' orders
must change together. So the search first runs on the relaxed instance, where collectives never wait for each other, and
`mipipe.planner.search.lift` gives the collectives an order; the whole instance is searched from there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mipipe.planner.actions import Stream
from mipipe.planner.jobs.arcs import longest, to_csr
from mipipe.planner.jobs.arrays import Instance


def relaxed(instance: Instance) -> Instance | None:
    """The instance of the compute actions alone; None where there is no collective stream or it holds memory."""
    streams = np.array([stream is Stream.COLLECTIVE for _, stream in instance.machine_key])
    gone = streams[instance.machine]
    if not gone.any() or gone.all() or instance.alloc[gone].any() or instance.work[gone].any():
        return None
    arcs = [(n, int(instance.succ[e]), int(instance.lag[e])) for n in range(instance.size)
            for e in range(instance.succ_ptr[n], instance.succ_ptr[n + 1])]
    arcs = _contract(arcs, gone, instance.dur)
    kept = np.flatnonzero(~gone)
    number = np.full(instance.size, -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    first, second, pause = np.array(arcs, dtype=np.int64).reshape(-1, 3).T
    succ_ptr, succ, lag = to_csr(len(kept), (number[first], number[second], pause))
    pred_ptr, pred, pred_lag = to_csr(len(kept), (number[second], number[first], pause))
    machines = np.flatnonzero(~streams)
    machine_number = np.full(len(streams), -1, dtype=np.int64)
    machine_number[machines] = np.arange(len(machines))
    classes, cls = np.unique(instance.cls[kept], return_inverse=True)
    dur = instance.dur[kept]
    return replace(
        instance, machine=machine_number[instance.machine[kept]], rank=instance.rank[kept], dur=dur, succ_ptr=succ_ptr,
        succ=succ, lag=lag, pred_ptr=pred_ptr, pred=pred, pred_lag=pred_lag, cls=cls.astype(np.int64),
        base=np.searchsorted(cls, np.arange(len(classes) + 1)).astype(np.int64), alloc=instance.alloc[kept],
        free=instance.free[kept], work=instance.work[kept], microbatch=instance.microbatch[kept],
        own_microbatch=instance.own_microbatch[kept], kind=instance.kind[kept], depth=instance.depth[kept],
        origin=instance.origin[kept], twin=instance.twin[kept],
        head=longest(pred_ptr, pred, pred_lag, succ_ptr, succ, lag, dur) - dur,
        tail=longest(succ_ptr, succ, lag, pred_ptr, pred, pred_lag, dur),
        machine_key=tuple(instance.machine_key[k] for k in machines))


def _contract(arcs: list[tuple[int, int, int]], gone: np.ndarray, dur: np.ndarray) -> list[tuple[int, int, int]]:
    """Arcs between the nodes that stay; a path through a node that goes becomes an arc with its length."""
    into: dict[int, list[tuple[int, int]]] = {}
    out: dict[int, list[tuple[int, int]]] = {}
    for a, b, lag in arcs:
        out.setdefault(a, []).append((b, lag))
        into.setdefault(b, []).append((a, lag))
    for n in np.flatnonzero(gone).tolist():
        for a, before in into.pop(n, []):
            out[a] = [(b, lag) for b, lag in out[a] if b != n]
            for b, after in out.get(n, []):
                length = before + int(dur[n]) + after
                out[a].append((b, length))
                into[b].append((a, length))
        for b, _ in out.pop(n, []):
            into[b] = [(a, lag) for a, lag in into[b] if a != n]
    return [(a, b, lag) for a, targets in out.items() for b, lag in targets]
