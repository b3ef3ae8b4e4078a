"""A placement that is searched for the shortest period: how it enters, and what is made of the orders found for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from mipipe.graphs.errors import MipipeError, PlanError
from mipipe.planner import clock
from mipipe.planner.bounds.over_placements import Bound
from mipipe.planner.execution.steps import schedule_period
from mipipe.planner.how import then
from mipipe.planner.jobs.arrays import build, with_mirrors
from mipipe.planner.jobs.rank_clocks import on_rank_clocks
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.ladder.candidate import Candidate, judge
from mipipe.planner.ladder.harvest import ANNEALING
from mipipe.planner.ladder.state import Incumbent, Run
from mipipe.planner.placements.shapes import resident_fits
from mipipe.planner.plan import Schedule
from mipipe.planner.schedules import BASELINES
from mipipe.planner.search import annealing, best_list, quotas
from mipipe.planner.search.annealing import Search
from mipipe.planner.search.orders import Orders, memory_holds, orders_of_schedule
from mipipe.planner.sizes import NEVER_NS
from mipipe.planner.time_shares import SHARES


@dataclass(slots=True)
class PeriodEntry:
    """A placement in the race: its search on the ranks' clocks, and the period of the best schedule found there; the
    lines of its instance, where quotas fit it, and the best rule so far (`mipipe.planner.search.quotas`); the searches
    of its short steps, by their microbatches."""

    candidate: Candidate
    search: Search
    period_ns: int = NEVER_NS
    seen_ns: int = NEVER_NS
    lines: quotas.Lines | None = None
    rule: quotas.QuotaRule | None = None
    shorts: dict[int, Search] = field(default_factory=dict)


def take_period(run: Run, entry: PeriodEntry, made: Orders | None, rung: str) -> None:
    """Let the search of a placement go on from orders that something else made, if they are better."""
    if made is not None and made.makespan_ns < entry.search.best.makespan_ns:
        entry.search.best, entry.search.origin, entry.candidate.searched = made, "", (rung,)
        harvest_period(run, entry, rung=rung)


def enter_period(run: Run, stage_view: StageView, schedule: Schedule | None = None,
                 proposer: tuple[str, ...] = ()) -> PeriodEntry | None:
    """A placement with its first schedule, the best list's where none is given; None where none fits the memory."""
    try:
        instance = on_rank_clocks(build(stage_view))
    except PlanError:
        return None
    orders = (best_list.best_list(instance, run.options.seed) if schedule is None
              else orders_of_schedule(instance, schedule))
    if orders is None or not memory_holds(instance, orders.seq, orders.length):
        return None
    load = int(np.bincount(instance.machine, weights=instance.dur).max())
    found = Candidate(stage_view, Bound(load, "work of the busiest rank"), False, instance,
                      proposer=proposer or (f"shape {stage_view.placement.name}",))
    entry = PeriodEntry(found, annealing.start(instance, orders, run.options.seed + 1, load),
                        lines=quotas.lines_of(instance))
    found.searched = proposer or ("list",)
    harvest_period(run, entry, schedule)
    return entry if found.best is not None else None


def enter_published(run: Run, entries: list[PeriodEntry]) -> None:
    """Published schedules within the limits: starts where they beat the lists of their placements."""
    for baseline in BASELINES:
        if run.past(SHARES.until_repeated):
            return
        try:
            known = baseline.plan(run.problem, split=True)
        except MipipeError:
            continue
        if run.options.placement not in ("free", known.placement.name) or not resident_fits(run.problem,
                                                                                           known.placement):
            continue
        entry = enter_period(run, view(run.problem, known.placement), known.schedule, (f"published {baseline.name}",))
        if entry is not None:
            entries.append(entry)


def harvest_period(run: Run, entry: PeriodEntry, schedule: Schedule | None = None, rung: str = ANNEALING) -> None:
    """Judge the best orders of a placement if they are new, and take their plan where its period is the shortest.

    ``rung``: what made them, if they are not the first.
    """
    orders, found = entry.search.best, entry.candidate
    if orders.makespan_ns >= entry.seen_ns or (run.best is not None and run.left < run.judging_s):
        return
    entry.seen_ns, began = orders.makespan_ns, time.monotonic()
    schedule = schedule or with_mirrors(found.instance, orders.lists(), clock.ask)
    judged = judge(found.view, schedule)
    clock.ask()
    if not judged.fits:
        return
    period = schedule_period(found.view, schedule)
    run.judging_s = max(run.judging_s, time.monotonic() - began)
    if period >= entry.period_ns:
        return
    found.lineage = found.searched if found.best is None else then(found.searched, rung)
    entry.period_ns, found.best, found.rung = period, judged, found.lineage[-1]
    if run.best is None or period < run.period_ns:
        run.best, run.period_ns = found, period
        run.history.append(Incumbent(run.seconds, judged.makespan_ns, found.rung, found.placement.name))
        run.report(f"period {period / run.problem.unit_ns:g}" if run.problem.unit_ns != 1 else "period")
    if found not in run.candidates:
        run.candidates.append(found)
