"""What one device can do within a makespan, as a MIP over flows of work: the model that bounds over placements price.

A *bin* is equal units at similar depth, n[b] microbatches' worth of which the device holds. What it can do within C is
relaxed to flows of work: v[b,g,phase,k] microbatches in the window k of time. Windows end at moments that matter, those
before the first gradients counted from the start, those after the last forwards from the end of the step, with one
between of what C leaves:

    sum work[g,phase] v[b,g,phase,k] <= length of window k             on each stream (work at a pair's least share)
    v = 0                        before a group's earliest F, I or W, and after what must still follow it
    F, I, W of a group in this order at every window's end, I as much later than F as the way to the loss and back takes
    bytes of F without I and of I without W <= capacity                at every window's end; bytes x time <= C capacity
    sum_k v[b,g,phase,k] = M n[b],  n <= x,  n = x where no replica fits,  sum_b resident[b] x[b] <= resident room

v and n count microbatches of the mean load, n by the loads of a unit's first group; of groups with other loads no more
than M x run.
Left out: channels, values in flight, and workspace.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.first_gradients import colocated, common_room
from mipipe.planner.bounds.loads import at_mean_load, least_of, work_of
from mipipe.planner.bounds.over_placements import facts_of
from mipipe.planner.bounds.tails import tails_of
from mipipe.planner.jobs.memory import activation_room, resident_room
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.milp import pyo
from mipipe.planner.problem import Group, PlanningProblem

SECTIONS = 16
"""Depths that equal units are told apart by, at most."""

WINDOWS = 6
"""Windows at either end of the step, at most."""


@dataclass(frozen=True, slots=True)
class BinPart:
    """One group of each unit of a bin: the work of its phases (None: no such phase) and what is least among them.

    ``release`` and ``tail`` are per phase, nanoseconds from the start and to the end of the step; ``lag`` is how much
    later than F an I is, beyond the shorter of the two. ``held``: bytes between F and I, and between I and W.
    """

    group: Group
    release: tuple[int, int, int]
    tail: tuple[int, int, int]
    lag: int
    held: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bin:
    """``size`` equal units; ``whole``: none of them can have a second holder; ``units``: which, of `colocated`."""

    size: int
    parts: tuple[BinPart, ...]
    resident: int
    work: int
    whole: bool
    units: tuple[int, ...]


def bins_of(problem: PlanningProblem) -> list[Bin]:
    """Equal units of the same section; sections have about as many groups each."""
    facts, tails, plain = facts_of(problem), tails_of(problem), pair_gain(problem).ratio == 1
    found: dict[tuple[object, ...], list[list[int]]] = {}
    everything = colocated(problem)
    for unit in everything:
        kind = tuple((str(sorted(group.times.items())), group.stream, group.resident_bytes, group.saved_fi_bytes,
                      group.saved_fw_bytes, group.saved_iw_bytes, group.recompute_bytes, group.loads, group.single)
                     for group in (problem.groups[g] for g in unit))
        section = SECTIONS * unit[0] // len(problem.groups)
        found.setdefault((section, *kind), []).append(unit)
    sizes = [sum(problem.groups[g].resident_bytes for g in unit) for units in found.values() for unit in units]
    spare = common_room(sizes, [resident_room(problem, rank) for rank in range(problem.num_ranks)]) - sum(sizes)
    bins = []
    for units in found.values():
        resident = sum(problem.groups[g].resident_bytes for g in units[0])
        parts = []
        for members in zip(*units, strict=True):
            group = problem.groups[members[0]]
            f, i = (least_of(group, column[members[0]]) for column in (facts.f, facts.i))
            back = min(facts.gradient_head[g] or 0 for g in members)
            release = min(facts.head[g] for g in members), back, back + i if plain else back
            tail = min(tails.after_f[g] for g in members), min(tails.after_i[g] for g in members), 0
            lag = min(tails.between[g] for g in members) + min(f, i) if plain else 0
            parts.append(BinPart(group, release, tail, lag, _held(group)))
        work = sum(work_of(problem, problem.groups[g], column[g]) for unit in units for g in unit
                   for column in (facts.f, facts.i, facts.w))
        whole = resident > spare or any(part.group.single for part in parts)
        bins.append(Bin(len(units), tuple(parts), resident, max(1, work), whole, tuple(map(everything.index, units))))
    return bins


def _held(group: Group) -> tuple[float, float]:
    """Bytes of a microbatch from F to the end of I, and from there to the end of W; a phase may be missing."""
    phases = next(iter(group.times.values()))
    later = at_mean_load(group, group.saved_fw_bytes) + at_mean_load(group, group.saved_iw_bytes)
    saved = at_mean_load(group, group.saved_fi_bytes) + at_mean_load(group, group.saved_fw_bytes)
    if group.recompute_bytes is not None:
        saved = min(saved, at_mean_load(group, group.recompute_bytes))
    if phases.i_ns is None and phases.w_ns is None:
        return 0.0, 0.0
    return saved, later if phases.i_ns is not None and phases.w_ns is not None else 0.0


def devices_model(problem: PlanningProblem, bins: Sequence[Bin], least_ns: int,
                  moment_ns: int | None = None) -> pyo.ConcreteModel:
    """One device of each kind, all with the same C: the rows of the module docstring without the shares.

    Times are in units of ``unit_ns``, a thousandth of the known bound; ``counts[q]`` devices are of kind q.
    ``moment_ns``: a moment at which a window should end.
    """
    model = pyo.ConcreteModel(name="configuration MIP")
    model.unit_ns = max(1.0, least_ns / 1000)
    kinds = Counter((problem.topology.devices[rank].kind, resident_room(problem, rank), activation_room(problem, rank),
                     problem.topology.devices[rank].memory_bytes) for rank in range(problem.num_ranks))
    model.counts = list(kinds.values())
    pairs = [(q, b) for q in range(len(kinds)) for b in range(len(bins))]
    model.makespan = pyo.Var(bounds=(least_ns / model.unit_ns, None))
    model.x = pyo.Var(pairs, domain=pyo.Integers, bounds=lambda _, q, b: (0, bins[b].size))
    model.n = pyo.Var(pairs, bounds=lambda _, q, b: (0, bins[b].size))
    model.rows = pyo.ConstraintList()
    model.goal = pyo.Objective(expr=model.makespan)
    model.share = pyo.Constraint(expr=model.makespan >= 0)  # set by each weighting
    windows = _windows(bins, least_ns, moment_ns)
    flows = [(q, b, p, phase, k) for q, b in pairs for p, part in enumerate(bins[b].parts)
             for phase in _phases(part) for k in range(windows.count) if windows.open(part, phase, k)]
    model.v = pyo.Var(flows, bounds=(0, None))
    for q, (kind, resident, capacity, memory) in enumerate(kinds):
        own = {b: model.x[q, b] for b in range(len(bins))}
        if any(one.resident for one in bins):
            model.rows.add(sum(bins[b].resident / max(1, resident) * x for b, x in own.items()) <= 1)
        for b, x in own.items():
            model.rows.add(model.n[q, b] == x if bins[b].whole else model.n[q, b] <= x)
        _streams(model, problem, bins, windows, q, kind)
        _order(model, problem, bins, windows, q)
        _memory(model, bins, windows, q, capacity, memory)
    return model


def _phases(part: BinPart) -> list[int]:
    times = next(iter(part.group.times.values()))
    return [phase for phase, value in enumerate((times.f_ns, times.i_ns, times.w_ns)) if value is not None]


@dataclass(frozen=True, slots=True)
class Windows:
    """Ends of the windows from the start of the step, and their starts' distances from its end, the first the middle's
    end; nanoseconds. Windows are numbered in time: those of ``front``, the middle, those of ``back``."""

    front: list[int]
    back: list[int]

    @property
    def count(self) -> int:
        return len(self.front) + 1 + len(self.back)

    @property
    def middle(self) -> int:
        return len(self.front)

    def span(self, k: int) -> tuple[int, int]:
        """Where a window starts and ends: from the step's start, or (in the back) from its end."""
        if k < self.middle:
            return (self.front[k - 1] if k else 0), self.front[k]
        at = k - self.middle - 1
        return self.back[at], (self.back[at + 1] if at + 1 < len(self.back) else 0)

    def open(self, part: BinPart, phase: int, k: int) -> bool:
        """Whether some of a phase can run in a window."""
        if k < self.middle:
            return self.front[k] > part.release[phase]
        return k == self.middle or self.span(k)[0] > part.tail[phase]

    def earlier(self, k: int, lag: int) -> int:
        """The first window that ends no more than ``lag`` before window k does; -1: the step had not begun then."""
        if k < self.middle:
            moment = self.front[k] - lag
            return -1 if moment <= 0 else bisect_left(self.front, moment)
        ends = [self.back[0] if self.back else 0, *(self.span(j)[1] for j in range(self.middle + 1, self.count))]
        moment = ends[k - self.middle] + lag  # from the step's end
        return next(j for j in range(self.middle, k + 1) if ends[j - self.middle] <= moment)


