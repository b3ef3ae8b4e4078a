"""Simulated annealing on the orders of one placement, compiled by numba: kernel of `mipipe.planner.search.annealing`.

A move takes an action on a random critical path out of its block (a run of critical actions on one machine) to another
place in or next to it, or any action to a place nearby; `mipipe.planner.search.anneal_state` says what that changes.

Memory is either a wall (moves that overfill it are rejected) or has a price: ``press`` times the bytes beyond the
limit, summed over the order's positions, where the price rises while too few orders fit and falls while most do
(strategic oscillation, Glover 1989). Only orders that fit are kept. Where memory is full nearly always, two actions
often have to move together and the way leads through orders that do not fit; elsewhere the wall is faster. So rounds
take turns.
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.jobs.paths import cost_of, overflow, shift, trace
from mipipe.planner.kernel import kernel
from mipipe.planner.search.anneal_state import likely_cycle, makespan_of, overfull, state_of, take
from mipipe.planner.sizes import NEVER_NS

TURN = 200
"""Accepted moves between two changes of the price of memory."""


@kernel
def repriced(fitting):
    """The factor by which the price of memory changes after a `TURN` in which ``fitting`` orders fitted."""
    return 1.1 if fitting < 0.3 * TURN else 0.9 if fitting > 0.7 * TURN else 1.0


@kernel
def beside_block(machine, pos, path, size, at):
    """A place for action ``path[at]`` of a critical path: in its block (a run on one machine) or next to it."""
    k = machine[path[at]]
    lo = at
    while lo + 1 < size and machine[path[lo + 1]] == k and pos[path[lo + 1]] == pos[path[lo]] - 1:
        lo += 1
    hi = at
    while hi > 0 and machine[path[hi - 1]] == k and pos[path[hi - 1]] == pos[path[hi]] + 1:
        hi -= 1
    first = pos[path[lo]]
    final = pos[path[hi]]
    choice = np.random.randint(4)
    if choice == 0:
        return first
    if choice == 1:
        return final
    if choice == 2:
        return pos[path[at]] + (1 if np.random.random() < 0.5 else -1)
    return first - 1 + np.random.randint(final - first + 3)


@kernel
def _pick(facts, state, path, size, wild):
    """A move (machine, from, to): out of a critical block, or, with probability ``wild``, any action a little way."""
    machine, pos = facts.machine, state.pos
    if np.random.random() < wild:
        n = np.random.randint(pos.shape[0])
        k = machine[n]
        i = pos[n]
        j = i + np.random.randint(1, 9) * (1 if np.random.random() < 0.5 else -1)
    else:
        at = np.random.randint(size)
        n = path[at]
        k = machine[n]
        i = pos[n]
        j = beside_block(machine, pos, path, size, at)
    return k, i, min(max(j, 0), state.length[k] - 1)


@kernel
def _critical(facts, state, makespan, path):
    """A critical path from a machine's last action that ends at the makespan, at random, into ``path``; its length."""
    tip = -1
    seen = 0
    for k in range(state.seq.shape[0]):
        n = state.seq[k, state.length[k] - 1]
        if state.kept[n] + facts.dur[n] == makespan:
            seen += 1
            if np.random.randint(seen) == 0:
                tip = n
    return trace(tip, state.kept, facts.dur, facts.pred_ptr, facts.pred, facts.pred_lag, state.seq, state.pos,
                 facts.machine, path)


@kernel
def anneal(facts, seq, length, iterations, hot, cold, tilt, wild, press, target, seed, best):
    """Improve ``seq`` in place for some iterations; ``best`` gets the best order that fits, if any; its makespan.

    The temperature falls from ``hot`` to ``cold`` ns. ``wild`` is the share of moves off the critical path. ``press``,
    an array of one number, is the price of a byte and changes; 0 makes memory a wall. Stops early at ``target``.
    Returns NEVER_NS where no order fitted.
    """
    np.random.seed(seed)
    state = state_of(facts, seq, length)
    path = np.zeros(facts.dur.shape[0] + 1, np.int64)
    least = tilt * facts.dur.sum() / seq.shape[0]
    over = overfull(facts, seq, length)
    makespan = makespan_of(facts, state)
    cost = cost_of(seq, length, state.kept, facts.dur, makespan, tilt, press[0] * over)
    best_makespan, best_cost = NEVER_NS, np.inf
    if over == 0:
        best[:] = seq
        best_makespan, best_cost = makespan, cost
    cooling = (cold / hot) ** (1.0 / max(1, iterations))
    temperature = hot
    size = accepted = fitting = 0
    for now in range(1, iterations + 1):
        temperature *= cooling
        if size == 0:
            size = _critical(facts, state, makespan, path)
        k, i, j = _pick(facts, state, path, size, wild)
        if j == i or (abs(i - j) == 1 and facts.cls[seq[k, j]] == facts.cls[seq[k, i]]):
            size = 0 if np.random.random() < 0.1 else size
            continue
        a, b = min(i, j), max(i, j)
        cap = facts.cap[facts.rank[seq[k, i]]]
        more = -overflow(seq, k, a, b, state.before[k, a], facts.alloc, facts.free, facts.work, cap)
        shift(seq, k, i, j, facts.cls)
        more += overflow(seq, k, a, b, state.before[k, a], facts.alloc, facts.free, facts.work, cap)
        if ((more > 0 and (press[0] <= 0.0 or press[0] * more > 20.0 * temperature))
                or (np.random.random() < 0.7 and likely_cycle(facts, state, k, i, j))):
            shift(seq, k, j, i, facts.cls)
            continue
        threshold = cost - temperature * np.log(1.0 - np.random.random())
        value, new = take(facts, state, k, i, j, now, tilt, press[0] * (over + more), least, threshold)
        if value < 0:
            continue
        makespan, cost, over, size = value, new, over + more, 0
        if over == 0 and makespan <= best_makespan and (makespan < best_makespan or cost < best_cost):
            best[:] = seq
            best_makespan, best_cost = makespan, cost
            if makespan <= target:
                break
        accepted += 1
        fitting += over == 0
        if press[0] > 0.0 and accepted % TURN == 0:
            press[0] *= repriced(fitting)
            cost = cost_of(seq, length, state.kept, facts.dur, makespan, tilt, press[0] * over)
            fitting = 0
    return best_makespan
