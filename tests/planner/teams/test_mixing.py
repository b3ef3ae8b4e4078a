"""Stages of published schedules of which some layers run again: against every choice, and never worse than one mode."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from team_brute import compositions
from team_machine import machine

from mipipe.planner.check import check_plan
from mipipe.planner.milp.placement.degrees import StageCounts
from mipipe.planner.milp.placement.mixed import MixCost, MixTask, mixed_counts
from mipipe.planner.schedules.dualpipe import dualpipe, dualpipe_v
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.holding import orders_of
from mipipe.planner.teams.mixing import mean_mix, mixed, pair_guess, wave_stages
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.waves import ALIVE, listed, wave, wave_shape


def random_task(seed: int, layers: int, ranks: int, memory: float) -> MixTask:
    """A chain of equal layers and a head; running a layer again frees most of what it keeps. ``memory``: in shares of
    what half of its layers on every rank keep."""
    rng = np.random.default_rng(seed)
    f, b = (float(size) for size in rng.uniform(1.0, 3.0, size=2))
    kept = int(rng.integers(20, 40))
    ahead = int(rng.integers(1, 9))
    whole = MixCost(f, b, b, 0.0, 10, 0, kept, 0, 5, ahead)
    again = replace(whole, backward=b + f, path=b + f, fw=int(rng.integers(1, 6)), workspace=kept,
                    forward_workspace=ahead + int(rng.integers(0, kept)))
    head = MixCost(0.7 * f, b, b, 0.0, 20, 0, 2, 0, 8, 9)
    room = round(memory * (2 * ranks + 1) / 2 * kept * layers / ranks)
    orders = orders_of(dualpipe_v(ranks, 2 * ranks + 1))
    return MixTask(((layers, (whole, again)), (1, (head, head))), 2 * ranks, orders, (room,) * ranks, 0.8)


def needed(task: MixTask, counts: StageCounts, rank: int) -> int:
    """Bytes of a rank at its fullest moment, written down apart from the MIP."""
    order, costs = task.orders[rank], [cost for _, cost in task.runs]

    def total(stage: int, name: str) -> int:
        return sum(size * getattr(costs[run][mode], name) for run, modes in enumerate(counts.counts[stage])
                   for mode, size in enumerate(modes))

    def largest(stage: int, name: str) -> int:
        return max(getattr(costs[run][mode], name) for run, modes in enumerate(counts.counts[stage])
                   for mode, size in enumerate(modes) if size)

    own = [stage for stage, _, _ in order.forwards]
    alone = [largest(stage, name) for stage in own for name in ("workspace", "forward_workspace")]
    pairs = [largest(one, "forward_workspace") + largest(other, "workspace") for one in own for other in own
             if one != other]
    return max(alone + pairs) + max(sum(
        total(stage, "resident") + fi * total(stage, "fi") + fw * total(stage, "fw") + iw * total(stage, "iw")
        for stage, fi, fw, iw in moment) for moment in order.held)


@pytest.mark.parametrize("seed", range(6))
def test_some_layers_again_fit_and_are_never_slower_than_one_mode_for_all(seed):
    """Less memory takes more time; what is chosen fits; where one mode for all fits it is no faster."""
    ranks, steps = 2 + seed % 2, []
    for memory in (3.0, 1.2, 0.9, 0.7, 0.5):
        task = random_task(seed, 8, ranks, memory)
        found = mixed_counts(task, time_limit_s=10, gap=1e-6)
        if found is None:
            steps.append(float("inf"))
        else:
            assert all(needed(task, found, rank) <= task.memory[rank] for rank in range(ranks))
            steps.append(found.seconds)
        for mode in (0, 1):
            layers, head = task.runs
            one = mixed_counts(replace(task, runs=((layers[0], (layers[1][mode],)), head)), time_limit_s=10, gap=1e-6)
            assert one is None or one.seconds >= steps[-1] * (1 - 2e-3)
    assert steps[0] < steps[-1] and all(low <= high * (1 + 2e-3) for low, high in pairwise(steps))


@pytest.mark.parametrize("seed", range(4))
def test_counts_equal_those_of_trying_all(seed):
    """Four layers in a V of four stages: every cut, and every number of layers in each that runs again."""
    task = random_task(seed, 4, 2, 0.75)
    plain = replace(task, memory=(10**6,) * 2)
    best = float("inf")
    for cut in compositions(4, 4):
        for again in product(*(range(size + 1) for size in cut)):
            counts = tuple(((size - more, more), (int(stage == 3), 0))
                           for stage, (size, more) in enumerate(zip(cut, again, strict=True)))
            if all(sum(map(sum, stage)) in range(1, 4) for stage in counts) and all(
                    needed(task, StageCounts(counts, 0.0, None), rank) <= task.memory[rank] for rank in range(2)):
                best = min(best, seconds_of_counts(plain, counts))
    found = mixed_counts(task, time_limit_s=10, gap=1e-6)
    assert (found is None) == (best == float("inf"))
    assert found is None or found.seconds == pytest.approx(best, rel=2e-3)


def seconds_of_counts(task: MixTask, counts: tuple[tuple[tuple[int, ...], ...], ...]) -> float:
    """The MIP's step of given stages, by its inequalities."""
    costs = [cost for _, cost in task.runs]
    f, b = ([sum(size * getattr(costs[run][mode], name) for run, modes in enumerate(stage)
                 for mode, size in enumerate(modes)) for stage in counts] for name in ("forward", "backward"))
    found = []
    for order in task.orders:
        busy = sum((alone + task.share * pairs) * seconds[stage] for seconds, own in ((f, order.forwards),
                                                                                     (b, order.backwards))
                   for stage, alone, pairs in own)
        start = max(sum(f[:order.front]), sum(f) + sum(b[order.turn + 1:])
                    - sum(count * f[stage] for stage, count in order.ahead))
        end = max(0.0, sum(f[order.last + 1:]) + sum(b[order.back:])
                  - sum(count * b[stage] for stage, count in order.behind))
        found.append(start + busy + end + sum(b[:order.back]))
    return max(found)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_what_dualpipe_holds(ranks):
    """A microbatch of all its stages more than there are ranks, of stage s at most 2 R - s; every microbatch once."""
    count = 2 * ranks + 3
    for rank, order in enumerate(orders_of(dualpipe_v(ranks, count))):
        assert max(sum(fw for _, _, fw, _ in moment) for moment in order.held) == 2 * ranks + 1
        most = {stage: max({one: fw for one, _, fw, _ in moment}[stage] for moment in order.held)
                for stage in (rank, 2 * ranks - 1 - rank)}
        assert all(held <= 2 * ranks - stage for stage, held in most.items())
        assert all(alone + pairs == count for own in (order.forwards, order.backwards) for _, alone, pairs in own)
    both = orders_of(dualpipe(4, 8))
    assert all(sum(alone + pairs for _, alone, pairs in order.forwards) == 8 for order in both)


