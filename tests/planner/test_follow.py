"""Orders from moments: the pattern that all ranks share, squeezed; short steps whose middle is repeated."""

from __future__ import annotations

import numpy as np
import pytest

from mipipe.planner.bounds.at_placement import Bound, placement_bound
from mipipe.planner.jobs.arrays import Instance, build, mirror, with_mirrors
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.ladder.admission import enter
from mipipe.planner.ladder.candidate import candidate, judge
from mipipe.planner.ladder.repeating import Repeating, short_instance
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.periodic import legs, staircase
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.search import best_list as lists
from mipipe.planner.search.follow import followed, moments_at, squeezed
from mipipe.planner.search.orders import Orders
from mipipe.planner.search.repeat import stretched


def placed(problem: PlanningProblem, name: str) -> tuple[StageView, Instance]:
    stages = view(problem, next(iter(propose_shapes(problem, name))))
    return stages, build(stages, halve=mirror(stages) is not None)


def judged(instance: Instance, orders: Orders) -> int:
    """The makespan by the shared rules, which is the kernel's; the memory fits."""
    found = judge(instance.view, with_mirrors(instance, orders.lists()))
    assert found.fits and found.makespan_ns == orders.makespan_ns
    return found.makespan_ns


def paced(stages: StageView, instance: Instance) -> tuple[Orders, float]:
    stairs = legs.staircase_of(stages)
    assert stairs is not None
    mirrored = mirror(stages) is not None and len({leg.route for leg in stairs.legs}) > 1
    pattern = staircase.pattern_of_staircase(stairs, mirrored=mirrored, time_limit_s=10, seed=0)
    assert pattern is not None
    moments = moments_at(instance, pattern.period_ns, staircase.starts_of(stages, stairs, pattern))
    orders = squeezed(instance, moments, pattern.period_ns)
    assert orders is not None
    return orders, pattern.period_ns


def zero_bubble(ranks: int, microbatches: int) -> PlanningProblem:
    return uniform_problem(ranks=ranks, microbatches=microbatches, f="10.4", i="10.2", w="7.7", comm="0.4", copies=1,
                           activations=ranks)


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_the_shared_pattern_gives_the_best_chain_there_is(ranks: int) -> None:
    """What ZB-H1 is by hand, found by HiGHS: the bound at the placement is met for any number of ranks."""
    stages, instance = placed(zero_bubble(ranks, 3 * ranks), "chain")
    orders, period = paced(stages, instance)
    assert judged(instance, orders) == placement_bound(stages).ns
    assert period == pytest.approx(28.3 * stages.problem.unit_ns)


def test_the_shared_pattern_of_a_v_is_as_good_as_the_published_one() -> None:
    problem = zero_bubble(8, 24)
    stages, instance = placed(problem, "v")
    orders, _ = paced(stages, instance)
    known = next(item for item in BASELINES if item.name == "ZB-V").plan(problem).makespan_ns
    assert known is not None and judged(instance, orders) <= known


@pytest.mark.parametrize(("name", "more"), [
    ("two-way", {"copies": 2}), ("twin-v", {"copies": 2}), ("interleaved", {"copies": 1, "activations": 16}),
    ("v", {"copies": 1, "first": "0.2", "last": "0.3", "layers": 16, "activations": 9})])
def test_shared_patterns_are_sound_on_every_kind_of_leg(name: str, more: dict[str, object]) -> None:
    stages, instance = placed(uniform_problem(**{"ranks": 4, "microbatches": 12, "f": 3, "i": 4, "w": 2, "comm": 1,
                                                 "activations": 5, **more}), name)  # type: ignore[arg-type]
    orders, _ = paced(stages, instance)
    assert judged(instance, orders) >= placement_bound(stages).ns


def test_what_is_no_staircase_is_told() -> None:
    streams = two_stream_problem(ranks=2, microbatches=4)
    assert legs.staircase_of(view(streams, next(iter(propose_shapes(streams, "chain"))))) is None
    ring = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4)
    assert legs.staircase_of(view(ring, next(iter(propose_shapes(ring, "ring"))))) is None


def test_moments_that_ask_for_too_much_memory_never_block() -> None:
    """All forwards first, in a memory that holds a few: the order of the pattern keeps the memory whatever is asked."""
    stages, instance = placed(zero_bubble(4, 12), "chain")
    orders, period = paced(stages, instance)
    start = np.zeros(instance.size)
    for row, size in zip(orders.seq, orders.length, strict=True):
        start[row[:size]] = np.arange(size) * period
    forwards_first = start - 1e15 * (instance.kind == 0)
    found = followed(instance, start, forwards_first, 0)
    assert found is not None
    judged(instance, found)


@pytest.mark.parametrize("name", ["chain", "v", "twin-v"])
def test_repeating_the_middle_keeps_the_idle_time(name: str) -> None:
    """Sound for every number of microbatches, and idle time hardly grows with it."""
    problem = uniform_problem(ranks=4, microbatches=64, f=3, i=4, w=2, comm=1, activations=5)
    found = candidate(problem, next(iter(propose_shapes(problem, name))))
    short = short_instance(found, 16)
    assert short is not None
    orders = lists.best_list(short, 0)
    assert orders is not None
    long = stretched(short, orders, found.instance)
    assert long is not None
    work = np.bincount(short.machine, weights=short.dur).max(), np.bincount(found.instance.machine,
                                                                           weights=found.instance.dur).max()
    assert judged(found.instance, long) - work[1] <= 1.5 * (orders.makespan_ns - work[0]) + 10 * problem.unit_ns


def test_short_steps_of_every_length_are_tried_and_the_best_goes_on() -> None:
    """2 x 12: steps of 4, 5 and 6 microbatches once each, then the one whose repeated middle is the shortest."""
    problem = uniform_problem(ranks=2, microbatches=12, f=10, i=12, w=8, comm=1, layers=2, activations=3, copies=1)
    run = Run(problem, PlanOptions(time_limit_s=20, placement="chain"))
    enter(run)
    assert len(run.candidates) == 1
    found, repeating = run.candidates[0], Repeating(run)
    found.bound = Bound(0, "")  # so that there is something to hope for, whatever lists found
    before = found.makespan_ns
    assert all(repeating.step(0.02) for _ in range(4))
    assert [short.microbatches for short in repeating.shorts] == [4, 5, 6]
    assert min(short.long_ns for short in repeating.shorts) >= found.makespan_ns <= before
    assert not Repeating(Run(problem.replace(num_microbatches=5), run.options, candidates=[found])).step(0.02)
