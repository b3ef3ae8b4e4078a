"""What the list kernels share, compiled by numba: the state of a schedule under construction, and its steps.

`mipipe.planner.search.list_kernel` and the two of `mipipe.planner.search.follow_kernel` build a schedule action by
action: every machine chooses what it would run next and when, the machine that can start first runs it. They differ in
the choice, above all in the rule by which memory lets an action start. A machine is *dirty* when it must choose again.

Which head of a class is next, and what is chosen of it, stays written out in each kernel: a step of that innermost loop
that is given the state counts references of all its arrays in every call, which made lists slower where it was tried.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from mipipe.planner.kernel import kernel
from mipipe.planner.sizes import NEVER_NS


class ListState(NamedTuple):
    """A schedule under construction. Per node how many it ``waits`` for and when the ended ones let it start
    (``ready``); per class its next node ``head``; per machine its classes ``owned[ptr[k]:ptr[k + 1]]``, its ``rank``,
    when it is ``free_at``, and its choice: ``best_node`` (-1: none), that node's class ``best_class`` (-1: the node is
    no head) and start ``best_time``."""

    waits: np.ndarray
    ready: np.ndarray
    head: np.ndarray
    ptr: np.ndarray
    owned: np.ndarray
    rank: np.ndarray
    free_at: np.ndarray
    length: np.ndarray
    best_node: np.ndarray
    best_class: np.ndarray
    best_time: np.ndarray
    dirty: np.ndarray


@kernel
def fresh(facts, num_machines):
    """The state before the first action."""
    machine, base = facts.machine, facts.base
    class_machine = machine[base[:-1]]
    ptr = np.zeros(num_machines + 1, np.int64)
    ptr[1:] = np.cumsum(np.bincount(class_machine, minlength=num_machines))
    owned = np.argsort(class_machine, kind="mergesort")
    rank = np.zeros(num_machines, np.int64)
    for n in range(machine.shape[0]):
        rank[machine[n]] = facts.rank[n]
    return ListState(facts.waits.copy(), np.zeros(machine.shape[0], np.int64), base[:-1].copy(), ptr, owned, rank,
                     np.zeros(num_machines, np.int64), np.zeros(num_machines, np.int64),
                     np.full(num_machines, -1, np.int64), np.full(num_machines, -1, np.int64),
                     np.full(num_machines, -1, np.int64), np.ones(num_machines, np.bool_))


@kernel
def passed_over(turn, time, earliest, patience, prio, best):
    """Whether an action that could start at ``time`` is none to choose. A machine goes over its heads twice: turn 0
    seeks the ``earliest`` start; turn 1, of those within ``patience`` of it, the smallest priority, ``best`` so far."""
    if turn == 0:
        return time >= earliest
    return time > earliest + patience or prio >= best


@kernel
def first_to_start(state):
    """The machine whose choice starts first; -1 where no machine has one."""
    chosen, earliest = -1, NEVER_NS
    for k in range(state.best_node.shape[0]):
        if state.best_node[k] >= 0 and state.best_time[k] < earliest:
            chosen, earliest = k, state.best_time[k]
    return chosen


@kernel
def run(facts, state, k, seq, start):
    """Machine ``k`` runs its choice: into ``seq`` and ``start``, and what waits for it learns of its end, which is
    returned. All machines of the rank, whose memory has changed, choose again."""
    n = state.best_node[k]
    start[n] = state.best_time[k]
    end = state.best_time[k] + facts.dur[n]
    seq[k, state.length[k]] = n
    state.length[k] += 1
    state.free_at[k] = end
    if state.best_class[k] >= 0:
        state.head[state.best_class[k]] += 1
    for other in range(state.rank.shape[0]):
        if state.rank[other] == facts.rank[n]:
            state.dirty[other] = True
    for e in range(facts.succ_ptr[n], facts.succ_ptr[n + 1]):
        s = facts.succ[e]
        state.ready[s] = max(state.ready[s], end + facts.lag[e])
        state.waits[s] -= 1
        if state.waits[s] == 0:
            state.dirty[facts.machine[s]] = True
    return end


def interpreted(kernel: Any) -> FunctionType:
    """A kernel without its compiler: the same code, and that of the compiled steps it calls, run by Python."""
    names = {name: getattr(value, "py_func", value) for name, value in kernel.py_func.__globals__.items()}
    return FunctionType(kernel.py_func.__code__, names)
