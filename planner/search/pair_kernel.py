"""Annealing on orders with overlapped pairs, compiled by numba: the kernel of `mipipe.planner.search.pair_search`.

An order is a row of tokens per machine. A token is a node of the instance, or a pair: named by its F, with the I (and
the W after it) that run with it in ``mate``. Besides the moves of `mipipe.planner.search.anneal_kernel` (an action out
of its critical block, or a little way) there are moves that join an F with an I and its W nearby, part a pair, and
exchange partners. Every move is evaluated in full: pairs change the graph, and rows with pairs are short.

Pairs stay out of the order of their classes; alone, the k-th of a class stays the k-th
(`mipipe.planner.jobs.paths.shift`).
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.jobs.paths import cost_of, overflow, shift
from mipipe.planner.kernel import kernel
from mipipe.planner.search.anneal_kernel import TURN, beside_block, repriced
from mipipe.planner.search.pair_state import install, member, times, tokens_of
from mipipe.planner.sizes import NEVER_NS

NEAR = 8
"""Places within which a move looks for a partner."""


@kernel
def _critical(facts, state, start, makespan, pos, path):
    """A critical path backwards from the end into ``path``, ties at random; its length. Fills ``pos``."""
    tip = -1
    seen = 0
    for k in range(state.seq.shape[0]):
        for p in range(state.length[k]):
            pos[state.seq[k, p]] = p
        n = state.seq[k, state.length[k] - 1]
        if start[n] + state.dur[n] == makespan:
            seen += 1
            if np.random.randint(seen) == 0:
                tip = n
    size = 0
    n = tip
    while n >= 0:
        path[size] = n
        size += 1
        choice = -1
        seen = 0
        if start[n] > 0:
            if pos[n] > 0:
                u = state.seq[facts.machine[n], pos[n] - 1]
                if start[u] + state.dur[u] == start[n]:
                    choice, seen = u, 1
            for part in range(3 if state.mate[n] >= 0 else 1):
                m = member(facts, state, n, part)
                for e in range(facts.pred_ptr[m], facts.pred_ptr[m + 1]):
                    u = state.lead[facts.pred[e]]
                    if u != n and u != choice and start[u] + state.dur[u] + facts.pred_lag[e] == start[n]:
                        seen += 1
                        if np.random.randint(seen) == 0:
                            choice = u
        n = choice
    return size


@kernel
def _find(row, size, n):
    for p in range(size):
        if row[p] == n:
            return p
    return -1


@kernel
def _partner(facts, state, k, i, want):
    """A place near i of a token of machine k, at random: 0 an F alone, 2 an I alone with its W, 4 a pair; -1: none."""
    seen = 0
    found = -1
    for p in range(max(0, i - NEAR), min(state.length[k], i + NEAR + 1)):
        n = state.seq[k, p]
        kind = 4 if state.mate[n] >= 0 else facts.kind[n]
        if p == i or kind != want or (want == 2 and facts.weight[n] < 0):
            continue
        seen += 1
        if np.random.randint(seen) == 0:
            found = p
    return found


@kernel
def _joined(facts, state, k, i, row, mates):
    """Into ``row``: machine k's order with the token at i (an F or an I) and one nearby joined; its size, or -1."""
    n = state.seq[k, i]
    other = _partner(facts, state, k, i, 2 if facts.kind[n] == 0 else 0)
    if other < 0 or (facts.kind[n] == 2 and facts.weight[n] < 0):
        return -1
    f, back = (i, other) if facts.kind[n] == 0 else (other, i)
    forward, gradient = state.seq[k, f], state.seq[k, back]
    if facts.own_microbatch[forward] == facts.own_microbatch[gradient]:
        return -1
    anchor = f if np.random.random() < 0.5 else back
    weight = facts.weight[gradient]
    size = 0
    for p in range(state.length[k]):
        m = state.seq[k, p]
        if p == anchor:
            row[size], mates[size] = forward, gradient
            size += 1
        elif p != f and p != back and m != weight:
            row[size], mates[size] = m, state.mate[m]
            size += 1
    return size


@kernel
def _parted(facts, state, k, i, row, mates):
    """The order with the pair at i in parts, its W right there or a little later; its size."""
    forward = state.seq[k, i]
    gradient = state.mate[forward]
    later = 0 if np.random.random() < 0.5 else np.random.randint(1, NEAR + 1)
    first = np.random.random() < 0.5
    between = np.random.random() < 0.3
    size = 0
    due = -1
    for p in range(state.length[k]):
        m = state.seq[k, p]
        if p == i:
            one, two = (forward, gradient) if first else (gradient, forward)
            row[size], mates[size] = one, -1
            size += 1
            if between and not first:
                row[size], mates[size] = facts.weight[gradient], -1
                size += 1
            row[size], mates[size] = two, -1
            size += 1
            due = -2 if between and not first else i + later
        else:
            row[size], mates[size] = m, state.mate[m]
            size += 1
        if due >= 0 and (p == due or p == state.length[k] - 1):
            row[size], mates[size] = facts.weight[gradient], -1
            size += 1
            due = -2
    return size


