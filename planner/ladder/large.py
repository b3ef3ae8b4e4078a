"""Large problems: tune list rules on few microbatches, apply them to all, search on where that still helps.

A solve of 64 ranks x 1,024 microbatches cannot afford what smaller ones do (bounds by job shop, orders in Python lists,
annealing over 200,000 actions). Here placements stay arrays: each is cut down to a few microbatches per rank, its rule
is tuned there (`mipipe.planner.search.quotas`), the placements are compared by what they would take for all
microbatches (the rest runs at the pace of the busiest rank), and the best rules, tuned a little more and blended with a
backward one (`mipipe.planner.search.bidirectional`), schedule the whole; what annealing can still improve is annealed.

Tuning stops by the clock, so a seed fixes the result only where the machine keeps pace. What is lost is lost before the
first gradients come back: a rank in the middle fills its memory with forwards and waits, which it gives back nowhere
else. ``benchmarks/results/NOTES.md`` has what was measured and tried.

The bound at the placement is the busiest rank's: earliest start + load + what must follow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.bounds.load import load_bound
from mipipe.planner.bounds.over_placements import facts_of
from mipipe.planner.jobs.arrays import Instance, build, mirror
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.ladder.candidate import Candidate, judge_orders, offer_judged
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlacementName
from mipipe.planner.placements.cuts import earliest_end, place_spread, units
from mipipe.planner.placements.shapes import light_ends, propose_shapes, resident_fits, shapes
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.search import annealing, bidirectional, lists, quotas
from mipipe.planner.search.orders import Orders
from mipipe.planner.sizes import CHECKED_S, MANY, VERY_MANY
from mipipe.planner.time_shares import SHARES

LARGE_ACTIONS = 1_500
"""Actions of a chain from which a problem is large: from there tuned rules give shorter plans than the race of
lists and searches."""

LARGE_SHAPES: tuple[PlacementName, ...] = ("two-way", "twin-v", "twin-wave", "ring", "chain", "v")
"""Shapes tried on large problems, the most promising first."""

MOST_STAGES = 2
"""Stages per rank up to which placements of large problems are tried: more take longer than they gain."""

ROUNDS = 3
"""Microbatches per rank on which rules are tuned: warm-up and cool-down last about one each."""


@dataclass(slots=True)
class OutlineEntry:
    """A placement in the comparison: cut down to few microbatches, and the best rule found for it there."""

    placement: Placement
    small: Instance
    lines: quotas.Lines
    tuned: quotas.TunedQuotas
    expected_ns: int
    rules: list[quotas.QuotaRule]
    backward: quotas.QuotaRule | None = None
    turns: int = 0


def applies(problem: PlanningProblem) -> bool:
    """Whether a problem is large, with equal microbatches on one stream, values in flight and channels free."""
    return (chain_actions(problem) > LARGE_ACTIONS
            and not any(group.loads or group.stream is Stream.COLLECTIVE for group in problem.groups)
            and not any(edge.num_bytes or edge.grad_bytes for edge in problem.edges))


def is_huge(problem: PlanningProblem) -> bool:
    """Whether looking at published schedules takes too long; where pairs gain they are worth more time."""
    return chain_actions(problem) > (VERY_MANY if problem.pairs_gain else MANY)


def chain_actions(problem: PlanningProblem) -> int:
    """Actions of a chain: F, I and W of every microbatch on every rank."""
    return 3 * problem.num_ranks * problem.num_microbatches


def check_s(run: Run, actions: int) -> float:
    """Seconds kept for what follows the search, for a plan of so many actions."""
    return min(SHARES.checking * run.options.time_limit_s, CHECKED_S * actions)


def climb(run: Run) -> Tuning | None:
    """Make the run's candidates: the first at once by default rules, the best of all placements by tuned ones; what
    goes on tuning them, None where no list fits."""
    limit = run.options.time_limit_s
    run.reserve_s = check_s(run, chain_actions(run.problem))
    entries: list[OutlineEntry] = []
    waiting = large_placements(run)
    left_out: list[Placement] = []
    for placement in waiting:
        if (entries and run.past(SHARES.until_bounded)) or run.interrupted:
            left_out += [placement, *(waiting if run.options.placement != "free" else ())]
            break
        entry = _enter(run, placement, SHARES.first_quotas * limit if entries else 0.0)
        if entry is None:  # no list fits, but other orders may
            left_out.append(placement)
            continue
        if not entries:
            _apply(run, entry, "list")
            if run.left > 0:  # the first plan took the first rule at hand
                entry = _enter(run, placement, SHARES.first_quotas * limit) or entry
        entries.append(entry)
    if not entries:
        return None
    left_out += [entry.placement for entry in entries]
    began, before = time.monotonic(), run.makespan_ns
    for kept in (3, 2, 1):
        entries.sort(key=lambda entry: entry.expected_ns)
        for entry in entries[:kept]:
            _tune(run, entry, min(SHARES.more_quotas * limit / kept, run.left))
    for entry in entries[:2] if run.left > 0 or run.best is None else ():
        _apply(run, entry, "quotas")
    heads = facts_of(run.problem).head
    for placement in left_out:
        if all(found.placement != placement for found in run.candidates):
            run.leave_out(int(earliest_end(run.problem, placement, heads)))
    run.entered = True
    run.ablation.append({"rung": "quotas", "placement": run.best.placement.name if run.best else "",
                         "before": before / run.problem.unit_ns, "makespan": run.makespan_ns / run.problem.unit_ns,
                         "variables": None, "constraints": None, "seconds": round(time.monotonic() - began, 3)})
    return Tuning(run, entries)


@dataclass(slots=True)
class Tuning:
    """Rules tuned further, in turns: the best placement's, by reversed time as well, then the next one's."""

    run: Run
    entries: list[OutlineEntry]
    turns: int = 0

    def step(self, seconds: float) -> bool:
        """Tune one placement's rule for some seconds and apply it to all microbatches."""
        self.entries.sort(key=lambda entry: entry.expected_ns)
        entry = self.entries[self.turns % 3 // 2 % len(self.entries)]  # the best two times of three
        self.turns += 1
        _turn(self.run, entry, 0.4 * seconds)
        _apply(self.run, entry, "quotas", 0.6 * seconds)
        return True


def large_placements(run: Run) -> Iterator[Placement]:
    """Placements of the allowed shapes: where ends are light they are spread, because one rank with a head on top of
    its share decides the pace of all."""
    problem, name = run.problem, run.options.placement
    ends = light_ends(problem)
    for shape_name in LARGE_SHAPES if name == "free" else (name,):
        spread = [shape for shape in shapes(problem.num_ranks, shape_name)
                  if name == "free" and ends and len(units(problem)) - len(ends) >= shape.num_stages]
        found = (place_spread(problem, shape, ends) for shape in spread) if spread else propose_shapes(problem,
                                                                                                       shape_name)
        yield from (placement for placement in found if resident_fits(problem, placement)
                    and (name != "free" or len(placement.stages) <= MOST_STAGES * problem.num_ranks + len(ends)))


def _enter(run: Run, placement: Placement, seconds: float) -> OutlineEntry | None:
    """The placement with few microbatches and a first rule; None if none fits its memory."""
    count = min(run.problem.num_microbatches, ROUNDS * run.problem.num_ranks)
    count -= count % 2
    try:
        small = _instance(view(run.problem.replace(num_microbatches=count), replace(
            placement, routes=tuple(route[:count] for route in placement.routes))))
    except PlanError:
        return None
    lines = quotas.lines_of(small)
    if lines is None:
        return None
    tuned = quotas.tune(small, lines, seconds, run.options.seed, stop=lambda: run.interrupted)
    if tuned is None:
        return None
    return OutlineEntry(placement, small, lines, tuned, _expected(run, small, tuned.orders), [tuned.rule])


def _expected(run: Run, small: Instance, orders: Orders) -> int:
    """The makespan with all microbatches, if the rest runs at the pace of the busiest rank."""
    rest = run.problem.num_microbatches - small.view.problem.num_microbatches
    return orders.makespan_ns + rest * lists.period(small)


def _tune(run: Run, entry: OutlineEntry, seconds: float) -> None:
    """Tune an entry's rule further; what was found is kept for the whole problem to choose from."""
    tuned = _longer(run, entry.small, entry.lines, entry.tuned, seconds)
    if tuned.orders.makespan_ns < entry.tuned.orders.makespan_ns:
        entry.rules.append(tuned.rule)
        entry.tuned = tuned
        entry.expected_ns = _expected(run, entry.small, tuned.orders)


def _longer(run: Run, instance: Instance, lines: quotas.Lines, tuned: quotas.TunedQuotas,
            seconds: float) -> quotas.TunedQuotas:
    """The best of tuning further, with another seed on every thread."""
    with ThreadPoolExecutor(run.options.threads) as pool:
        waiting = [pool.submit(quotas.tune, instance, lines, seconds, run.options.seed + 7 * n + tuned.tried,
                               start=tuned.rule, stop=lambda: run.interrupted) for n in range(run.options.threads)]
        found = [better for better in (future.result() for future in waiting) if better is not None]
    return min([tuned, *found], key=lambda other: other.orders.makespan_ns)


def _turn(run: Run, entry: OutlineEntry, seconds: float) -> None:
    """Tune an entry's rule for reversed time, which is good at the other end of the step."""
    mirrored, lines, _ = bidirectional.backwards(entry.small, entry.lines)
    tuned = quotas.tune(mirrored, lines, seconds, run.options.seed + entry.turns, start=entry.backward,
                        rules=bidirectional.backward_rules, stop=lambda: run.interrupted)
    entry.turns += 1
    entry.backward = tuned.rule if tuned is not None else None


def _apply(run: Run, entry: OutlineEntry, rung: str, seconds: float = 0.0) -> None:
    """Schedule all microbatches by an entry's rules, as a candidate; the search may go on from it.

    What is best on few microbatches may pay for its short ends with a slower middle, so all rules found on the way are
    tried, and the best is tuned some ``seconds`` more.
    """
    found = next((other for other in run.candidates if other.placement == entry.placement), None)
    few = chain_actions(run.problem) <= VERY_MANY
    if found is None:
        whole = view(run.problem, entry.placement)
        instance = _instance(whole)
        found = Candidate(whole, load_bound(instance), bool((instance.twin >= 0).any()), instance,
                          proposer=(f"shape {entry.placement.name}",))
    if few and rung != "list":
        found.bound = max(found.bound, placement_bound(found.view), key=lambda bound: bound.ns)
    lines = quotas.lines_of(found.instance)
    assert lines is not None
    rules = [quotas.moved(rule, entry.lines, lines) for rule in entry.rules]
    tuned = quotas.tune(found.instance, lines, 1e9, run.options.seed, rules=lambda _: iter(rules),
                        evaluations=len(rules), stop=lambda: run.interrupted)
    if tuned is None:
        return
    clock.ask()
    if seconds:
        tuned = _longer(run, found.instance, lines, tuned, seconds)
        entry.rules.append(quotas.moved(tuned.rule, lines, entry.lines))
    clock.ask()
    orders = _blended(found.instance, lines, entry, tuned.orders)
    if orders.makespan_ns >= found.makespan_ns:
        return
    clock.ask()
    judged = judge_orders(found, orders)
    if offer_judged(found, judged, rung):
        found.searched = found.lineage
        if found not in run.candidates:
            run.candidates.append(found)
        found.search = annealing.start(found.instance, orders, run.options.seed + 1, found.bound.ns)
        run.note(found, rung)


def _blended(instance: Instance, lines: quotas.Lines, entry: OutlineEntry, forward: Orders) -> Orders:
    """The better of a schedule and of what it becomes with the entry's backward rule at the other end."""
    if entry.backward is None:
        return forward
    mirrored, turned, image = bidirectional.backwards(instance, lines)
    _, small, _ = bidirectional.backwards(entry.small, entry.lines)
    backward = quotas.run_rule(mirrored, turned, quotas.moved(entry.backward, small, turned))
    return forward if backward is None else bidirectional.blend(instance, lines, forward, mirrored, image, backward)


def _instance(whole: StageView) -> Instance:
    return build(whole, halve=mirror(whole) is not None)
