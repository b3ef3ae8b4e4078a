"""A placement's scheduling problem as arrays: nodes, precedence, machines, memory. What the search kernels work on.

Where all microbatches have equal loads, the actions of one stage and phase on a rank form a *class* that runs in the
order of microbatches. With equal routes that is without loss (swapping two changes nothing but names); with routes that
differ in a spread end it is a restriction that pays: a search that may reorder them finds 2-10 % worse orders in equal
time. Where loads differ, only microbatches of equal route and loads form a class. Node numbers follow classes: class
``c`` owns nodes ``base[c] .. base[c + 1] - 1``.

A two-way pipeline that looks the same from both ends (`mirror`) is searched on half its ranks: a schedule that is equal
on rank r and its mirror image is a schedule of the *quotient*, in which a dependency that crosses the middle comes back
to the rank it left. Nothing in the kernels knows about it; `expand` writes both halves out.

Left out: values in flight (they need times, not only orders) and the queueing of transfers on a channel; both are
judged by `mipipe.planner.evaluate` and the checker afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.evaluate import Compiled, compile_actions
from mipipe.planner.plan import RankOrder, Schedule
from mipipe.planner.stages import StageView


@dataclass(frozen=True, slots=True)
class Instance:
    """Arrays over nodes (N), machines (K), classes (C), ranks (R) and microbatches.

    ``succ[succ_ptr[n]:succ_ptr[n+1]]`` wait for node n and ``lag`` more; ``pred`` is the same backwards. ``alloc`` is
    taken when a node starts, ``free`` returned when it ends, ``work`` needed while it runs, all on ``rank``.
    ``microbatch`` is
    shared by a microbatch and its mirror image. ``origin[n]`` is n's action in ``compiled``, ``twin[n]`` that of
    its mirror image (or -1).
    """

    view: StageView
    compiled: Compiled
    machine: np.ndarray
    rank: np.ndarray
    dur: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray
    lag: np.ndarray
    pred_ptr: np.ndarray
    pred: np.ndarray
    pred_lag: np.ndarray
    cls: np.ndarray
    base: np.ndarray
    alloc: np.ndarray
    free: np.ndarray
    work: np.ndarray
    cap: np.ndarray
    microbatch: np.ndarray
    own_microbatch: np.ndarray
    kind: np.ndarray
    depth: np.ndarray
    origin: np.ndarray
    twin: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    machine_key: tuple[tuple[int, Stream], ...]

    @property
    def size(self) -> int:
        return len(self.dur)

    @property
    def num_machines(self) -> int:
        return len(self.machine_key)

    @property
    def waits(self) -> np.ndarray:
        """Number of predecessors of each node."""
        return np.diff(self.pred_ptr)

    def lengths(self) -> np.ndarray:
        """Number of nodes on each machine."""
        return np.bincount(self.machine, minlength=self.num_machines)


KINDS = (ActionKind.F, ActionKind.RECOMPUTE, ActionKind.I, ActionKind.W)


def split_actions(view: StageView) -> list[Action]:
    """Every elementary action of the placement: F, RECOMPUTE where chosen, I and W where they exist."""
    actions = []
    for stage in range(view.num_stages):
        backward = view.i_ns[stage] is not None or view.w_ns[stage] is not None
        kinds = [ActionKind.F]
        if view.placement.stages[stage].recompute and backward:
            kinds.append(ActionKind.RECOMPUTE)
        if view.i_ns[stage] is not None:
            kinds.append(ActionKind.I)
        if view.w_ns[stage] is not None:
            kinds.append(ActionKind.W)
        actions += [Action(stage, kind, m) for kind in kinds for m in range(view.problem.num_microbatches)]
    return actions


def capacity(view: StageView, rank: int) -> int:
    """Bytes rank ``rank`` has for activations: its memory without resident bytes, and the problem's limit."""
    room = view.problem.topology.devices[rank].memory_bytes - view.resident_bytes[rank]
    limit = view.problem.limits.activation_bytes
    return room if limit is None else min(room, limit)


def signatures(view: StageView) -> list[int]:
    """For each microbatch the number of its kind: equal where route and loads are equal."""
    numbers: dict[tuple, int] = {}
    loads = [group.loads for group in view.problem.groups if group.loads]
    result = []
    for m in range(view.problem.num_microbatches):
        key = (tuple(route[m] for route in view.placement.routes), tuple(load[m] for load in loads))
        result.append(numbers.setdefault(key, len(numbers)))
    return result