@kernel
def _exchanged(facts, state, k, i, row, mates):
    """The order with the pair at i and another token nearby having exchanged their F or their backward; or -1."""
    f = state.seq[k, i]
    back = state.mate[f]
    want = 4 if np.random.random() < 0.5 else 0 if np.random.random() < 0.5 else 2
    j = _partner(facts, state, k, i, want)
    if j < 0:
        return -1
    n = state.seq[k, j]
    size = state.length[k]
    for p in range(size):
        row[p], mates[p] = state.seq[k, p], state.mate[state.seq[k, p]]
    if want == 2:
        mates[i] = n
        row[j] = back
        p = _find(row, size, facts.weight[n])
        row[p] = facts.weight[back]
        return size if facts.own_microbatch[f] != facts.own_microbatch[n] else -1
    row[i], row[j] = n, f
    if want == 4 and facts.own_microbatch[f] == facts.own_microbatch[state.mate[n]]:
        return -1
    return size if facts.own_microbatch[n] != facts.own_microbatch[back] else -1


@kernel
def _shifted(facts, state, k, i, pos, path, size, at, row, mates):
    """The order with the token at i elsewhere: in or next to its block of the critical path, or a little way off."""
    count = state.length[k]
    if at < 0:
        j = i + np.random.randint(1, 9) * (1 if np.random.random() < 0.5 else -1)
    else:
        j = beside_block(facts.machine, pos, path, size, at)
    j = min(max(j, 0), count - 1)
    if j == i or (abs(i - j) == 1 and state.cls[state.seq[k, i]] == state.cls[state.seq[k, j]]):
        return -1
    for p in range(count):
        row[p] = state.seq[k, p]
    shift(row.reshape(1, -1), 0, i, j, state.cls)
    for p in range(count):
        mates[p] = state.mate[row[p]]
    return count


@kernel
def anneal(facts, seq, length, mate, cap, iterations, hot, cold, tilt, wild, press, target, seed, best_seq, best_length,
           best_mate):
    """Improve an order with pairs in place; the best that fits ``cap`` goes into ``best_*``; its makespan.

    Arguments as of `mipipe.planner.search.anneal_kernel.anneal`; NEVER_NS where no order fitted.
    """
    np.random.seed(seed)
    count = facts.dur.shape[0]
    state = tokens_of(facts, seq, length, mate)
    start, other, waits, follow, queue, pos, path = [np.zeros(count + 1, np.int64) for _ in range(7)]
    row, mates, old, old_mates = [np.full(seq.shape[1] + 1, -1, np.int64) for _ in range(4)]
    machines = seq.shape[0]
    full = np.zeros(machines, np.int64)
    for k in range(machines):
        room = cap[facts.rank[state.seq[k, 0]]]
        full[k] = overflow(state.seq, k, 0, state.length[k] - 1, 0, state.alloc, state.free, state.work, room)
    over = full.sum()
    makespan = times(facts, state, start, waits, follow, queue)
    cost = cost_of(state.seq, state.length, start, state.dur, makespan, tilt, press[0] * over)
    best, best_cost = NEVER_NS, np.inf
    if over == 0:
        best, best_cost = makespan, cost
        best_seq[:], best_length[:], best_mate[:] = state.seq, state.length, state.mate
    cooling = (cold / hot) ** (1.0 / max(1, iterations))
    temperature = hot
    size = accepted = fitting = 0
    for _ in range(iterations):
        temperature *= cooling
        if size == 0:
            size = _critical(facts, state, start, makespan, pos, path)
        at = -1
        if np.random.random() < wild:
            k = np.random.randint(machines)
            i = np.random.randint(state.length[k])
        else:
            at = np.random.randint(size)
            k = facts.machine[path[at]]
            i = pos[path[at]]
        n = state.seq[k, i]
        choice = np.random.random()
        if state.mate[n] >= 0 and choice < 0.12:
            new = _parted(facts, state, k, i, row, mates)
        elif state.mate[n] >= 0 and choice < 0.3:
            new = _exchanged(facts, state, k, i, row, mates)
        elif state.mate[n] < 0 and (facts.kind[n] == 0 or facts.kind[n] == 2) and choice < 0.4:
            new = _joined(facts, state, k, i, row, mates)
        else:
            new = _shifted(facts, state, k, i, pos, path, size, at, row, mates)
        if new < 0:
            size = 0 if np.random.random() < 0.1 else size
            continue
        before = state.length[k]
        for p in range(before):
            old[p], old_mates[p] = state.seq[k, p], state.mate[state.seq[k, p]]
        install(facts, state, k, row, mates, new)
        room = cap[facts.rank[n]]
        more = overflow(state.seq, k, 0, state.length[k] - 1, 0, state.alloc, state.free, state.work, room) - full[k]
        value = -1
        if more <= 0 or (press[0] > 0.0 and press[0] * more <= 20.0 * temperature):
            value = times(facts, state, other, waits, follow, queue)
        changed = cost_of(state.seq, state.length, other, state.dur, value, tilt, press[0] * (over + more))
        if value < 0 or changed > cost - temperature * np.log(1.0 - np.random.random()):
            install(facts, state, k, old, old_mates, before)
            continue
        makespan, cost, over, size = value, changed, over + more, 0
        full[k] += more
        start, other = other, start
        if over == 0 and makespan <= best and (makespan < best or cost < best_cost):
            best, best_cost = makespan, cost
            best_seq[:], best_length[:], best_mate[:] = state.seq, state.length, state.mate
            if makespan <= target:
                break
        accepted += 1
        fitting += over == 0
        if press[0] > 0.0 and accepted % TURN == 0:
            press[0] *= repriced(fitting)
            cost = cost_of(state.seq, state.length, start, state.dur, makespan, tilt, press[0] * over)
            fitting = 0
    seq[:], length[:], mate[:] = state.seq, state.length, state.mate
    return best
