"""Measures by arrays against the simulated program, on published schedules and on random plans."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.topology import Topology
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.measure import Measures, by_arrays, measure, timed
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.plan import Plan, Schedule
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.schedules import BASELINES

sys.path.insert(0, str(Path(__file__).parent))
from test_overlap import fused
from test_simulate import random_plan
from test_updates import with_updates


def simulated(plan: Plan) -> Measures:
    timeline = simulate(plan, lower(plan))
    ranks = range(plan.problem.num_ranks)
    return Measures(timeline.makespan_ns, tuple(map(timeline.busy_ns, ranks)), timeline.resident_bytes,
                    tuple(map(timeline.peak_bytes, ranks)))


@pytest.mark.parametrize("problem", [
    uniform_problem(ranks=4, microbatches=8, f=2, i=3, w=1, comm=1, first="0.2", last="0.6", layers=16),
    two_stream_problem(ranks=4, microbatches=8)], ids=["one stream", "two streams"])
def test_arrays_measure_what_the_simulated_program_does(problem: PlanningProblem) -> None:
    for baseline, split in product(BASELINES, (True, False)):
        try:
            plan = baseline.plan(problem, split=split)
        except ProblemError:
            continue
        assert by_arrays(view(plan.problem, plan.placement), plan.schedule) == simulated(plan), baseline.name


def test_arrays_measure_random_plans() -> None:
    """Branches, loads, collectives, replicas with their sums, updates, recomputation, pairs, values in flight; what
    takes no time is simulated where values in flight take memory, as lowering may put it anywhere at its moment."""
    simply = 0
    for seed in range(300):
        plan = random_plan(seed)
        plan = fused(plan, Random(seed)) if seed % 2 else plan
        if seed % 3 == 0:
            updates = [Random(seed + number).choice([0, 700]) for number in range(len(plan.problem.groups))]
            plan = replace(plan, problem=with_updates(plan.problem, updates))
        stages, expected = view(plan.problem, plan.placement), simulated(plan)
        found = by_arrays(stages, plan.schedule)
        assert found in (None, expected) and measure(plan) == expected, seed
        simply += found is not None
        compiled, evaluation = evaluate(stages, plan.schedule)
        times = timed(stages, plan.schedule)
        assert times is not None and times.start.tolist() == evaluation.starts, seed
        assert times.reductions == evaluation.reductions and times.makespan_ns == evaluation.makespan_ns, seed
        assert [times.actions.action(n) for n in range(times.actions.size)] == compiled.actions, seed
        damaged = replace(plan.schedule.ranks[0], compute=plan.schedule.ranks[0].compute[1:])
        orders = (damaged, *plan.schedule.ranks[1:])
        assert plan.schedule.ranks[0].compute == () or timed(stages, Schedule(orders)) is None, seed
    assert simply > 200


def test_values_in_flight_are_measured_by_arrays() -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=3, w=1)
    edges = tuple(type(edge)(edge.source, edge.targets, 3, 3, edge.value) for edge in problem.edges)
    moving = BASELINES[1].plan(problem.replace(edges=edges, topology=Topology.uniform(4, bytes_per_s=10**9)))
    assert by_arrays(view(moving.problem, moving.placement), moving.schedule) == simulated(moving)
