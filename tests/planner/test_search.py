"""The annealing kernel: its own makespan is the evaluator's, memory is kept, it finds small optima."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.jobs.arrays import Instance, build, mirror, with_mirrors
from mipipe.planner.jobs.paths import shift
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.search import anneal_kernel as anneal
from mipipe.planner.search import annealing as search
from mipipe.planner.search import best_list as lists
from mipipe.planner.search import lists as greedy
from mipipe.planner.search import streams as relax
from mipipe.planner.search.lift import lift
from mipipe.planner.search.orders import Orders, memory_holds, orders_of_schedule, start_times, timed


def _instance(problem: PlanningProblem, shape: str) -> Instance:
    stage_view = view(problem, next(propose_shapes(problem, shape)))
    return build(stage_view, halve=mirror(stage_view) is not None)


def _start(instance: Instance) -> Orders:
    orders = greedy.schedule(instance, greedy.RULES[0])
    assert orders is not None
    return orders


@pytest.mark.parametrize("shape", ["chain", "v", "interleaved", "two-way", "two-way-v"])
def test_results_are_what_the_evaluator_says_and_fit_memory(shape: str) -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, activations=4)
    instance = _instance(problem, shape)
    worker = search.start(instance, _start(instance), seed=3)
    before = worker.best.makespan_ns
    search.advance(worker, 0.5)
    found = worker.best
    assert found.makespan_ns <= before
    _, evaluation = evaluate(instance.view, with_mirrors(instance, found.lists()))
    assert evaluation.makespan_ns == found.makespan_ns >= placement_bound(instance.view).ns
    assert memory_holds(instance, found.seq, found.length)


@pytest.mark.parametrize("shape", ["chain", "v", "interleaved", "two-way"])
def test_a_schedule_and_its_orders_are_one(shape: str) -> None:
    """Orders come back from their schedule, with its makespan; less memory is seen, and so is an order that blocks."""
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, activations=4)
    instance = build(view(problem, next(propose_shapes(problem, shape))))
    orders = _start(instance)
    schedule = with_mirrors(instance, orders.lists())
    again = orders_of_schedule(instance, schedule)
    assert again is not None and again.lists() == orders.lists()
    assert again.makespan_ns == orders.makespan_ns == evaluate(instance.view, schedule)[1].makespan_ns
    assert (start_times(instance, again) + instance.dur).max() == again.makespan_ns
    assert memory_holds(instance, again.seq, again.length)
    assert not memory_holds(replace(instance, cap=instance.cap // 4), again.seq, again.length)
    turned = again.seq.copy()
    turned[0, :again.length[0]] = turned[0, :again.length[0]][::-1]
    assert timed(instance, turned, again.length) is None


def test_finds_the_optimum_of_every_order() -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=3, i=4, w=2, comm=1, copies=1, activations=2)
    instance = _instance(problem, "chain")
    rows = _start(instance).lists()
    best = 1 << 62
    orders = [[order for order in itertools.permutations(row) if all(
        list(instance.kind[list(own)]) == sorted(instance.kind[list(own)])  # F, I and W of a microbatch, in this order
        for own in ([node for node in order if instance.microbatch[node] == m] for m in range(2)))] for row in rows]
    assert [len(found) for found in orders] == [20, 20]
    for first, second in itertools.product(*orders):
        found = timed(instance, np.array([first, second]), instance.lengths())
        best = best if found is None else min(best, found.makespan_ns)
    worker = search.start(instance, _start(instance), seed=0, target_ns=best)
    search.advance(worker, 5.0)
    assert worker.best.makespan_ns == best


def test_shifts_keep_classes_in_order_and_undo_each_other() -> None:
    cls = np.array([0, 0, 0, 1, 1])
    seq = np.array([[0, 3, 1, 4, 2]])
    shift(seq, 0, 4, 0, cls)
    assert seq.tolist() == [[0, 1, 3, 2, 4]]
    shift(seq, 0, 0, 4, cls)
    assert seq.tolist() == [[0, 3, 1, 4, 2]]


def test_the_seed_decides_what_a_number_of_rounds_finds() -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, activations=4)
    instance = _instance(problem, "v")
    results = []
    for _ in range(2):
        worker = search.start(instance, _start(instance), seed=5)
        search.advance(worker, 60.0, rounds=3)
        assert worker.rounds == 3
        results.append((worker.current.copy(), worker.best.seq.copy()))
    assert (results[0][0] == results[1][0]).all() and (results[0][1] == results[1][1]).all()


def test_orders_kept_while_memory_has_a_price_fit_it() -> None:
    problem = two_stream_problem(ranks=4, microbatches=8, activations=3)
    small = relax.relaxed(_instance(problem, "two-way"))
    assert small is not None
    start = _start(small)
    seq, best = start.seq.copy(), start.seq.copy()
    press = np.array([0.1 * small.dur.mean() / small.alloc.max()])
    hot = 2.0 * float(small.dur.mean())
    makespan = anneal.anneal(small.fixed, seq, start.length, 20_000, hot, hot, 0.0, 0.2, press, 0, 1, best)
    fits = [memory_holds(small, orders, start.length) for orders in (seq, best)]
    assert fits == [False, True]
    found = timed(small, best, start.length)
    assert found is not None and found.makespan_ns == makespan
    assert placement_bound(small.view).ns <= makespan <= start.makespan_ns


def test_collectives_lifted_from_the_relaxation_make_a_whole_schedule() -> None:
    problem = two_stream_problem(ranks=4, microbatches=8)
    instance = _instance(problem, "two-way")
    small = relax.relaxed(instance)
    assert small is not None and small.size < instance.size
    orders = _start(small)
    lifted = lift(instance, small, orders)
    assert lifted is not None and lifted.makespan_ns >= orders.makespan_ns
    _, evaluation = evaluate(instance.view, with_mirrors(instance, lifted.lists()))
    assert evaluation.makespan_ns == lifted.makespan_ns


def test_quotas_find_the_steady_state_of_two_streams() -> None:
    """Without its collectives a two-way pipeline streams at nearly full pace under quotas, and not without them."""
    problem = two_stream_problem(ranks=8, microbatches=32)
    small = relax.relaxed(_instance(problem, "two-way"))
    assert small is not None
    plain, tuned = (lists.best_list(small, 0, 20, few=few) for few in (1 << 30, 100))
    assert plain is not None and tuned is not None
    assert tuned.makespan_ns < 0.9 * plain.makespan_ns
    assert tuned.makespan_ns < 1.3 * 60 * 32 * problem.unit_ns  # 60: compute of one microbatch on a rank


def test_a_last_round_cools_by_the_clock_and_rounds_go_on_after_it() -> None:
    instance = _instance(uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, activations=4), "v")
    worker = search.start(instance, _start(instance), seed=2)
    search.advance(worker, 60.0, rounds=1)
    before, rounds = worker.best.makespan_ns, worker.rounds
    search.finish(worker, 1.0)
    began = worker.began
    search.advance(worker, 0.4)
    assert worker.ends == began + 1.0 and worker.rounds == rounds, "the last round goes on in the next slice"
    while worker.rounds == rounds and not worker.finished:
        search.advance(worker, 0.2)
        assert worker.began == began
    assert worker.finished or (worker.ends == 0.0 and worker.best.makespan_ns <= before)
    found = worker.best
    _, evaluation = evaluate(instance.view, with_mirrors(instance, found.lists()))
    assert evaluation.makespan_ns == found.makespan_ns
    assert memory_holds(instance, found.seq, found.length)


def test_a_fresh_round_begins_with_a_pattern_and_says_so() -> None:
    """Rounds before it go on from the best; what is found from the pattern on names it, helpers' finds too."""
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, layers=4, activations=5, copies=1)
    instance = build(view(problem, next(propose_shapes(problem, "chain"))))
    listed = greedy.schedule(instance, greedy.RULES[0], compiled=False)
    assert listed is not None
    whole = search.start(instance, listed, seed=1)
    search.advance(whole, 10.0, rounds=4)
    better, search_from_it = whole.best, search.start(instance, listed, seed=2)
    assert better.makespan_ns < listed.makespan_ns and whole.origin == ""
    search_from_it.patterns.append(("staircase MIP", better))
    search_from_it.rounds = search.TURNS.index("fresh")
    search.advance(search_from_it, 10.0, rounds=1)
    assert search_from_it.best.makespan_ns <= better.makespan_ns
    assert (search_from_it.origin, search_from_it.patterns) == ("staircase MIP", [])
    search_from_it.rounds = search.TURNS.index("fresh")
    search.advance(search_from_it, 10.0, rounds=1)  # none is left: a list
    assert search_from_it.source == search.LISTED
