"""A bound over all placements from devices that see their first gradients one after the other: a configuration LP.

As `mipipe.planner.milp.placement.configurations`, which lets every device see its first gradient as early as any can.
But those of different devices are of different units or microbatches (`mipipe.planner.bounds.first_gradients`): each
device has a *cell* of its own, the k-th gradient of unit u, at the moment t[u,k] at the earliest. A device with
that cell holds u, runs a microbatch of it, and no gradient of its compute stream before; units without resident bytes,
which can be everywhere, aside. With h[u,k] the most weight that such a device can carry within C (a MIP; there is one
more for devices that hold none but such units), all D devices together carry no more than

    the sum of the D largest h[u,k]        =   min over theta of    D theta + sum_{u,k} max(0, h[u,k] - theta)

for any weights pi of the units. Below ``sum pi size`` no makespan of C is possible. How late the k-th gradient is
depends on how many devices hold the unit with the fewest holders: C is refuted when it is for every such number.
Weights are sought as there, near the best ones so far (the box step method of Marsten, Hogan and Blankenship 1975), and
h is worked out for later cells only where those before are among the D largest.

For chains on equal devices; elsewhere it has nothing to say.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.first_gradients import fewest_holders, moments_of
from mipipe.planner.bounds.over_placements import Bound, facts_of, lightest_units, problem_bound, room_of_units
from mipipe.planner.gap import SOLVER_GAP
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.placement.configurations import WIDEST
from mipipe.planner.milp.placement.device_model import Bin, bins_of, devices_model
from mipipe.planner.problem import PlanningProblem

NAME = "cell MIP"
"""What the formulation is called in a plan's history."""

STEP, LEAST_STEP, MOST_STEP = 5e-4, 2e-4, 4e-3
"""How far above the bound a makespan is tried to be refuted at first, at least and at most."""

BOX, LEAST_BOX, TIGHTER = 1.06, 1.03, 0.6
"""By what factor weights may move at once at first, and when another makespan is tried; what is left of its excess over
1 when they became no better."""

REFUTED = 1 - 10 * SOLVER_GAP
"""Shares below this are not the whole, whatever the solver's tolerances."""

INCUMBENTS = 4
"""Configurations kept of one MIP, the best last."""

GAP, LONGEST_S = 2e-4, 3.0
"""Relative gap and seconds of one MIP."""


@dataclass(slots=True)
class CellCase:
    """Placements whose unit with the fewest holders has so many. ``cells[b]``: (moment in ns, how many) of bin
    b, and behind all bins those of devices that hold nothing resident.

    ``columns``: (bin, moment, counts) of configurations seen; ``share``: the least that devices carry within ``at_ns``,
    with ``weights``; ``priced``: what they carry with those ``tried`` now.
    """

    cells: list[list[tuple[int, int]]]
    weights: list[float]
    tried: list[float]
    columns: list[tuple[int, int, list[float]]] = field(default_factory=list)
    priced: dict[tuple[int, int], float] = field(default_factory=dict)
    share: float = math.inf
    box: float = BOX
    at_ns: int = 0


