"""``--objective period``: the shortest time from step to step where no barrier parts them.

Without a barrier what counts is not when the last rank ends but how long each rank takes from its first action to its
last (`mipipe.planner.execution.steps`): ranks may begin the next step one after the other, as they began this one. So
every rank gets a clock of its own that begins at its *offset*, and the schedule is searched on those clocks: an arc
from rank a to rank b takes ``lag + offset_a - offset_b``, and the makespan on the ranks' clocks is the longest span.
Offsets are the shortest ways from the ranks where the graph begins, over all arcs between ranks (duration and lag), so
that nothing starts before what it reads on these clocks either: lists, quotas and annealing work as they are.

Long steps come from short ones as well: without a barrier a step of few microbatches may have next to no idle time, and
repeating its middle (`mipipe.planner.search.repeat`) adds none.

Placements are the known shapes and that of a plan for the makespan, made first, whose own order is the first to compare
with; where none fits, HiGHS is asked for some. Published schedules within the limits are starts, too. The bound is a
device's work where it is shared out evenly; at the placement, the busiest rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

import numpy as np

from mipipe.graphs.errors import InfeasibleError
from mipipe.planner import clock
from mipipe.planner.bounds.loads import work_of
from mipipe.planner.bounds.over_placements import Bound, facts_of
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.jobs.rank_clocks import on_rank_clocks
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.admission import admit_placement, enter, recomputing, why_no_plan
from mipipe.planner.ladder.large import check_s
from mipipe.planner.ladder.period_entry import (
    PeriodEntry,
    enter_period,
    enter_published,
    harvest_period,
    take_period,
)
from mipipe.planner.ladder.placement_rungs import by_mip, nothing_fits
from mipipe.planner.ladder.repeating import RUNG as REPEATED
from mipipe.planner.ladder.repeating import short_instance
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlacementName
from mipipe.planner.placements.shapes import propose_shapes, resident_fits
from mipipe.planner.plan import Placement, Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.search import annealing, best_list, quotas
from mipipe.planner.search.orders import Orders
from mipipe.planner.search.repeat import stretched
from mipipe.planner.time_shares import SHARES

Args = ParamSpec("Args")
Result = TypeVar("Result")

FIRST: tuple[PlacementName, ...] = ("v", "wave", "interleaved", "chain")
"""Shapes that are looked at before all others: without a barrier the first two lose the least."""

KEPT = 4
"""Placements that are annealed at first; the worse half is given up after every round."""

SLICE_S, MOST_S = 0.5, 5.0
"""Seconds of annealing before the first comparison, and at most; rounds grow by half."""

SHORT = (5, 6, 4, 8)
"""Microbatches for every two ranks of the short steps whose middles are repeated, in turns."""


def climb(run: Run, known: Plan | None = None) -> None:
    """Search for the shortest period and make its plan the run's best; ``run.period_ns`` is what it takes.

    ``known``: a plan for the makespan; no other is chosen that has a longer period.

    Raises:
        InfeasibleError: no list fits the memory of any placement.
    """
    run.period_bound_ns = period_bound(run.problem).ns
    entries: list[PeriodEntry] = []
    if known is not None:
        with clock.watched(None):  # it is kept, also where Ctrl-C or the limit ends the solve just now
            entry = enter_period(run, view(run.problem, known.placement), known.schedule, ("plan for the makespan",))
        entries += [] if entry is None else [entry]
    began = run.seconds
    for placement in _placements(run):
        if run.seconds - began > SHARES.until_listed * run.options.time_limit_s or run.past(SHARES.until_repeated):
            break
        if resident_fits(run.problem, placement):
            entry = enter_period(run, view(run.problem, placement))
            entries += [] if entry is None else [entry]
            if entry is not None:
                run.reserve_s = max(run.reserve_s, check_s(run, entry.candidate.instance.size))
    if run.options.use_baselines:
        enter_published(run, entries)
    if not entries:
        entries = _with_room(run)
    if not entries:
        raise InfeasibleError(why_no_plan(run, proven=nothing_fits(run)))
    live = sorted(entries, key=lambda entry: entry.search.best.makespan_ns)[:KEPT]
    seconds, turn = SLICE_S, 0
    with ThreadPoolExecutor(max(2, run.options.threads)) as pool:
        if run.options.use_search:
            _repeat_lists(run, pool, live)
        while run.options.use_search and live and _spare(run, live) > 0 and not _closed(run):
            turn += 1
            _round(run, pool, live, min(seconds, _spare(run, live)), turn)
            live = sorted(live, key=lambda entry: entry.search.best.makespan_ns)[:max(1, len(live) // 2)]
            live = [entry for entry in live if not entry.search.finished]
            seconds = min(MOST_S, 1.5 * seconds)


def _spare(run: Run, live: list[PeriodEntry]) -> float:
    """Seconds left beside those in which what was found for the placements is judged, one after the other."""
    return run.left - len(live) * run.judging_s


def _job(pool: ThreadPoolExecutor, work: Callable[Args, Result], /, *args: Args.args,
         **named: Args.kwargs) -> Future[Result]:
    """Work for the pool under the clock of the solve."""
    context = copy_context()
    return pool.submit(lambda: context.run(work, *args, **named))


def _with_room(run: Run) -> list[PeriodEntry]:
    """Entries from the first plans for the makespan, whose lists leave room for values in flight where that is needed;
    where no known shape fits, of the placement MIP's placements, and with forwards that run again."""
    enter(run)
    if not run.candidates and run.options.use_milp and run.options.placement == "free":
        by_mip(run, admit_placement)
    if not run.candidates and run.options.recompute:
        recomputing(run)
    known, run.candidates, run.best = run.candidates, [], None
    made = [enter_period(run, found.view, found.best.schedule, found.proposer) for found in known
            if found.best is not None]
    return [entry for entry in made if entry is not None]


