"""One placement under search: its view, instances, incumbent and bound; and the judgement of a schedule.

The search's own clock ignores queueing on channels and values in flight. `judge` applies the shared rules (`evaluate`,
and the simulated program's memory) and is the only way an order becomes a plan.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from mipipe.planner.actions import Stream
from mipipe.planner.bounds import at_placement
from mipipe.planner.bounds.load import load_bound
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.measure import by_arrays, exact, makespan_of, timed
from mipipe.planner.execution.simulate_memory import rank_peaks
from mipipe.planner.how import then
from mipipe.planner.jobs.arrays import Instance, build, mirror, with_mirrors
from mipipe.planner.jobs.memory import capacities, capacity, searches_see_all
from mipipe.planner.jobs.order_memory import peaks_of
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.plan import Placement, Plan, Schedule
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.search import best_list, lists
from mipipe.planner.search.annealing import Search
from mipipe.planner.search.orders import Orders
from mipipe.planner.search.pair_search import PairSearch
from mipipe.planner.sizes import NEVER_NS, VERY_MANY

_OFFERS = threading.Lock()
"""Two threads may improve one candidate: the better of their schedules stays."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A schedule with its simulated makespan and the bytes by which each rank exceeds its capacity (0: it fits)."""

    schedule: Schedule
    makespan_ns: int
    excess_bytes: tuple[int, ...]

    @property
    def fits(self) -> bool:
        return not any(self.excess_bytes)


@dataclass(slots=True, eq=False)
class Candidate:
    """A placement in the race. ``best`` is the best judged schedule that fits, ``rung`` what found it.

    ``search`` works on the whole instance, ``outline`` on the one without collectives
    (`mipipe.planner.search.streams`), if any, ``pairs`` instead of both on orders with overlapped pairs, where these
    gain. ``quick``: its first list was made without the compiler, by one rule.

    ``bounded``: its bound is that of the job shop, too.

    ``proposer``, ``lineage`` and ``searched`` are steps as of `mipipe.planner.how`: who proposed the placement, what
    led to ``best``, and what led to the orders that the searches go on from.
    """

    view: StageView
    bound: at_placement.Bound
    halved: bool
    instance: Instance
    search: Search | None = None
    outline: Search | None = None
    pairs: PairSearch | None = None
    helpers: list[Search] = field(default_factory=list)
    best: Judged | None = None
    rung: str = ""
    seconds: float = 0.0
    quick: bool = False
    seen_ns: int = NEVER_NS
    seen_outline_ns: int = NEVER_NS
    reserved: int = 0
    notes: list[str] = field(default_factory=list)
    clean: bool | None = None
    bounded: bool = False
    proposer: tuple[str, ...] = ()
    lineage: tuple[str, ...] = ()
    searched: tuple[str, ...] = ("list",)

    @property
    def placement(self) -> Placement:
        return self.view.placement

    @property
    def makespan_ns(self) -> int:
        return self.best.makespan_ns if self.best else NEVER_NS

    @property
    def two_streams(self) -> bool:
        """Whether some actions run on the collective stream."""
        return any(stream is Stream.COLLECTIVE for _, stream in self.instance.machine_key)

    @property
    def exact(self) -> bool:
        """Whether the clock of the searches is that of the plan: transfers take latency alone, nothing is reduced,
        no update follows."""
        if self.clean is None:
            view = self.view
            self.clean = searches_see_all(view) and not (
                any(view.updates_ns()) or any(view.reduce_ns(s) for s in range(view.num_stages)))
        return self.clean

    @property
    def closed(self) -> bool:
        """Whether the incumbent is proven optimal at this placement."""
        return self.makespan_ns <= self.bound.ns


def candidate(problem: PlanningProblem, placement: Placement, proposer: tuple[str, ...] = ()) -> Candidate:
    """A placement ready for search; a known shape is its own proposer.

    Raises:
        PlanError: the placement does not fit the problem, or some activations never fit together.
    """
    stage_view = view(problem, placement)
    halved = mirror(stage_view) is not None
    capacities(stage_view)
    many = 3 * stage_view.num_stages * problem.num_microbatches > VERY_MANY
    bound = None if many else at_placement.placement_bound(stage_view)
    instance = build(stage_view, halve=halved)
    return Candidate(stage_view, bound or load_bound(instance), halved, instance,
                     proposer=proposer or (f"shape {placement.name}",), bounded=not many)


def judge(stage_view: StageView, schedule: Schedule, *, saved_fit: bool = False) -> Judged:
    """The schedule's makespan by the evaluator, and its memory by the rules of the simulated program.

    ``saved_fit``: saved tensors are known to fit, so memory is looked at only where there is more (`searches_see_all`).

    Raises:
        PlanError: as `mipipe.planner.jobs.times.evaluate`.
    """
    times = timed(stage_view, schedule)
    makespan_ns = makespan_of(stage_view, schedule) if times is None else times.makespan_ns
    excess = (0,) * stage_view.problem.num_ranks
    if not (saved_fit and searches_see_all(stage_view)):
        peaks = (peaks_of(times) if times is not None and exact(times) else
                 rank_peaks(stage_view, lower(Plan("", stage_view.problem, stage_view.placement, schedule))))
        excess = tuple(max(0, peak - capacity(stage_view, rank)) for rank, peak in enumerate(peaks))
    return Judged(schedule, makespan_ns, excess)


def offer_judged(found: Candidate, judged: Judged, rung: str, after: tuple[str, ...] = ()) -> bool:
    """Keep a judged schedule if it fits and is shorter; whether it was kept. ``after``: the steps it came from."""
    with _OFFERS:
        if not judged.fits or judged.makespan_ns >= found.makespan_ns:
            return False
        found.best, found.rung, found.lineage = judged, rung, then(after, rung)
    return True


def judge_orders(found: Candidate, orders: Orders) -> Judged:
    """The judgement of a search's orders. Where its own clock leaves nothing out (no values in flight, no queueing, no
    reduction) that clock is taken."""
    schedule = with_mirrors(found.instance, orders.lists())
    if found.exact:
        return Judged(schedule, orders.makespan_ns, (0,) * found.view.problem.num_ranks)
    return judge(found.view, schedule, saved_fit=True)


def first_orders(found: Candidate, *, compiled: bool, seed: int = 0) -> Orders | None:
    """The best list schedule over the rules, with quotas and without; None where none fits the memory."""
    if not compiled:
        return lists.schedule(found.instance, lists.RULES[0], compiled=False)
    trials = 0 if found.two_streams else 1000  # there the outline's list is better
    return best_list.best_list(found.instance, seed, trials)


def peak_activations(plan: Plan) -> int:
    """The largest memory of any rank beyond its resident bytes, as simulated."""
    stage_view = view(plan.problem, plan.placement)
    quick = by_arrays(stage_view, plan.schedule)
    if quick is None:
        return max(rank_peaks(stage_view, lower(plan)))
    return max(peak - held for peak, held in zip(quick.peak_bytes, quick.resident_bytes, strict=True))
