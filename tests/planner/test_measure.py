"""Measures by arrays against the simulated program, on published schedules and on problems arrays cannot do."""

from __future__ import annotations

from itertools import product

import pytest

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.topology import Topology
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.measure import Measures, by_arrays, measure
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.stages import view
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.schedules import BASELINES


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
        found = by_arrays(view(plan.problem, plan.placement), plan.schedule)
        pairs = any(action.partner for action in plan.schedule.actions())
        assert (found is None) == pairs and measure(plan) == simulated(plan), baseline.name


def test_values_in_flight_are_simulated() -> None:
    """Values that take memory and occupy channels are beyond what arrays do."""
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=3, w=1)
    edges = tuple(type(edge)(edge.source, edge.targets, 3, 3, edge.value) for edge in problem.edges)
    moving = BASELINES[1].plan(problem.replace(edges=edges, topology=Topology.uniform(4, bytes_per_s=10**9)))
    assert by_arrays(view(moving.problem, moving.placement), moving.schedule) is None
    assert measure(moving) == simulated(moving)