def mirror(view: StageView) -> list[int] | None:
    """The microbatch that is each microbatch's image under r -> R-1-r; None where there is no such symmetry."""
    ranks = view.problem.num_ranks
    devices = view.problem.topology.devices
    if ranks % 2 or view.problem.topology.overrides or any(group.loads for group in view.problem.groups):
        return None
    if any(devices[r].kind != devices[ranks - 1 - r].kind or capacity(view, r) != capacity(view, ranks - 1 - r)
           for r in range(ranks)) or len({device.host for device in devices}) > 1:
        return None
    by_route: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for m in range(view.problem.num_microbatches):
        by_route[tuple(route[m] for route in view.placement.routes)].append(m)
    image = [-1] * view.problem.num_microbatches
    for route, members in by_route.items():
        others = by_route.get(tuple(ranks - 1 - rank for rank in route), [])
        if len(others) != len(members) or others is members:
            return None
        for m, other in zip(members, others, strict=True):
            image[m] = other
    return image


def build(view: StageView, halve: bool = False) -> Instance:
    """The instance of a placement; its quotient under `mirror` where ``halve`` and the symmetry exists."""
    compiled = compile_actions(view, split_actions(view))
    image = mirror(view) if halve else None
    ranks = view.problem.num_ranks
    sign = signatures(view) if any(group.loads for group in view.problem.groups) else None

    def class_key(n: int) -> tuple[int, int, int]:
        action = compiled.actions[n]
        return (action.stage, KINDS.index(action.kind), sign[action.microbatch] if sign else compiled.ranks[n])

    kept = [n for n in range(len(compiled.actions)) if image is None or compiled.ranks[n] < ranks // 2]
    kept.sort(key=lambda n: (*class_key(n), compiled.actions[n].microbatch))
    number = {node: new for new, node in enumerate(kept)}
    twin = np.full(len(kept), -1, dtype=np.int64)
    if image is not None:
        for node, action in enumerate(compiled.actions):
            if compiled.ranks[node] >= ranks // 2:
                other = compiled.index[Action(action.stage, action.kind, image[action.microbatch])]
                number[node] = number[other]
                twin[number[other]] = node
    edges = [(number[n], number[consumer], duration if channel >= 0 else 0)
             for n in kept for consumer, channel, duration, *_ in compiled.releases[n]]
    keys = sorted({(compiled.ranks[n], compiled.streams[n]) for n in kept}, key=lambda key: (key[0], key[1].value))
    machine_of = {key: k for k, key in enumerate(keys)}
    actions = [compiled.actions[n] for n in kept]
    class_keys = [class_key(n) for n in kept]
    starts = [n for n in range(len(kept)) if n == 0 or class_keys[n] != class_keys[n - 1]]
    cls = np.zeros(len(kept), dtype=np.int64)
    for c, start in enumerate(starts):
        cls[start:] = c
    memory = np.array([_memory(view, action) for action in actions], dtype=np.int64).reshape(len(kept), 3)
    succ_ptr, succ, lag = to_csr(len(kept), edges)
    pred_ptr, pred, pred_lag = to_csr(len(kept), [(b, a, d) for a, b, d in edges])
    array = lambda values: np.array(values, dtype=np.int64)  # noqa: E731
    dur = array([compiled.durations[n] for n in kept])
    return Instance(
        view, compiled, array([machine_of[compiled.ranks[n], compiled.streams[n]] for n in kept]),
        array([compiled.ranks[n] for n in kept]), dur,
        succ_ptr, succ, lag, pred_ptr, pred, pred_lag, cls, array([*starts, len(kept)]),
        memory[:, 0].copy(), memory[:, 1].copy(), memory[:, 2].copy(), array([capacity(view, r) for r in range(ranks)]),
        array([a.microbatch if image is None else min(a.microbatch, image[a.microbatch]) for a in actions]),
        array([a.microbatch for a in actions]), array([KINDS.index(a.kind) for a in actions]),
        array([a.stage for a in actions]),
        array(kept), twin, longest(pred_ptr, pred, pred_lag, dur) - dur, longest(succ_ptr, succ, lag, dur), tuple(keys))


def to_csr(size: int, edges: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edges = sorted(edges)
    pointer = np.zeros(size + 1, dtype=np.int64)
    for source, _, _ in edges:
        pointer[source + 1] += 1
    return (np.cumsum(pointer), np.array([b for _, b, _ in edges], dtype=np.int64),
            np.array([d for _, _, d in edges], dtype=np.int64))


def longest(succ_ptr: np.ndarray, succ: np.ndarray, lag: np.ndarray, dur: np.ndarray) -> np.ndarray:
    """Longest path from the start of every node to the end, by precedence alone (given predecessors: from the
    beginning to the node's end)."""
    size = len(dur)
    waits = np.diff(succ_ptr)
    before: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    for n in range(size):
        for e in range(succ_ptr[n], succ_ptr[n + 1]):
            before[succ[e]].append((n, int(lag[e])))
    after = [0] * size
    stack = [n for n in range(size) if waits[n] == 0]
    left = waits.tolist()
    length = dur.tolist()
    while stack:
        n = stack.pop()
        length[n] += after[n]
        for u, pause in before[n]:
            after[u] = max(after[u], length[n] + pause)
            left[u] -= 1
            if not left[u]:
                stack.append(u)
    return np.array(length, dtype=np.int64)


def _memory(view: StageView, action: Action) -> tuple[int, int, int]:
    """(taken at the start, returned at the end, needed while running) in bytes; see `problem` for the rules."""
    stage, m = action.stage, action.microbatch
    fi, fw, iw, kept = (size[stage][m] for size in (view.saved_fi, view.saved_fw, view.saved_iw, view.kept))
    has_i, has_w = view.i_ns[stage] is not None, view.w_ns[stage] is not None
    work = view.workspace[stage]
    again = view.placement.stages[stage].recompute
    if not (has_i or has_w):
        return 0, 0, work + fi + fw
    if not has_i:
        fi, fw, iw = 0, fi + fw, 0
    elif not has_w:
        fi, fw, iw = fi + fw, 0, 0
    if action.kind is ActionKind.F:
        return (kept, 0, work) if again else (fi + fw, 0, work)
    if action.kind is ActionKind.RECOMPUTE:
        return fi + fw - kept, 0, work
    if action.kind is ActionKind.I:
        return (iw, fi, work) if has_w else (0, fi, work)
    return 0, fw + (iw if has_i else 0), work


def expand(instance: Instance, orders: list[list[int]]) -> Schedule:
    """The schedule of orders of nodes, one per machine, with mirror images written out."""
    ranks = instance.view.problem.num_ranks
    compute: list[tuple[Action, ...]] = [() for _ in range(ranks)]
    collective: list[tuple[Action, ...]] = [() for _ in range(ranks)]
    actions = instance.compiled.actions
    for (rank, stream), order in zip(instance.machine_key, orders, strict=True):
        target = compute if stream is Stream.COMPUTE else collective
        target[rank] = tuple(actions[instance.origin[n]] for n in order)
        if order and instance.twin[order[0]] >= 0:
            target[ranks - 1 - rank] = tuple(actions[instance.twin[n]] for n in order)
    return Schedule(tuple(RankOrder(a, b) for a, b in zip(compute, collective, strict=True)))


def orders_from(instance: Instance, schedule: Schedule) -> list[list[int]]:
    """A schedule's orders in the instance's node numbers; blocks (B, OVERLAP_F_B) are written as their parts."""
    number = {int(node): n for n, node in enumerate(instance.origin)}
    result = []
    for rank, stream in instance.machine_key:
        order = schedule.ranks[rank].compute if stream is Stream.COMPUTE else schedule.ranks[rank].collective
        result.append([number[instance.compiled.index[Action(stage, kind, m)]]
                       for action in order for kind, stage, m in action.parts()])
    return [_in_class_order(instance, order) for order in result]


def _in_class_order(instance: Instance, order: list[int]) -> list[int]:
    """The same order of classes with every class in its fixed internal order."""
    seen: dict[int, int] = defaultdict(int)
    result = []
    for node in order:
        c = int(instance.cls[node])
        result.append(int(instance.base[c]) + seen[c])
        seen[c] += 1
    return result
