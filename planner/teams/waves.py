"""Orders on stages of teams that lie in Vs and chains: weight gradients apart, list rules tuned for the rank's memory.

1F1B and interleaved 1F1B keep what their warm-up holds and wait where a rank's memory has room; these orders fill
waits with weight gradients and take as many microbatches as memory has room for. Every piece is on one rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mipipe.graphs.errors import PlanError, ProblemError
from mipipe.planner.jobs.arrays import build, with_mirrors
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.candidate import judge
from mipipe.planner.placements.cuts import Shape, fit_cuts, place
from mipipe.planner.plan import Plan
from mipipe.planner.search import lists, quotas
from mipipe.planner.search.orders import Orders
from mipipe.planner.teams.bounds.of_degrees import packed
from mipipe.planner.teams.bounds.packing import least_busiest
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult, piece_costs, result_of
from mipipe.planner.teams.masters import SQUEEZES
from mipipe.planner.teams.mixing import rank_mix, wave_stages
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.space import Point
from mipipe.planner.teams.stages import cut_pieces, stage_cost, stages_on, team_problem

ALIVE = 0.7
"""Of the microbatches that 1F1B has under way on its first rank, those that these orders need at least to wait little:
half and some for ends and stages that are not even."""

def promising(pricer: Pricer, points: Sequence[Point], global_batch: int) -> list[tuple[float, Degrees]]:
    """Seconds of the busiest rank and degrees of pipelines whose memory holds as many microbatches as orders here need,
    the shortest first, one for each mesh; then those of which some layers must run again, likewise: uneven stages make
    orders wait."""
    found: dict[tuple[object, ...], tuple[bool, float, Degrees]] = {}
    for point in [point for point in points if point.degrees.ranks > 1][:EFFORT.listed]:
        degrees = point.degrees
        again = not _fits_whole(pricer, degrees)
        if not again:
            ends = packed(pricer, degrees, global_batch, "none")[0]
        else:
            mix = rank_mix(pricer, degrees, [ALIVE * degrees.ranks])
            if mix is None:
                continue
            ends = least_busiest(mix.seconds, mix.counts, degrees.ranks) * (
                global_batch // (degrees.copies * degrees.microbatch))
        mesh = degrees.ranks, degrees.split, degrees.copies
        if mesh not in found or (again, ends) < found[mesh][:2]:
            found[mesh] = again, ends, degrees
    return [(ends, degrees) for _, ends, degrees in sorted(found.values(), key=lambda item: item[:2])]


def _fits_whole(pricer: Pricer, degrees: Degrees) -> bool:
    """Whether nothing needs to run again."""
    costs = pricer.costs(degrees)
    work = max(max(cost.gathered + cost.buffers, cost.forward_space) for cost in costs)
    held = sum(cost.resident + ALIVE * degrees.ranks * cost.kept for cost in costs)
    return held / degrees.ranks + work <= pricer.machine.usable_bytes


def listed(pricer: Pricer, degrees: Degrees, global_batch: int, shape: Shape, seed: int = 0) -> TeamResult | None:
    """The best list order on stages of a shape, some layers run again where memory asks for it; None where none
    fits."""
    layers: Sequence[int] = ()
    recompute: Sequence[Recompute] = ["none"] * len(pricer.model.pieces)
    if not _fits_whole(pricer, degrees):
        made = wave_stages(pricer, degrees, global_batch, shape, ALIVE, EFFORT.mixed_s, seed)
        if made is None:
            return None
        layers, recompute = made
    return wave(pricer, degrees, global_batch, shape, recompute, EFFORT.tuned_s, seed, layers)


def shapes_of(pieces: int, ranks: int) -> Iterator[Shape]:
    """A W, a V, and passes in one direction, as far as there are pieces."""
    for chunks, turns in ((4, True), (2, True), (2, False), (4, False)):
        if chunks * ranks <= pieces:
            yield wave_shape(ranks, chunks, turns=turns)


def wave_shape(ranks: int, chunks: int, *, turns: bool) -> Shape:
    """``chunks`` stages on every rank; ``turns``: every other pass over the ranks goes back (a V, a W)."""
    passes = [range(ranks) if not turns or number % 2 == 0 else range(ranks - 1, -1, -1) for number in range(chunks)]
    return Shape("v" if turns and chunks == 2 else "wave" if turns else "interleaved" if chunks > 1 else "chain",
                 tuple(rank for way in passes for rank in way))


def wave(pricer: Pricer, degrees: Degrees, global_batch: int, shape: Shape, recompute: Sequence[Recompute],
         seconds: float, seed: int = 0, layers: Sequence[int] = ()) -> TeamResult | None:
    """The best list order found on a shape's stages; None where no order fits the memory or a stage would be empty.

    ``recompute``: of every piece of the model; ``seconds``: in which quotas are tuned; ``layers``: of every stage,
    where they are known.
    """
    model, machine = pricer.model, pricer.machine
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    costs = piece_costs(pricer, degrees, recompute)
    try:
        if layers:
            parts = [list(part) for part in cut_pieces(model, layers)]
        else:
            alone = [stage_cost(costs, (piece,), machine, split=True) for piece in range(len(costs))]
            parts = fit_cuts(team_problem(model, degrees, machine, alone, microbatches), shape)
        if not all(parts):
            return None
        stages = stages_on(costs, parts, [(rank,) for rank in shape.rank_of], pricer.tied(degrees), machine, split=True)
        problem = team_problem(model, degrees, machine, stages, microbatches)
        whole = view(problem, place(problem, shape, [[stage] for stage in range(len(stages))]))
        instance = build(whole)
    except (PlanError, ProblemError):
        return None
    for _ in range(SQUEEZES):
        lines = quotas.lines_of(instance)
        tuned = [lists.best_of(instance, EFFORT.rules, np.random.default_rng(seed)),
                 None if lines is None else quotas.tune(instance, lines, seconds, seed)]
        orders: list[Orders] = [item.orders for item in tuned if item is not None]
        if not orders:
            return None
        best = min(orders, key=lambda item: item.makespan_ns)
        judged = judge(whole, with_mirrors(instance, best.lists()))
        if judged.fits:
            break
        instance.cap[:] -= np.array(judged.excess_bytes, dtype=instance.cap.dtype)
    else:
        return None
    own = tuple(sum(model.pieces[piece].layer is not None for piece in part) for part in parts)
    plan = Plan(problem.name, problem, whole.placement, judged.schedule, judged.makespan_ns)
    return result_of(pricer, dataclasses.replace(degrees, chunks=len(shape.rank_of) // degrees.ranks), global_batch,
                     plan, stages, f"planned order ({shape.name})", own, judged.makespan_ns, tuple(recompute))
