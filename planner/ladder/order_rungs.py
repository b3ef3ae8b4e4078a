"""The MIP rungs of the ladder and the published schedules, each as one step on one candidate.

Every step offers a schedule to the candidate and adds its row to the ablation: makespan before and after, size of the
model, seconds. Solver outcomes stay data; a solve that Ctrl-C ended raises `KeyboardInterrupt` again, after its
incumbent was kept.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any

from mipipe.graphs.errors import MipipeError, PlanError
from mipipe.planner.bounds.at_placement import Bound
from mipipe.planner.execution.measure import makespan_of
from mipipe.planner.jobs.arrays import Instance, build
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.candidate import Candidate, candidate, judge, offer_judged
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.order import job_shop, time_indexed, windows
from mipipe.planner.placements.shapes import resident_fits
from mipipe.planner.plan import Placement, Schedule
from mipipe.planner.schedules import BASELINES
from mipipe.planner.search import annealing, pair_search
from mipipe.planner.search.orders import orders_of_schedule
from mipipe.planner.sizes import NEVER_NS
from mipipe.planner.time_shares import SHARES

EXACT_NODES = 130
"""Elementary actions up to which the exact order MIP is tried: HiGHS proves about 100 with a fixed placement."""


def adopt(run: Run, found: Candidate, schedule: Schedule, rung: str, after: tuple[str, ...] = ()) -> bool:
    """Offer a schedule to a candidate; if better, the search goes on from it. Whether it was kept.

    ``after``: the steps that led to what the rung began with, none where it began anew.
    """
    try:
        kept = offer_judged(found, judge(found.view, schedule), rung, after)
    except PlanError as error:
        found.notes.append(f"{rung}: {error}")
        return False
    if kept:
        run.note(found, rung)
        if found.pairs is not None:
            pair_search.go_on_from(found.pairs, schedule, found.makespan_ns)
            found.searched = found.lineage
        elif found.search is not None and not found.halved:
            search = _search_from(found, found.instance, schedule, run.options.seed + 17)
            if search is not None:
                found.helpers.clear()
                found.search, found.searched = search, found.lineage
    return kept


def record(run: Run, rung: str, found: Candidate, before: int, began: float, outcome: SolverOutcome | None = None,
           **more: Any) -> None:
    """Add a row to the ablation. Times in the problem's unit; None where there was no plan."""
    unit = run.problem.unit_ns

    def shown(makespan: int) -> float | None:
        return None if makespan >= NEVER_NS else makespan / unit

    run.ablation.append({
        "rung": rung, "placement": found.placement.name, "before": shown(before), "makespan": shown(found.makespan_ns),
        "variables": outcome.num_variables if outcome else None,
        "constraints": outcome.num_constraints if outcome else None,
        "seconds": round(time.monotonic() - began, 3), **more})


def published(run: Run) -> None:
    """The published schedules that exist for the problem and keep its limits: the best so far of their placements, or,
    where they beat all others, candidates of their own."""
    began, before = time.monotonic(), run.makespan_ns
    name = run.options.placement
    best: Candidate | None = None
    tries = list(product((True,), BASELINES, ("even", "balanced")))
    if run.problem.pairs_gain:  # only then are a schedule's own blocks ever shorter than the same order split
        tries = [*product((False,), BASELINES[::-1], ("even", "balanced")), *tries]
    for split, baseline, cut in tries:
        if run.past(SHARES.until_entered):
            break
        try:
            known = baseline.plan(run.problem, split=split, cut=cut)  # type: ignore[arg-type]
            if name not in ("free", known.placement.name) or not resident_fits(run.problem, known.placement):
                continue
            found = next((other for other in run.candidates if same(other.placement, known.placement)), None)
            stages = found.view if found is not None else view(run.problem, known.placement)
            if makespan_of(stages, known.schedule) >= (found.makespan_ns if found else run.makespan_ns):
                continue
            judged = judge(stages, known.schedule)
            found = found or candidate(run.problem, known.placement)
        except MipipeError:
            continue
        if not offer_judged(found, judged, f"published {baseline.name}"):
            continue
        if found not in run.candidates:
            found.proposer = found.lineage
        if found not in run.candidates or not found.halved:  # half of the ranks cannot hold what is not symmetric
            seed(run, found)
        run.note(found, found.rung)
        if best is None or found.makespan_ns < best.makespan_ns:
            best = found
    if best is not None and best.makespan_ns < before:
        record(run, "published schedules", best, before, began)


