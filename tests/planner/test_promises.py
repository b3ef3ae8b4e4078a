"""Figures that an error or an explanation promises: a size that would do was planned with, a memory that binds does."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from random import Random

import pytest

from mipipe.graphs.units import parse_bytes
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.feasible import enough
from mipipe.planner.problem import Limits, PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import Termination, plan

sys.path.insert(0, str(Path(__file__).parent))
from planner_random import random_problem, with_memory


def promised(problem: PlanningProblem) -> int | None:
    """The memory that the error of an infeasible problem says would do; None where there is a plan after all."""
    result = plan(problem, PlanOptions(time_limit_s=20, gap=10.0))
    if result.plan is not None:
        return None
    assert result.termination is Termination.INFEASIBLE, result.reason
    assert re.search(r"-\d", result.reason) is None, result.reason  # no size below nothing
    found = re.search(r"memory of (\S+) would do", result.reason)
    assert found, result.reason
    return parse_bytes(found[1])


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_a_memory_that_would_do_does(seed: int) -> None:
    """Values in flight included, at whatever the device lacks: almost nothing, or most."""
    random = Random(seed)
    problem, chain = random_problem(random)
    first = random.choice([0.01, 0.3, 0.9, 0.999])
    shares = [share for share in (0.999, 0.9, 0.3, 0.01) if share <= first]  # other placements may need less
    tried = (promised(with_memory(problem, int(chain * share))) for share in shares)
    size = next(found for found in tried if found is not None)
    assert plan(with_memory(problem, size), PlanOptions(time_limit_s=20, use_milp=False, gap=10.0)).plan is not None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 20))
def test_many_memories_that_would_do_do(seed: int) -> None:
    test_a_memory_that_would_do_does(seed)


@pytest.mark.parametrize(("needed", "first"), [(8_000, 8_000), (12_345_678, 10_000_000), (13 * 10**9, 10**9)])
def test_a_promise_is_the_smallest_found_and_never_less_than_needed(needed: int, first: int) -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1)

    def changed(size: int) -> PlanningProblem:
        return problem.replace(limits=dataclasses.replace(problem.limits, activation_bytes=size))

    found = enough(first, changed, lambda made: (made.limits.activation_bytes or 0) >= needed)
    if needed > 4 * first:
        assert found is None  # nothing near enough was found, so nothing is promised
    else:
        assert found is not None and needed <= found <= 1.004 * needed
    assert enough(first, changed, None) is None


def test_memory_does_not_bind_where_the_plan_meets_a_bound_without_it() -> None:
    """A full memory beside "proven optimal" by a rank's work said that more of it may shorten the step."""
    full = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, activations=4, copies=1, layers=4)
    result = plan(full, PlanOptions(time_limit_s=10, placement="chain", use_milp=False))
    assert result.plan is not None
    memory = next(line for line in result.explanation if line.startswith("memory"))
    ample = full.replace(limits=dataclasses.replace(full.limits, activation_bytes=10**9))
    other = plan(ample, PlanOptions(time_limit_s=10, placement="chain", use_milp=False))
    assert other.makespan_ns is not None and result.makespan_ns is not None
    if "which binds" in memory:
        assert result.makespan_ns > result.placement_bound_ns or other.makespan_ns < result.makespan_ns
    shorter = uniform_problem(ranks=1, microbatches=4, f=1, i=1, w=1, activations=1, copies=1)
    alone = plan(shorter, PlanOptions(time_limit_s=2))
    assert alone.termination is Termination.OPTIMAL
    assert any(line.startswith("memory: rank 0 uses 100%") and "does not bind" in line for line in alone.explanation)


def limited(resident: int, activations: int) -> PlanningProblem:
    problem = uniform_problem(ranks=2, microbatches=3, f=3, i=2, w=1, comm=1, layers=3, first="0.3")
    return problem.replace(limits=Limits(resident, activations))


@pytest.mark.parametrize(("resident", "activations"), [(4500, 1333), (4500, 2667), (3000, 2000), (1000, 1000),
                                                       (1000, 9000)])
def test_limits_that_are_told_do(resident: int, activations: int) -> None:
    """All that has to be raised is named; recomputation is no advice where no group offers it."""
    reason = plan(limited(resident, activations), PlanOptions(time_limit_s=10, gap=10.0)).reason
    told = {label: parse_bytes(size) for label, size in re.findall(r"the (\w+) limit to (\w+)", reason)}
    assert told and "recompute" not in reason, reason
    enough_ = limited(told.get("resident", resident), told.get("activation", activations))
    assert plan(enough_, PlanOptions(time_limit_s=10, use_milp=False, gap=10.0)).plan is not None, reason


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("resident", "activations"), [(1000, 9000), (9000, 0)])
def test_what_fits_no_device_alone_needs_no_time(resident: int, activations: int, exact: bool) -> None:
    result = plan(limited(resident, activations), PlanOptions(time_limit_s=0.01, exact=exact))
    assert result.termination is Termination.INFEASIBLE
    assert "group layer0 fits no device: rank 0 (device0)" in result.reason and "limit to" in result.reason


def test_the_exact_model_says_what_lacks() -> None:
    """Every layer fits alone, all of them do not."""
    result = plan(limited(4500, 2667), PlanOptions(time_limit_s=10, exact=True))
    assert result.termination is Termination.INFEASIBLE
    assert "1333 bytes lack" in result.reason and "raise the activation limit to 4kB" in result.reason