def _windows(bins: Sequence[Bin], least_ns: int, moment_ns: int | None) -> Windows:
    """Windows that end at releases and begin at tails; both ends together leave a middle in the shortest step. One ends
    at a moment that is given, unless that is in the middle."""
    front = {moment for one in bins for part in one.parts for moment in part.release}
    back = {moment for one in bins for part in one.parts for moment in part.tail}
    whole = max(front) + max(back)
    share = min(1.0, least_ns / whole) if whole else 1.0
    ends, limit = _thinned(front, share), int(max(front) * share)
    if moment_ns is not None and moment_ns <= limit:
        ends = sorted({end for end in ends if abs(end - moment_ns) > limit // (3 * WINDOWS)} | {moment_ns})
    return Windows(ends, _thinned(back, share)[::-1])


def _thinned(moments: set[int], share: float) -> list[int]:
    """Up to `WINDOWS` of the moments in the first share of them, well apart and with the last."""
    limit = int(max(moments) * share)
    found: list[int] = []
    for moment in sorted((m for m in moments if 0 < m <= limit), reverse=True):
        if not found or found[-1] - moment >= limit / WINDOWS:
            found.append(moment)
    return found[::-1]


def _streams(model: pyo.ConcreteModel, problem: PlanningProblem, bins: Sequence[Bin], windows: Windows, q: int,
             kind: str) -> None:
    """No stream works longer than a window lasts, nor before what it works on can begin or after it must have ended."""
    ratio, unit = float(pair_gain(problem).ratio), model.unit_ns
    for stream in (Stream.COMPUTE, Stream.COLLECTIVE):
        for k in range(windows.count):
            clock.ask()
            flows, of_bin = [], defaultdict(list)
            for key in model.v:
                part = bins[key[1]].parts[key[2]]
                if key[0] == q and key[4] == k and part.group.stream is stream:
                    times = part.group.times[kind]
                    duration = (times.f_ns, times.i_ns or 0, times.w_ns or 0)[key[3]]
                    if share := ratio * at_mean_load(part.group, duration) / unit:
                        flows.append((part, key[3], share * model.v[key]))
                        of_bin[key[1]].append(flows[-1][2])
            if not flows:
                continue
            load = sum(flow for *_, flow in flows)
            if k == windows.middle:
                ends = (windows.front[-1] if windows.front else 0) + (windows.back[0] if windows.back else 0)
                model.rows.add(load <= model.makespan - ends / unit)
                continue
            start, end = windows.span(k)
            model.rows.add(load <= abs(end - start) / unit)
            for b, work in of_bin.items():  # implied where x is whole
                model.rows.add(sum(work) <= abs(end - start) / unit * model.x[q, b])
            inside = [(part.release[phase] - start if k < windows.middle else part.tail[phase] - end, flow)
                      for part, phase, flow in flows]
            for cut in sorted({late for late, _ in inside if late > 0}):
                model.rows.add(sum(flow for late, flow in inside if late >= cut) <= (abs(end - start) - cut) / unit)


def _order(model: pyo.ConcreteModel, problem: PlanningProblem, bins: Sequence[Bin], windows: Windows, q: int) -> None:
    """All of each phase runs, none before the one it follows."""
    plain = pair_gain(problem).ratio == 1
    for b, one in enumerate(bins):
        for p, part in enumerate(one.parts):
            loads = part.group.loads
            count = problem.num_microbatches
            phases = _phases(part)
            counted = one.whole or loads == one.parts[0].group.loads
            for phase in phases:  # of a device's share of the microbatches other loads have another part
                done = _done(model, q, b, p, phase, windows.count - 1)
                model.rows.add(done == count * model.n[q, b] if counted else done <= count * model.x[q, b])
            for first, second in pairwise(phases):
                times = part.group.times.values()
                shorter = min(least_of(part.group, min((t.f_ns, t.i_ns or 0, t.w_ns or 0)[phase] for t in times))
                              for phase in (first, second))
                lag = 0 if not plain else part.lag if (first, second) == (0, 1) else shorter if first else 0
                for k in range(windows.count - 1):
                    later = _done(model, q, b, p, second, k)
                    if not isinstance(later, int):
                        model.rows.add(later <= _done(model, q, b, p, first, windows.earlier(k, lag)))


def _done(model: pyo.ConcreteModel, q: int, b: int, p: int, phase: int, k: int) -> pyo.Expression | int:
    """Microbatches of a phase by the end of window k; the number 0 where there can be none."""
    return sum(model.v[q, b, p, phase, j] for j in range(k + 1) if (q, b, p, phase, j) in model.v)


def _memory(model: pyo.ConcreteModel, bins: Sequence[Bin], windows: Windows, q: int,
            capacity: int, memory: int) -> None:
    """What is held at the windows' ends fits the capacity, and with the resident bytes the memory."""
    resident = sum(one.resident / max(1, memory) * model.x[q, b] for b, one in enumerate(bins))
    for k in range(windows.count - 1):
        held = 0.0
        for b, one in enumerate(bins):
            for p, part in enumerate(one.parts):
                phases = _phases(part)
                for (first, second), size in zip(pairwise(phases), part.held, strict=False):
                    if size:
                        held += size * (_done(model, q, b, p, first, k) - _done(model, q, b, p, second, k))
        if not isinstance(held, float):
            model.rows.add(held / max(1, capacity) <= 1)
            model.rows.add(held / max(1, memory) + resident <= 1)