@dataclass(slots=True)
class CellBound:
    """The bound of one problem, raised step by step; ``ended`` when it can be raised no further. ``models``: of a
    device with a cell, as Pyomo's and in HiGHS's rows."""

    problem: PlanningProblem
    bins: list[Bin] = field(default_factory=list)
    cases: list[CellCase] | None = None
    models: dict[tuple[int, int], tuple[Any, highs.Matrix]] = field(default_factory=dict)
    least_ns: int = 0
    step_share: float = STEP
    ended: bool = False
    outcome: SolverOutcome = field(default_factory=lambda: SolverOutcome(SolverStatus.TIME_LIMIT, None, None, 0., 0, 0))

    def improve(self, known_ns: int, seconds: float, seed: int) -> Bound | None:
        """The highest makespan refuted in some seconds, if above ``known_ns`` (a known bound, at least 1)."""
        end = time.monotonic() + seconds
        if self.cases is None:
            self.least_ns = max(1, problem_bound(self.problem).ns)
            self.bins, self.cases = cases_of(self.problem)
            self.ended = not self.cases
        best: int | None = None
        while not self.ended and time.monotonic() < end:
            bound = max(known_ns, best or 0, self.least_ns)
            tried_ns = bound + max(1, int(self.step_share * bound))
            most = 0.0
            for case in self.cases:
                share = self._refute(case, tried_ns, end, seed)
                if share is None:  # time is up
                    break
                most = max(most, share)
                if most >= 1:
                    break
            if share is None:
                break
            if most < 1:
                best = tried_ns
                self.step_share = min(MOST_STEP, max(self.step_share, 0.7 * (1 - most)))
            elif self.step_share > LEAST_STEP:
                self.step_share = max(LEAST_STEP, self.step_share / 2)
            else:
                self.ended = True
        return None if best is None else Bound(
            best, f"{NAME}: what single devices can do that see their first gradients one after the other")

    def _refute(self, case: CellCase, tried_ns: int, end: float, seed: int) -> float | None:
        """What all devices carry of the weight within a makespan; below 1 it is refuted, from 1 on it cannot be. None
        where time is up."""
        if case.at_ns != tried_ns:
            case.at_ns, case.share, case.tried, case.box = tried_ns, math.inf, case.weights, max(case.box, LEAST_BOX)
            case.priced.clear()
        while case.share >= REFUTED and time.monotonic() < end:
            share = self._carried(case, tried_ns, end, seed)
            if share is None:
                return None
            if share < case.share:
                case.share, case.weights, case.box = share, case.tried, 1 + (case.box - 1) * 1.2
            else:
                case.box = 1 + (case.box - 1) * TIGHTER
            found = None if case.box < 1.005 else self._next_weights(case)
            if found is None and case.share >= REFUTED:
                return 1.0
            case.tried = found or case.weights
            case.priced.clear()
        return case.share if case.share < REFUTED else None

    def _carried(self, case: CellCase, tried_ns: int, end: float, seed: int) -> float | None:
        """The sum of the D largest weights; later cells carry no more than those before them."""
        heap = [(-math.inf, b, 0, False) for b, cells in enumerate(case.cells) if cells]
        left, total = self.problem.num_ranks, 0.0
        while left and heap:
            value, b, k, known = heapq.heappop(heap)
            moment, count = case.cells[b][k]
            if known:
                if value >= 0:
                    break
                total -= value * min(count, left)
                left -= min(count, left)
                if k + 1 < len(case.cells[b]):
                    heapq.heappush(heap, (value, b, k + 1, False))
                continue
            carried = case.priced.get((b, k))
            if carried is None and time.monotonic() < end:
                carried = self._price(case, b, moment, tried_ns, end, seed)
            if carried is None:
                return None
            case.priced[b, k] = carried
            heapq.heappush(heap, (max(value, -carried), b, k, True))
        return total

    def _price(self, case: CellCase, b: int, moment: int, tried_ns: int, end: float, seed: int) -> float | None:
        """The most weight that a device with a cell can carry; what is proven of it. None where nothing is."""
        if (b, moment) not in self.models:
            made = _model(self.problem, self.bins, b, moment, self.least_ns)
            self.models[b, moment] = made, highs.compiled(made)
        model, matrix = self.models[b, moment]
        model.makespan.setlb(tried_ns / model.unit_ns)
        model.makespan.setub(tried_ns / model.unit_ns)
        model.goal.set_value(sum(weight * model.n[0, j] for j, weight in enumerate(case.tried)))
        seen: list[np.ndarray] = []
        limit = min(LONGEST_S, max(clock.LEAST_S, end - time.monotonic()))
        self.outcome = highs.solve(model, time_limit_s=limit, seed=seed, gap=GAP, matrix=matrix,
                                   on_incumbent=lambda _, values: seen.append(values))
        infeasible = self.outcome.infeasible
        unfinished = not infeasible and self.outcome.termination is not SolverStatus.OPTIMAL
        over = time.monotonic() >= end - clock.LEAST_S
        if self.outcome.termination is SolverStatus.INTERRUPTED or (unfinished and over):
            return None  # what little it has proven would stay
        place = {id(column): number for number, column in enumerate(matrix.variables)}
        at = [place[id(model.n[0, j])] for j in range(len(self.bins))]
        case.columns += [(b, moment, np.maximum(0.0, values[at]).tolist()) for values in seen[-INCUMBENTS:]]
        return 0.0 if infeasible else self.outcome.bound

    def _next_weights(self, case: CellCase) -> list[float] | None:
        """The weights near the best that the configurations seen carry least of; None where they carry them all."""
        even = _even(self.bins)
        model = pyo.ConcreteModel(name="configuration LP")
        model.weight = pyo.Var(range(len(even)), bounds=lambda _, b: (
            max(even[b] / WIDEST, case.weights[b] / case.box), min(even[b] * WIDEST, case.weights[b] * case.box))
            if self.bins[b].resident else (0, even[b]))  # what can be everywhere may be worth nothing
        model.theta = pyo.Var(bounds=(0, None))
        cells = sorted({(b, moment) for b, moment, _ in case.columns})
        model.more = pyo.Var(range(len(cells)), bounds=(0, None))
        model.rows = pyo.ConstraintList()
        model.rows.add(sum(model.weight[b] * one.size for b, one in enumerate(self.bins)) == 1)
        for b, moment, counts in case.columns:
            model.rows.add(sum(model.weight[j] * count for j, count in enumerate(counts) if count)
                           <= model.theta + model.more[cells.index((b, moment))])
        model.goal = pyo.Objective(expr=self.problem.num_ranks * model.theta + sum(
            dict(case.cells[b])[moment] * model.more[n] for n, (b, moment) in enumerate(cells)))
        outcome = highs.solve(model, time_limit_s=5.0, seed=0)
        if outcome.objective is None or outcome.objective > REFUTED:
            return None
        return [model.weight[b].value for b in range(len(even))]


