"""Schedules of the best degrees beyond 1F1B: published ones, and the order level."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mipipe.graphs.errors import MipipeError
from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams, piece_costs, result_of
from mipipe.planner.teams.mixing import mixed, pair_guess
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.space import Point
from mipipe.planner.teams.stages import overlap_rule, stages_on, team_problem

PAIRS = "dualpipev"
"""The published schedule of overlapped pairs that is looked for on all meshes."""
LATER = 1.03
"""By how much longer steps are guessed for every other point of the same mesh, or number of ranks, that comes
before."""
PUBLISHED = ("zb-h1", "zb-v", "dualpipev", "dualpipe")
"""Published schedules that are tried on the best pipelines beside 1F1B and interleaved 1F1B."""


def paired(pricer: Pricer, points: Sequence[Point], global_batch: int, best: float, until: float, tried: set[Degrees],
           seed: int = 0) -> Iterator[TeamResult]:
    """DualPipeV on the meshes and microbatches on which its pairs may gain most, on even stages and with some layers
    run again, up to a moment of the monotonic clock; what fits and is faster than the best, or nearly: the order level
    may make that the best. ``tried``: those that it was looked for on, which are left out."""
    for guess, degrees in pair_guesses(pricer, points, global_batch, best, until):
        if time.monotonic() > until:
            break
        if guess >= EFFORT.near * best or degrees in tried:
            continue
        tried.add(degrees)
        for made in _pairs_on(pricer, degrees, global_batch, EFFORT.near * best, seed):
            best = min(best, made.seconds)
            yield made


def _pairs_on(pricer: Pricer, degrees: Degrees, global_batch: int, best: float, seed: int) -> Iterator[TeamResult]:
    """DualPipeV on even stages where nothing runs again, and on those that the MIP finds, each better than the last."""
    costs = pricer.costs(degrees)
    held = sum(cost.resident + (degrees.ranks + 1) * cost.kept for cost in costs)
    if held <= degrees.ranks * pricer.machine.usable_bytes:
        try:
            made = evaluate_teams(pricer, degrees, global_batch, schedule=PAIRS)
        except MipipeError:
            return
        if not made.shortage and made.seconds < best:
            best = made.seconds
            yield made
    mix = mixed(pricer, degrees, global_batch, PAIRS, best, EFFORT.mixed_s, seed)
    if mix is not None:
        yield mix


def pair_guesses(pricer: Pricer, points: Sequence[Point], global_batch: int, best: float,
                 until: float = math.inf) -> list[tuple[float, Degrees]]:
    """Guesses at the steps of DualPipeV below the best, and their degrees, of the points that there is time for; one
    for each mesh and microbatch. The shortest first, but numbers of ranks take turns: the more ranks, the fewer layers
    are on each, and the more a guess leaves out."""
    found: dict[tuple[object, ...], tuple[float, Degrees]] = {}
    for point in points:
        if time.monotonic() > until:
            break
        degrees, count = point.degrees, global_batch // (point.degrees.copies * point.degrees.microbatch)
        if degrees.ranks < 2 or count < 2 * degrees.ranks or 2 * degrees.ranks > len(pricer.model.pieces) \
                or point.floor >= best:
            continue
        guess = pair_guess(pricer, degrees, global_batch)
        key = degrees.ranks, degrees.split, degrees.copies, degrees.microbatch
        if guess is not None and guess < found.get(key, (best, degrees))[0]:
            found[key] = guess, degrees
    ordered_guesses = sorted(found.values(), key=lambda item: item[0])
    before = Counter[int]()
    ranked = []
    for number, (guess, degrees) in enumerate(ordered_guesses):
        ranked.append((guess * LATER ** before[degrees.ranks], number))
        before[degrees.ranks] += 1
    return [ordered_guesses[number] for _, number in sorted(ranked)]


def ordered(pricer: Pricer, ranked: Sequence[TeamResult], global_batch: int, until: float, seed: int,
            mode: Recompute | None, tell: Callable[[str], None]) -> Iterator[TeamResult]:
    """Better schedules of the best pipelines of results in their order, searched up to a moment of the monotonic clock.
    ``mode``: of recomputation, where it is fixed."""
    results = list(ranked)
    for item in [item for item in results if item.degrees.ranks > 1][:EFFORT.published]:
        for name in PUBLISHED:
            if time.monotonic() < until:
                tell(f"{name} on {item.degrees.text()}")
                for made in _published(pricer, item, name, global_batch, mode, seed):
                    results.append(made)
                    yield made
    results.sort(key=lambda found: found.seconds)
    best = results[0]
    left = until - time.monotonic()
    by_mesh: dict[tuple[object, ...], TeamResult] = {}
    for item in results:
        if item.degrees.ranks > 1 and least_of(item) < best.seconds:
            by_mesh.setdefault((item.degrees.ranks, item.degrees.split, item.degrees.copies), item)
    pipelines = [*list(by_mesh.values())[:1], *sorted(list(by_mesh.values())[1:], key=least_of)]
    pipelines = pipelines[:min(EFFORT.ordered, max(1, int(left // 2.0)))]
    for number, item in enumerate(pipelines):
        share = left / (len(pipelines) - number)
        if share < 2.0:
            break
        start = time.monotonic()
        tell(f"ordering {item.degrees.text()}")
        better = order_of(pricer, item, global_batch, share, seed)
        left -= time.monotonic() - start
        if better is not None and better.seconds < item.seconds:
            yield better


def least_of(item: TeamResult) -> float:
    """Seconds of a result without its waits, if overlapped pairs hid all that they can."""
    rule, times = overlap_rule(item.stages), item.times
    busy = item.seconds - times.bubble - times.pipeline - times.optimizer
    return busy * rule.numerator / rule.denominator + times.optimizer


def _published(pricer: Pricer, item: TeamResult, name: str, global_batch: int, mode: Recompute | None,
               seed: int) -> list[TeamResult]:
    """A result's degrees under a published schedule, with its stages where that has as many, with even ones, and with
    some layers run again; those that fit and are faster."""
    degrees = replace(item.degrees, chunks=1)
    same = item.layers if item.degrees.chunks == 1 else None
    for layers, again in ((same, item.recompute), (None, ())) if same is not None else ((None, ()),):
        try:
            made = evaluate_teams(pricer, degrees if again else replace(degrees, recompute=mode or "none"),
                                  global_batch, layers=layers, schedule=name, recompute=again)
        except MipipeError:
            continue
        if not made.shortage:
            return [made] if made.seconds < item.seconds else []
    mix = None if mode is not None else mixed(pricer, degrees, global_batch, name, item.seconds, EFFORT.mixed_s, seed)
    return [] if mix is None else [mix]


def order_of(pricer: Pricer, item: TeamResult, global_batch: int, seconds: float, seed: int) -> TeamResult | None:
    """The order level on the stages of a result, weight gradients on their own; None where it has no plan."""
    degrees = item.degrees
    costs = piece_costs(pricer, degrees, item.recompute)
    pieces = [stage.pieces for stage in item.stages]  # layers alone do not say where what is between them goes
    # the solve chooses the ranks: where both ends of a tied table come to one, its second copy and sum are too much
    stages = stages_on(costs, pieces, [(number % degrees.ranks,) for number in range(len(pieces))],
                       pricer.tied(degrees), pricer.machine, split=True)
    count = item.plan.problem.num_microbatches
    problem = team_problem(pricer.model, degrees, pricer.machine, stages, count)
    solved = plan(problem, PlanOptions(time_limit_s=seconds, seed=seed, recompute=False))
    if solved.plan is None:
        return None
    instant = round(1e9 * (item.seconds - item.times.pipeline))
    name = f"planned order ({solved.plan.placement.name})"
    return result_of(pricer, degrees, global_batch, solved.plan, stages, name, item.layers, instant, item.recompute)
