"""Schedules of the best degrees beyond 1F1B: published ones, and the order level."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mipipe.graphs.errors import MipipeError
from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan
from mipipe.planner.teams.bounds import seconds_in_kernels
from mipipe.planner.teams.degrees import Degrees
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams, piece_costs, result_of
from mipipe.planner.teams.pricing import Pricer
from mipipe.planner.teams.space import Point
from mipipe.planner.teams.stages import cut_pieces, overlap_rule, stage_cost, team_problem

PUBLISHED = ("zb-h1", "zb-v", "dualpipev", "dualpipe")
"""Published schedules that are tried on the best pipelines beside 1F1B and interleaved 1F1B."""


def paired(pricer: Pricer, points: Sequence[Point], global_batch: int, best: float,
           until: float) -> list[TeamResult]:
    """DualPipeV on the meshes and microbatches on which its pairs may gain most, with the least recomputation of all
    layers that its memory asks for, up to a moment of the monotonic clock; what fits and is faster than the best."""
    found: list[TeamResult] = []
    for guess, degrees in pair_guesses(pricer, points, global_batch, best, until)[:EFFORT.dualpipev]:
        if time.monotonic() > until or guess >= best:
            break
        try:
            made = evaluate_teams(pricer, degrees, global_batch, schedule="dualpipev")
        except MipipeError:
            continue
        if not made.shortage and made.seconds < best:
            best = made.seconds
            found.append(made)
    return found


def pair_guesses(pricer: Pricer, points: Sequence[Point], global_batch: int, best: float,
                 until: float = math.inf) -> list[tuple[float, Degrees]]:
    """Guesses at the steps of DualPipeV below the best, the shortest first, and their degrees; one for each mesh and
    microbatch, of the points that there is time for. It holds a microbatch more than there are ranks, of which about as
    many have no pair, and its bubble is (R - 1) (FB + B - 3W) of its half stages (DeepSeek-AI, 2025)."""
    found: dict[tuple[object, ...], tuple[float, Degrees]] = {}
    for point in points:
        if time.monotonic() > until:
            break
        degrees, count = point.degrees, global_batch // (point.degrees.copies * point.degrees.microbatch)
        if degrees.ranks < 2 or count < 2 * degrees.ranks or 2 * degrees.ranks > len(pricer.model.pieces) \
                or point.floor >= best:
            continue
        for mode in pricer.model.recompute:
            made = replace(degrees, recompute=mode)
            costs = pricer.costs(made)
            kernels = sum(seconds_in_kernels(cost) for cost in costs)
            talk = sum(cost.f.total + cost.backward for cost in costs) - kernels
            alone = min(count, degrees.ranks)
            guess = ((count - alone) * max(kernels, talk) + alone * (kernels + talk)
                     + sum(cost.optimizer for cost in costs)) / degrees.ranks
            guess += (degrees.ranks - 1) / degrees.ranks * EFFORT.dualpipev_bubble * (kernels + talk)
            held = sum(cost.resident + (degrees.ranks + 1) * cost.kept for cost in costs) / degrees.ranks
            if held + max(cost.while_running for cost in costs) > pricer.machine.usable_bytes:
                continue
            key = degrees.ranks, degrees.split, degrees.copies, degrees.microbatch
            if guess < found.get(key, (best, made))[0]:
                found[key] = guess, made
            break
    return sorted(found.values(), key=lambda item: item[0])


def ordered(pricer: Pricer, results: list[TeamResult], global_batch: int, until: float, seed: int,
            tell: Callable[[str], None]) -> list[TeamResult]:
    """The results with the best pipelines' schedules searched up to a moment of the monotonic clock."""
    for item in [item for item in results if item.degrees.ranks > 1][:EFFORT.published]:
        for name in PUBLISHED:
            if time.monotonic() < until:
                tell(f"{name} on {item.degrees.text()}")
                results += _published(pricer, item, name, global_batch)
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
            results.append(better)
    return sorted(results, key=lambda found: found.seconds)


def least_of(item: TeamResult) -> float:
    """Seconds of a result without its waits, if overlapped pairs hid all that they can."""
    rule, times = overlap_rule(item.stages), item.times
    busy = item.seconds - times.bubble - times.pipeline - times.optimizer
    return busy * rule.numerator / rule.denominator + times.optimizer


def _published(pricer: Pricer, item: TeamResult, name: str, global_batch: int) -> list[TeamResult]:
    """A result's degrees under a published schedule, with its stages where that has as many, with even ones, and with
    all layers run again; those that fit and are faster."""
    degrees = replace(item.degrees, chunks=1)
    same = item.layers if item.degrees.chunks == 1 else None
    for layers, mode in ((same, None), *((None, way) for way in pricer.model.recompute)):
        if mode is None and same is None:
            continue
        try:
            if mode is None:
                made = evaluate_teams(pricer, degrees, global_batch, layers=layers, schedule=name,
                                      recompute=item.recompute)
            else:
                made = evaluate_teams(pricer, replace(degrees, recompute=mode), global_batch, schedule=name)
        except MipipeError:
            continue
        if not made.shortage:
            return [made] if made.seconds < item.seconds else []
    return []


def order_of(pricer: Pricer, item: TeamResult, global_batch: int, seconds: float, seed: int) -> TeamResult | None:
    """The order level on the stages of a result, weight gradients on their own; None where it has no plan."""
    degrees = item.degrees
    costs = piece_costs(pricer, degrees, item.recompute)
    pieces = cut_pieces(pricer.model, item.layers)
    stages = [stage_cost(costs, members, pricer.machine, split=True, first_chunk=number < degrees.ranks)
              for number, members in enumerate(pieces)]
    count = item.plan.problem.num_microbatches
    problem = team_problem(pricer.model, degrees, pricer.machine, stages, count)
    solved = plan(problem, PlanOptions(time_limit_s=seconds, seed=seed, recompute=False))
    if solved.plan is None:
        return None
    instant = round(1e9 * (item.seconds - item.times.pipeline))
    name = f"planned order ({solved.plan.placement.name})"
    return result_of(pricer, degrees, global_batch, solved.plan, stages, name, item.layers, instant, item.recompute)
