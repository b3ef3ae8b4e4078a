"""Expert maps when moving costs: how many experts a change moves, and which change pays off.

Moving one expert takes ``move_ns`` (bytes over the link into a device; moves into different devices run at once, so a
change takes as long as the device that receives most, summed over layers). A change is worth it when ``horizon`` steps
of the saved time exceed that. From the map in use the best prefix of an improvement path is kept; a map planned afresh
is relabelled first so that as few experts as possible move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mipipe.planner.experts.balance.swaps import Layer, best_move


def moved_experts(current: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Experts each device must receive [device]: in its target slots and in none of its current ones."""
    return np.array([len(set(after.tolist()) - set(before.tolist()))
                     for before, after in zip(current, target, strict=True)])


def align(current: np.ndarray, target: np.ndarray, units: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """``target`` with its rows given to the devices that hold most of them already, slots kept in place.

    Rows move only between devices of one node with equal speed, so no device's time changes. Greedy by overlap, then
    pairwise exchanges.
    """
    num_experts = int(max(current.max(), target.max())) + 1
    held = np.zeros((len(current), num_experts), dtype=np.int32)
    wanted = np.zeros_like(held)
    np.put_along_axis(held, current, 1, axis=1)
    np.put_along_axis(wanted, target, 1, axis=1)
    overlap = held @ wanted.T
    result = target.copy()
    classes = {(float(unit), int(node)) for unit, node in zip(units, nodes, strict=True)}
    if len({unit for unit, _ in classes}) == 1:
        classes = {(float(units[0]), -1)}
    for unit, node in classes:
        members = np.flatnonzero((units == unit) & ((nodes == node) | (node < 0)))
        rows = _match(overlap[np.ix_(members, members)])
        for device, row in zip(members, members[rows], strict=True):
            result[device] = _keep_slots(current[device], target[row])
    return result


def _match(overlap: np.ndarray) -> np.ndarray:
    """Row assigned to each column index: greedy by falling overlap, then improving exchanges of two."""
    size = len(overlap)
    rows = np.full(size, -1)
    taken = np.zeros(size, dtype=bool)
    for flat in np.argsort(-overlap, axis=None, kind="stable"):
        device, row = divmod(int(flat), size)
        if rows[device] < 0 and not taken[row]:
            rows[device], taken[row] = row, True
    for _ in range(size):
        now = overlap[np.arange(size), rows]
        swapped = overlap[:, rows]
        gain = swapped + swapped.T - now[:, None] - now[None]
        first, second = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[first, second] <= 0:
            break
        rows[[first, second]] = rows[[second, first]]
    return rows


def _keep_slots(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """``after`` reordered so that experts which stay keep their slot."""
    left = after.tolist()
    result = np.full(len(before), -1)
    for slot, expert in enumerate(before.tolist()):
        if expert in left:
            result[slot] = expert
            left.remove(expert)
    result[result < 0] = left
    return result


def best_change(layer: Layer, current: np.ndarray, fresh: np.ndarray, *, horizon: float, move_ns: float,
                max_moves: int | None = None, rounds: int = 200) -> np.ndarray:
    """The map that minimises ``horizon * busiest time + move_ns * most received``, from ``current``.

    Of the `changes`; with ``max_moves`` only those that receive at most that many experts in all count.
    """
    allowed = [change for change in changes(layer, current, fresh, horizon=horizon, move_ns=move_ns, rounds=rounds)
               if max_moves is None or change.moved <= max_moves]
    return min(allowed, key=lambda change: change.cost).devices


@dataclass(frozen=True, slots=True)
class Change:
    """One way to change a layer's map: experts received in all, and what it costs over the horizon, moving included."""

    devices: np.ndarray
    moved: int
    cost: float


def changes(layer: Layer, current: np.ndarray, fresh: np.ndarray, *, horizon: float, move_ns: float,
            rounds: int = 200) -> list[Change]:
    """The current map, every prefix of the improvement path that starts there, and ``fresh`` relabelled."""
    candidates = [current]
    state = current
    for _ in range(rounds):
        changed = best_move(layer, state, layer.times(state))
        if changed is None:
            break
        state = changed
        candidates.append(state)
    candidates.append(align(current, fresh, layer.units, layer.nodes))

    def change(target: np.ndarray) -> Change:
        received = moved_experts(current, target)
        return Change(target, int(received.sum()), horizon * layer.makespan(target) + move_ns * float(received.max()))

    return [change(target) for target in candidates]


def share_moves(choices: Sequence[Sequence[Change]], total: int) -> list[Change]:
    """One change for each layer with the least total cost among those that move at most ``total`` experts together.

    A multiple-choice knapsack, solved exactly by dynamic programming over the number of moves.
    """
    best = np.zeros(total + 1)
    picks = []
    for layer in choices:
        table = np.full((len(layer), total + 1), np.inf)
        for row, change in enumerate(layer):
            if change.moved <= total:
                table[row, change.moved:] = best[:total + 1 - change.moved] + change.cost
        picks.append(table.argmin(axis=0))
        best = table.min(axis=0)
    left, found = total, []
    for layer, pick in zip(reversed(choices), reversed(picks), strict=True):
        found.append(layer[pick[left]])
        left -= found[-1].moved
    return found[::-1]