def _even(bins: Sequence[Bin]) -> list[float]:
    """Weights in proportion to work; of all units together 1."""
    return [one.work / one.size / sum(other.work for other in bins) for one in bins]


def cases_of(problem: PlanningProblem) -> tuple[list[Bin], list[CellCase]]:
    """The bins, and a case for each number of holders that the unit with the fewest may have; no cases where the
    problem is no chain on equal devices."""
    devices = problem.topology.devices
    if len({device.kind for device in devices}) > 1 or len({device.memory_bytes for device in devices}) > 1:
        return [], []
    units, hop = lightest_units(problem, facts_of(problem), solid=True)
    if units is None:
        return [], []
    units = units[::-1]
    bins = bins_of(problem)
    solid = [u for one in bins if one.resident for u in one.units]
    room = room_of_units(problem, units)
    cases = []
    for fewest in fewest_holders(units, devices=problem.num_ranks, room=room):
        moments = moments_of(units, fewest, devices=problem.num_ranks, microbatches=problem.num_microbatches,
                             room=room, slack=hop)
        of_unit = dict(zip(sorted(solid), moments, strict=True))
        cells = [sorted(Counter(moment for u in one.units for moment in of_unit[u]).items()) if one.resident else []
                 for one in bins]
        if len(solid) < sum(one.size for one in bins):
            cells.append([(0, problem.num_ranks)])
        cases.append(CellCase(cells, _even(bins), _even(bins)))
    return bins, cases


def _model(problem: PlanningProblem, bins: Sequence[Bin], b: int, moment: int, least_ns: int) -> pyo.ConcreteModel:
    """A device whose first gradient is one of bin b, at a moment (ns); behind all bins one that holds no bytes."""
    late = []
    for one in bins:
        clock.ask()
        parts = []
        for part in one.parts:
            start, gradient, weight = part.release
            if one.resident and part.group.stream is Stream.COMPUTE and gradient < moment:
                parts.append(replace(part, release=(start, moment, moment + weight - gradient)))
            else:
                parts.append(part)
        late.append(replace(one, parts=tuple(parts)))
    model = devices_model(problem, late, least_ns, moment)
    model.name = NAME
    model.share.deactivate()
    model.goal.sense = pyo.maximize
    if b == len(bins):
        for j, one in enumerate(bins):
            if one.resident:
                model.x[0, j].setub(0)
        return model
    model.x[0, b].setlb(1)
    loads = bins[b].parts[0].group.loads
    one_microbatch = min(loads) / (sum(loads) or 1.0) if loads else 1 / problem.num_microbatches
    model.n[0, b].setlb(0.999 * one_microbatch)
    return model
