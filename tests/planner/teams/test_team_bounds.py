"""Bounds of degrees against plans: none is above a plan, whatever its schedule, cut, recomputation and memory."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from team_brute import variants
from team_machine import machine

from mipipe.graphs.errors import MipipeError
from mipipe.graphs.sharding.modes import with_modes
from mipipe.planner.teams import space
from mipipe.planner.teams.bounds.of_degrees import bound_of, packed
from mipipe.planner.teams.bounds.windows import path_times, windows_of
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams
from mipipe.planner.teams.orders import order_of
from mipipe.planner.teams.prices.degrees import RECOMPUTE, Degrees, Recompute
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.piece_cost import PhaseCost, PieceCost
from mipipe.planner.teams.prices.pieces import ModelPieces, model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.space import DegreeSpace, all_degrees, floor_of, least_seconds, roughly_fits
from mipipe.planner.teams.waves import shapes_of, wave

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipe", "dualpipev")
MESHES = [Degrees(ranks=2, copies=4), Degrees(ranks=2, copies=4, zero=3), Degrees(ranks=4, copies=2),
          Degrees(ranks=2, tensor=4, sequence=True), Degrees(ranks=4, tensor=2), Degrees(ranks=4, context=2),
          Degrees(ranks=2, tensor=2, sequence=True, copies=2, zero=2), Degrees(ranks=3), Degrees(copies=8),
          Degrees(tensor=8)]
BATCH = 24
LEAST = 0.3


class Heavy(Pricer):
    """The small model with other costs: little that stays, much that a microbatch keeps, and random seconds and bytes
    of every kind of piece."""

    def __init__(self, model: ModelPieces, own: Machine, seed: int) -> None:
        super().__init__(model, own)
        self.seed = seed

    def on(self, own: Machine, measured: object = None) -> Heavy:
        return Heavy(self.model, own, self.seed)

    def costs(self, degrees: Degrees) -> list[PieceCost]:
        source = random.Random(self.seed)
        factors = [[source.choice((LEAST, 1.0, 3.0)) for _ in range(6)] for _ in self.model.kinds]
        return [_scaled(cost, *factors[piece.kind])
                for piece, cost in zip(self.model.pieces, super().costs(degrees), strict=True)]


def _scaled(cost: PieceCost, f: float, i: float, w: float, kept: float, read: float, late: float) -> PieceCost:
    def phase(own: PhaseCost | None, factor: float) -> PhaseCost | None:
        return None if own is None else PhaseCost(own.compute * factor, {axis: seconds * factor for axis, seconds
                                                                          in own.talk.items()})

    forward = phase(cost.f, f)
    assert forward is not None
    whole = cost.again or cost.kept
    saved = {"again" if cost.again else "kept": round(200 * kept * whole)}
    again = replace(cost, kept=cost.kept * 20) if cost.again else cost
    return replace(again, f=forward, i=phase(cost.i, i), w=phase(cost.w, w), **saved,
                   until_w=round(min(200 * kept * whole, 200 * min(kept, read) * cost.until_w)),
                   late=round(60 * late * cost.late), weights=cost.weights // 50, gradients=0, state=0, buffers=0,
                   workspace=0, gathered=0, forward_space=round(20 * read * whole))


def check(pricer: Pricer, result: TeamResult) -> None:
    """The bounds on devices with just the memory that a plan takes are not above its step."""
    most = max(item.peak for item in result.memory)
    kind = pricer.machine.kind
    just = pricer.on(replace(pricer.machine, memory_bytes=most + most // 10**5 + 1, kind=kind))
    degrees = replace(result.degrees, chunks=1, recompute="none")
    bound = bound_of(just, degrees, result.global_batch, None)
    assert bound is not None, "the plan fits, the bound says that none does"
    plain, floor, stays = bound
    where = f"{result.schedule} on {degrees.text()}, layers {result.layers}, {result.recompute}"
    paired = result.plan.schedule.has_pairs
    assert result.seconds >= (floor if paired else plain), f"{where}: {result.seconds} is below {bound}"
    if all(len(stage.ranks) == 1 for stage in result.plan.placement.stages):
        whole = packed(just, degrees, result.global_batch, None, stays)
        assert result.seconds >= whole[paired], f"{where}: {result.seconds} is below {whole} with layers whole"


def drawn(pricer: Pricer, source: random.Random) -> TeamResult | None:
    """A random configuration of the small model; None where the schedule does not exist for it."""
    degrees = replace(source.choice(MESHES), microbatch=source.choice((1, 1, 2)))
    batch = source.choice((2, 4, 6, 8)) * degrees.copies * degrees.microbatch
    schedule = source.choice(SCHEDULES)
    if schedule == "interleaved":
        degrees = replace(degrees, chunks=2 if degrees.ranks < 4 else 1)
    ways = pricer.model.recompute
    recompute = [source.choice(ways) if piece.layer is not None else "none" for piece in pricer.model.pieces]
    recompute = source.choice([(), recompute])
    count = len(pricer.model.layers)
    try:
        return evaluate_teams(pricer, degrees, batch, schedule=schedule, recompute=recompute, layers=source.choice(
            [None, _cut(count, 2 * degrees.ranks, source), _cut(count, degrees.ranks, source)]))
    except MipipeError:
        return None


def _cut(layers: int, stages: int, source: random.Random) -> list[int]:
    """Layers of stages, at least one in those between the ends."""
    ends = sorted(source.choices(range(layers + 1), k=stages - 1))
    return [after - before for before, after in zip([0, *ends], [*ends, layers], strict=True)]


@pytest.mark.parametrize("model, seed, draws", [
    ("pieces", 0, 50), pytest.param("latent_pieces", 0, 50, marks=pytest.mark.slow),
    *(pytest.param(model, seed, 200, marks=pytest.mark.slow) for model in ("pieces", "latent_pieces")
      for seed in range(1, 9))])
def test_no_bound_is_above_a_plan(request, model, seed, draws):
    """Random configurations, each on devices that have just the memory that it takes."""
    pieces = request.getfixturevalue(model)
    for pricer in (Pricer(pieces, machine(10**12)), Heavy(pieces, machine(10**12), seed)):
        source = random.Random(seed)
        found = [made for _ in range(draws) if (made := drawn(pricer, source)) is not None]
        assert len(found) > draws // 5 and len({item.schedule for item in found}) > 5
        for result in found:
            check(pricer, result)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", MESHES[:-3])
def test_no_bound_is_above_a_planned_order(pieces, degrees):
    """Lists on Vs, Ws and chains, and the order level, in all memory and in 1.3 and 1.1 times the least of 1F1B."""
    pricer = Pricer(pieces, machine(10**12))
    least = min(max(item.peak for item in evaluate_teams(pricer, replace(degrees, recompute=mode), BATCH).memory)
                for mode in pieces.recompute)
    for memory in (10**12, round(1.3 * least), round(1.1 * least)):
        tight = pricer.on(replace(pricer.machine, memory_bytes=memory))
        for mode in pieces.recompute:
            again = [mode if piece.layer is not None else "none" for piece in pieces.pieces]
            for shape in shapes_of(len(pieces.pieces), degrees.ranks):
                made = wave(tight, degrees, BATCH, shape, again, 0.2)
                if made is not None and not made.shortage:
                    check(pricer, made)
        start = evaluate_teams(tight, degrees, BATCH)
        better = order_of(tight, start, BATCH, 2.0, 0)
        if better is not None and not better.shortage:
            check(pricer, better)


@pytest.mark.parametrize("seed", [None, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6))])
def test_floors_of_axes_are_below_all_of_their_combinations(pieces, seed, monkeypatch):
    """With one microbatch and with the largest alone; so what is priced only as far as it may be faster says the same
    bound as pricing all."""
    if seed is not None:  # these costs are random multiples of what the profiles say
        monkeypatch.setattr(space, "least_seconds", lambda pricer: LEAST * least_seconds(pricer))
    memory = 60 * 10**6 if seed is None else 4 * 10**9
    own = machine(memory, host=4, outside=3 * 10**8, hidden=0.3, expert_ns=10**5)
    compare_floors(Pricer(pieces, own) if seed is None else Heavy(pieces, own, seed), by_floors=seed is not None)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, *RECOMPUTE])
def test_floors_of_traced_modes(llama, recompute):
    """Traced modes beside estimated ones, of which one may take less than the other; and a recomputation that is
    given."""
    traced = model_pieces(with_modes(llama, ("tensor", "sequence"), (2, 4)))
    compare_floors(Pricer(traced, machine(60 * 10**6, host=4, outside=3 * 10**8)), recompute, by_floors=True)


@pytest.mark.slow
def test_floors_where_latents_may_be_made_again(latent_pieces):
    compare_floors(Pricer(latent_pieces, machine(40 * 10**6, host=4, outside=3 * 10**8)), by_floors=True)


def compare_floors(pricer: Pricer, recompute: Recompute | None = None, *, by_floors: bool) -> None:
    """Of eight devices and 16 sequences."""
    pieces = pricer.model
    found = []
    for base in all_degrees(pieces, 8, 16, {}):
        sizes = [item.microbatch for item in next(iter(variants(base, 16, {})))]
        floor, plain = floor_of(pricer, replace(base, microbatch=sizes[-1]), 16, recompute)
        for line in variants(base, 16, {}):
            for degrees in line:
                least = floor_of(pricer, degrees, 16, recompute)
                assert floor <= least[0] and plain <= least[1], degrees.text()
                made = bound_of(pricer, degrees, 16, recompute) if roughly_fits(pricer, degrees) else None
                if made is not None:
                    found.append(made)
                    assert least[0] <= made[1] and least[1] <= made[0], degrees.text()
    least, plain = (min(made[number] for made in found) for number in (1, 0))
    known = DegreeSpace(pricer, 8, 16, {}, None, recompute)
    assert not known.more(lambda: False) and known.left()[0] <= least
    few = known.more(lambda: True, 1.1 * least, by_floors=by_floors)
    assert 0 < len(few) < len(found) and min(point.floor for point in few) == least
    assert known.left()[0] >= 1.1 * least and min(known.left()[1], *(point.bound for point in few)) <= plain
    known.more(lambda: True)
    assert len(known.points) == len(found) and known.left() == (float("inf"), float("inf"))
    whole = DegreeSpace(pricer, 8, 16, {}, None, recompute)
    assert {*whole.all()} == {*known.points}
    assert [point.bound for point in whole.points] == [point.bound for point in known.points]

    def some(degrees: Degrees) -> bool:
        return degrees.microbatch not in (2, 4) if degrees.zero == 3 else degrees.microbatch == 4

    part = DegreeSpace(pricer, 8, 16, {}, None, recompute, some)
    part.more(lambda: True)
    assert {*part.points} == {point for point in known.points if some(point.degrees)} and part.points
    assert part.combinations < known.combinations


def test_windows_have_the_memory_that_their_actions_leave(pieces):
    """The first what the least forward leaves, the last what the least backward does, by the prices of both."""
    costs, memory, more = Pricer(pieces, machine()).costs(Degrees(zero=3, copies=2)), 10**8, 10**6
    paths = path_times(pieces, [cost.f.total for cost in costs], [cost.i.total if cost.i else 0.0 for cost in costs])

    def spared(ahead: int, back: int) -> np.ndarray:
        own = {id(cost): replace(cost, forward_space=cost.forward_space + ahead, buffers=cost.buffers + back)
               for cost in costs}
        return windows_of(pieces, {"none": [own[id(cost)] for cost in costs]}, paths, 2, 8, memory).spared

    first, last = ((spared(0, 0) - spared(*size)) / more for size in ((more, 0), (0, more)))
    assert (first >= 0).all() and (last >= 0).all() and first.any() and last.any()
    least = min(cost.forward_space for cost in costs), min(replace(cost, late=0).while_running for cost in costs)
    assert spared(0, 0) == pytest.approx(first * (memory - least[0]) + last * (memory - least[1]))


def test_few_microbatches_in_flight_wait(pieces):
    """Where a rank's memory holds one microbatch, forwards wait for the first backward: the bound says so."""
    degrees = Degrees(ranks=4, copies=2)
    pricer = Pricer(pieces, machine(10**12))
    loose = bound_of(pricer, degrees, 8, "none")
    costs = pricer.costs(degrees)
    held = sum(cost.resident + cost.kept for cost in costs) + 4 * max(cost.while_running for cost in costs)
    tight = bound_of(pricer.on(replace(pricer.machine, memory_bytes=round(1.1 * held / 4))), degrees, 8, "none")
    assert loose is not None and tight is not None and tight[0] > 1.1 * loose[0]
