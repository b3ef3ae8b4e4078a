"""One solve in progress: its clock, candidates, incumbent, history and bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mipipe.planner.bounds.over_placements import Bound
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import proposes_all
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.sizes import NEVER_NS

GRACE_S = 1.0
"""Seconds beyond the limit in which a first plan may still be found."""


@dataclass(frozen=True, slots=True)
class Incumbent:
    """One improvement of a solve: when, how good, found by which rung at which placement."""

    seconds: float
    makespan_ns: int
    rung: str
    placement: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress callback sees: the phase, the incumbent and bound so far (None before the first)."""

    seconds: float
    phase: str
    makespan_ns: int | None
    bound_ns: int | None
    placement: str = ""
    rung: str = ""


@dataclass(slots=True)
class Run:
    """One solve in progress. ``left_out_ns``: no placement left out for want of time can be shorter. ``entered``: every
    placement of the shape asked for is among the candidates or was left out. ``bound_what`` is the argument for
    ``bound_ns``; `raise_bound` sets both. ``no_plan`` says why there is none, if
    not for want of time. ``period_ns`` and its bound are those of the objective of that name, and
    ``judging_s`` the seconds that judging one of its schedules took at most."""

    problem: PlanningProblem
    options: PlanOptions
    on_progress: Callable[[Progress], None] | None = None
    began: float = field(default_factory=time.monotonic)
    candidates: list[Candidate] = field(default_factory=list)
    best: Candidate | None = None
    bound_ns: int | None = None
    bound_what: str = ""
    history: list[Incumbent] = field(default_factory=list)
    ablation: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    interrupted: bool = False
    reserve_s: float = 0.0
    left_out_ns: int = NEVER_NS
    entered: bool = False
    no_plan: str = ""
    period_ns: int = NEVER_NS
    period_bound_ns: int = 0
    judging_s: float = 0.0
    covered: bool | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until the limit, less what the last check of the plan takes; none after Ctrl-C."""
        return 0.0 if self.interrupted else self.options.time_limit_s - self.reserve_s - self.seconds

    def past(self, share: float) -> bool:
        """Whether so much of the time limit is over, what is kept for the end counted as over."""
        return self.left < (1 - share) * self.options.time_limit_s

    @property
    def patience(self) -> float:
        """Seconds until the solve stops where it stands (`mipipe.planner.clock`): at the limit; `GRACE_S` later as long
        as there is no plan; at once after Ctrl-C, in whatever thread."""
        return self.left if self.best is not None or self.interrupted else self.left + self.reserve_s + GRACE_S

    @property
    def makespan_ns(self) -> int:
        return self.best.makespan_ns if self.best else NEVER_NS

    @property
    def closed(self) -> bool:
        """Whether nothing allowed can be better (or better by more than the gap asked for)."""
        if self.best is None:
            return False
        return self.lowest_ns is not None and self.makespan_ns <= self.lowest_ns * (1 + self.options.gap)

    @property
    def lowest_ns(self) -> int | None:
        """No plan the options allow is shorter, as far as known."""
        lowest = self.lowest
        return None if lowest is None else lowest.ns

    @property
    def lowest(self) -> Bound | None:
        """The bound over all placements, or over those of the shape asked for; None before the first."""
        over_all = None if self.bound_ns is None else Bound(self.bound_ns, self.bound_what)
        if not self.candidates or not self.entered or not self.of_shape:
            return over_all
        least = min((found.bound for found in self.candidates), key=lambda bound: bound.ns)
        count = len(self.candidates)
        of_shape = (Bound(self.left_out_ns, "a placement left out for want of time") if self.left_out_ns < least.ns
                    else least if count == 1 else Bound(least.ns, f"{least.what} (the least of {count} placements)"))
        return of_shape if over_all is None else max(of_shape, over_all, key=lambda bound: bound.ns)

    def raise_bound(self, bound: Bound) -> None:
        """Note a bound over all placements, if it is better than the known one."""
        if self.bound_ns is None or bound.ns > self.bound_ns:
            self.bound_ns, self.bound_what = bound.ns, bound.what

    @property
    def recomputes(self) -> bool:
        """Whether stages may run F again; then a shape stands for more placements than are ever listed."""
        return self.options.recompute and any(group.recompute_bytes is not None for group in self.problem.groups)

    @property
    def of_shape(self) -> bool:
        """Whether every placement of the shape asked for is proposed, so that the least of their bounds is one over all
        of them."""
        if self.covered is None:
            self.covered = not self.recomputes and proposes_all(self.problem, self.options.placement)
        return self.covered

    def leave_out(self, least_ns: int) -> None:
        """Note a placement that there is no time for, and what it could reach at best."""
        self.left_out_ns = min(self.left_out_ns, least_ns)

    def report(self, phase: str) -> None:
        """Tell the callback where the solve stands."""
        if self.on_progress is not None:
            best = self.best
            self.on_progress(Progress(self.seconds, phase, best.makespan_ns if best else None, self.bound_ns,
                                      best.placement.name if best else "", best.rung if best else ""))

    def note(self, found: Candidate, phase: str) -> bool:
        """Make a candidate's incumbent the solve's if it is better; whether it was."""
        with self.lock:
            known = self.history[-1].makespan_ns if self.history else NEVER_NS
            if found.best is None or found.makespan_ns >= known:
                return False
            self.best = found
            self.history.append(Incumbent(self.seconds, found.makespan_ns, found.rung, found.placement.name))
            self.report(phase)
        return True