def test_a_mean_mix_is_within_its_room(pieces):
    """More room never takes more time; no room is no mix; ample room is the least time."""
    costs = [Pricer(pieces, machine()).costs(Degrees(recompute=mode)) for mode in pieces.recompute]
    every = sum(cost.kept for cost in costs[0])
    found = [mean_mix(costs, share * every * 5, [8.0, 2.0]) for share in (1.0, 0.8, 0.6, 0.4)]
    steps = [mix.forward + mix.backward for mix in found if mix is not None]
    assert len(steps) == 4 and steps == sorted(steps) and steps[0] < steps[-1]
    assert steps[0] == pytest.approx(sum(cost.f.total + cost.backward for cost in costs[0]))
    assert mean_mix(costs, 0.0, [8.0, 2.0]) is None


@pytest.mark.parametrize("degrees", [Degrees(ranks=2, copies=4), Degrees(ranks=2, tensor=2, copies=2)])
def test_pairs_on_mixed_stages_fit_and_beat_one_mode_for_all(pieces, degrees):
    """Between what a device needs with all layers run again and with none: simulated, within the memory."""
    usual = Pricer(pieces, machine())
    ends = [max(item.peak for item in evaluate_teams(usual, replace(degrees, recompute=mode), 32,
                                                     schedule="dualpipev").memory) for mode in ("full", "none")]
    pricer = Pricer(pieces, machine(round(0.6 * ends[0] + 0.4 * ends[1])))
    one = [made for mode in pieces.recompute for made in [evaluate_teams(pricer, replace(degrees, recompute=mode), 32,
                                                                  schedule="dualpipev")] if not made.shortage]
    found = mixed(pricer, degrees, 32, "dualpipev", float("inf"), 10.0)
    assert found is not None and not found.shortage and "none" in found.recompute
    assert one and all(made.degrees.recompute != "none" for made in one)
    assert found.seconds <= min(made.seconds for made in one)
    guess = pair_guess(pricer, degrees, 32)
    assert guess is not None and guess == pytest.approx(found.seconds, rel=0.25)
    assert mixed(pricer, degrees, 32, "dualpipev", 0.5 * found.seconds, 10.0) is None
    assert mixed(pricer, replace(degrees, microbatch=8), 32, "dualpipev", float("inf"), 10.0) is None  # too few


def test_lists_on_mixed_stages_fit(pieces):
    """Little more memory than 1F1B needs, where inputs stay for weight gradients: some layers run again."""
    degrees, shape = Degrees(ranks=2, tensor=2, copies=2), wave_shape(2, 2, turns=True)
    usual = evaluate_teams(Pricer(pieces, machine()), degrees, 32)
    pricer = Pricer(pieces, machine(round(1.2 * max(item.peak for item in usual.memory))))
    made = wave_stages(pricer, degrees, 32, shape, ALIVE, 10.0)
    assert made is not None and sum(made[0]) == 6 and len(made[1]) == len(pieces.pieces) and set(made[1]) > {"none"}
    found = wave(pricer, degrees, 32, shape, made[1], 0.05, layers=made[0])
    assert found is not None and not found.shortage and list(found.layers) == made[0]
    check_plan(found.plan)
    small = Pricer(pieces, machine(round(0.5 * max(item.peak for item in usual.memory))))
    assert wave_stages(small, degrees, 32, shape, ALIVE, 10.0) is None and listed(small, degrees, 32, shape) is None