def _placements(run: Run) -> Iterator[Placement]:
    """The placements of the shape asked for; where all are allowed, one of each of `FIRST` before the others."""
    name = run.options.placement
    first = [next(iter(propose_shapes(run.problem, shape)), None) for shape in FIRST] if name == "free" else []
    known = [placement for placement in first if placement is not None]
    yield from known
    yield from (placement for placement in propose_shapes(run.problem, name) if placement not in known)


def _repeat_lists(run: Run, pool: ThreadPoolExecutor, live: list[PeriodEntry]) -> None:
    """Repeat the middles of short steps as lists give them, size after size of `SHORT` for the best placements."""
    for size in SHORT:
        for at in range(0, len(live), run.options.threads):
            if _closed(run) or run.seconds > SHARES.until_repeated * run.options.time_limit_s:
                return
            some = live[at:at + run.options.threads]
            made = [(entry, _job(pool, _repeat, run, entry, 0.0, run.options.seed + size)) for entry in some]
            for entry, job in made:
                take_period(run, entry, job.result(), REPEATED)


def _round(run: Run, pool: ThreadPoolExecutor, live: list[PeriodEntry], seconds: float, turn: int) -> None:
    """Anneal every placement for some seconds, and meanwhile tune its quotas, where it has any, or a short step."""
    annealed = [_job(pool, annealing.advance, entry.search, seconds, lambda: run.stopped or run.interrupted)
                for entry in live]
    seed, names = run.options.seed + 101 * turn, (REPEATED, "quotas")
    tuned = [(entry, _job(pool, _repeat if turn % 2 else _tune, run, entry, seconds, seed)) for entry in live]
    try:
        for entry, job in zip(live, annealed, strict=True):
            job.result()
            harvest_period(run, entry)
        for entry, made in ((entry, other.result()) for entry, other in tuned):
            take_period(run, entry, made, names[1 - turn % 2])
    except BaseException:
        run.stopped = True
        raise


def _tune(run: Run, entry: PeriodEntry, seconds: float, seed: int) -> Orders | None:
    """The orders of the placement's quotas, tuned further; None where quotas do not fit it."""
    if entry.lines is None:
        return None
    tuned = quotas.tune(entry.candidate.instance, entry.lines, seconds, seed, start=entry.rule,
                        stop=lambda: run.stopped or run.interrupted)
    entry.rule = entry.rule if tuned is None else tuned.rule
    return None if tuned is None else tuned.orders


def _repeat(run: Run, entry: PeriodEntry, seconds: float, seed: int) -> Orders | None:
    """The orders of the placement's next short step, its middle repeated; None where no step is much longer than that.

    A short step begins with its best list, which is repeated as it is; with some seconds its quotas are tuned and it is
    annealed further.
    """
    ranks, count = run.problem.num_ranks, run.problem.num_microbatches
    sizes = [size * ranks // 2 for size in SHORT if size * ranks // 2 + ranks <= count]
    if not sizes:
        return None
    size = next((size for size in sizes if size not in entry.shorts), None) or next(iter(entry.shorts))

    def stop() -> bool:
        return run.stopped or run.interrupted or run.left <= 0

    found: list[Orders | None] = []
    if size not in entry.shorts:
        made = short_instance(entry.candidate, size)
        short = None if made is None else on_rank_clocks(made)
        orders = None if short is None else best_list.best_list(short, seed)
        if short is None or orders is None:
            return None
        found.append(stretched(short, orders, entry.candidate.instance, stop))
        load = int(np.bincount(short.machine, weights=short.dur).max())
        entry.shorts[size] = annealing.start(short, orders, seed, load)
    known = entry.shorts.pop(size)  # to the end: the next turn is another one's
    entry.shorts[size] = known
    if seconds:
        lines = quotas.lines_of(known.instance)
        tuned = None if lines is None else quotas.tune(known.instance, lines, seconds, seed, stop=stop)
        if tuned is not None and tuned.orders.makespan_ns < known.best.makespan_ns:
            known.best = tuned.orders
        annealing.advance(known, seconds, stop)
        found.append(stretched(known.instance, known.best, entry.candidate.instance, stop))
    return min((one for one in found if one is not None), key=lambda one: one.makespan_ns, default=None)


def period_bound(problem: PlanningProblem) -> Bound:
    """No period is shorter over any placement: the work of a stream, shared out evenly."""
    facts, gain, best = facts_of(problem), pair_gain(problem), Bound(0, "")
    for stream in {group.stream for group in problem.groups}:
        work = sum(work_of(problem, group, phase[g]) for g, group in enumerate(problem.groups)
                   if group.stream is stream for phase in (facts.f, facts.i, facts.w))
        found = Bound(-(-gain.shared(work) // problem.num_ranks),
                      f"work of the {stream.value} stream over {problem.num_ranks} devices")
        best = max(best, found, key=lambda bound: bound.ns)
    return best


def _closed(run: Run) -> bool:
    return run.period_ns <= run.period_bound_ns * (1 + run.options.gap)