def seed(run: Run, found: Candidate) -> None:
    """Enter a candidate that came with a schedule: the search starts there, on the whole placement. Where no search can
    (`_search_from`), the candidate keeps the one it has, if any."""
    assert found.best is not None
    instance = build(found.view) if found.halved else found.instance
    search = _search_from(found, instance, found.best.schedule, run.options.seed + 31)
    if search is not None:
        found.halved, found.instance, found.search, found.outline = False, instance, search, None
        found.pairs = pair_search.start(instance, search.best, run.options.seed + 37, found.bound.ns)
        if found.pairs is not None:
            pair_search.go_on_from(found.pairs, found.best.schedule, found.makespan_ns)
        found.searched = found.lineage
    if found not in run.candidates:
        run.candidates.append(found)


def _search_from(found: Candidate, instance: Instance, schedule: Schedule, seed: int) -> annealing.Search | None:
    """A search that begins at a schedule that was judged, pairs in parts; None where its orders deadlock in a search,
    which takes the microbatches of a stage's replica in their order: with replicas a schedule may not."""
    orders = orders_of_schedule(instance, schedule)
    return None if orders is None else annealing.start(instance, orders, seed, found.bound.ns)


def same(one: Placement, other: Placement) -> bool:
    """Whether two placements differ in their names at most."""
    return (one.stages, one.routes) == (other.stages, other.routes)


def polish_candidate(run: Run, found: Candidate, seconds: float, window: int = 40, turn: int = 0) -> None:
    """Windows of the order MIP over the candidate's best schedule; ``turn`` changes the seed."""
    if found.best is None or found.closed:
        return
    began, before = time.monotonic(), found.makespan_ns
    schedule, _, count = windows.improve_by_windows(
        found.view, found.best.schedule, window=window, time_limit_s=seconds, seed=run.options.seed + 977 * turn,
        target_ns=found.bound.ns)
    if count:
        adopt(run, found, schedule, "windows MIP", found.lineage)
    record(run, "windows MIP", found, before, began, improvements=count)


def prove(run: Run, found: Candidate, seconds: float) -> None:
    """The exact order MIP on a small instance: a better order, or the proof that there is none."""
    if found.best is None or found.closed or found.instance.size > EXACT_NODES:
        return
    began, before = time.monotonic(), found.makespan_ns
    result = job_shop.solve_order(found.view, time_limit_s=seconds, seed=run.options.seed, start=found.best.schedule)
    if result.schedule is not None and result.makespan_ns is not None and result.makespan_ns < before:
        adopt(run, found, result.schedule, "order MIP")
    if result.bound_ns > found.bound.ns:
        found.bound = Bound(min(result.bound_ns, found.makespan_ns), "order MIP")
    record(run, "order MIP", found, before, began, result.outcome, bound=result.bound_ns / run.problem.unit_ns)
    _again(result.outcome)


def index(run: Run, found: Candidate, model: time_indexed.Indexed, seconds: float) -> bool:
    """A higher bound at a candidate by relaxations of its time-indexed MIP, up to the incumbent; whether they ended
    before their time."""
    began, before = time.monotonic(), found.makespan_ns
    ended = model.relax(run.makespan_ns, seconds, run.options.seed)
    bound_ns = model.bound_ns(run.makespan_ns)
    if bound_ns > found.bound.ns:
        found.bound = Bound(bound_ns, time_indexed.RELAXED)
    record(run, time_indexed.RELAXED, found, before, began, model.outcome, bound=bound_ns / run.problem.unit_ns)
    _again(model.outcome)
    return ended


def _again(outcome: SolverOutcome) -> None:
    if outcome.termination is SolverStatus.INTERRUPTED:
        raise KeyboardInterrupt
