"""A time limit is a promise: whatever the problem, a solve ends with its limit, the check of its plan included."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import threading
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from mipipe.planner import clock
from mipipe.planner.check import check_plan
from mipipe.planner.check.arrays import holds
from mipipe.planner.compare import compare
from mipipe.planner.execution.lower import lower
from mipipe.planner.ladder.state import Progress
from mipipe.planner.milp import pyo
from mipipe.planner.options import Objective, PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import SolveResult, Termination, plan

sys.path.insert(0, str(Path(__file__).parent))
from planner_random import random_problem, with_memory

OBJECTIVES: tuple[Objective, ...] = ("makespan", "memory", "utilisation", "period")


def timed(problem: PlanningProblem, limit_s: float, objective: Objective = "makespan") -> tuple[SolveResult, float]:
    """The result of a solve and its seconds: of the clock, or of computing where others keep the machine busy."""
    began, used = time.monotonic(), time.process_time()
    result = plan(problem, PlanOptions(time_limit_s=limit_s, objective=objective))
    return result, min(time.monotonic() - began, time.process_time() - used)


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels loaded, from the cache of an earlier run where there is one."""
    plan(uniform_problem(ranks=4, microbatches=8, f=1, i=2, w=1, comm=1, layers=16), PlanOptions(time_limit_s=0.5))
    plan(two_stream_problem(ranks=2, microbatches=4), PlanOptions(time_limit_s=0.5))


def kept(seeds: Sequence[int], objectives: Sequence[Objective] = ("makespan",)) -> None:
    ended = set()
    for seed, objective in product(seeds, objectives):
        random = Random(seed)
        problem, least = random_problem(random)
        factor = random.choice([0.8, 1.0, 1.002, 1.01, 1.05, 1.3, 3.0])
        problem = with_memory(problem, int(least * factor))
        result, seconds = timed(problem, 1.0, objective)
        assert seconds <= 3.0, f"seed {seed}, {objective}: {seconds:.1f} s, {result.termination}, {result.rung}"
        assert "within 1 s" in result.reason or result.termination is not Termination.TIME_UP
        ended.add(result.termination)
        if result.plan is not None:
            check_plan(result.plan)
            early = result.seconds < 0.7 and objective == "makespan"  # a part is kept for the check
            assert not early or result.termination is Termination.OPTIMAL, f"seed {seed}: ended without a proof"
    assert len(ended) > 1  # the memory is tight enough that some have no plan


def test_random_problems_keep_a_limit_of_a_second(compiled: None) -> None:
    kept((0, 1, 2, 7))


@pytest.mark.slow
def test_many_random_problems_keep_a_limit_of_a_second(compiled: None) -> None:
    kept(range(3, 80))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_every_objective_keeps_a_limit_of_a_second(compiled: None, objective: Objective) -> None:
    kept(range(100, 125), (objective,))


def test_a_solve_within_another_is_finished_when_its_time_is_over(compiled: None) -> None:
    """The least memory is several solves, each with a part of the time: what a part found is checked and explained
    after it, where values in flight take memory and channels, too."""
    problem = uniform_problem(ranks=4, microbatches=16, f=10, i=12, w=8, comm=2, activations=3)
    problem = problem.replace(edges=tuple(dataclasses.replace(edge, num_bytes=100, grad_bytes=100)
                                          for edge in problem.edges))
    for objective in ("memory", "period"):
        result, seconds = timed(problem, 0.6, objective)
        assert result.plan is not None and seconds <= 2.7, (objective, seconds, result.reason)
        check_plan(result.plan)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "microbatches"), [(16, 64), (32, 256), (64, 1024)])
def test_large_problems_keep_their_limit(compiled: None, ranks: int, microbatches: int) -> None:
    """64 ranks x 1,024 microbatches with a limit of 5 s took 37: the check and the explanation came after it."""
    problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=1, i=1, w=1, comm="0.1", layers=4 * ranks,
                              first="0.2", last="0.6", activations=0.75 * ranks)
    result, seconds = timed(problem, 5.0)
    assert result.plan is not None and seconds <= 7.5
    assert holds(result.plan)


@pytest.mark.slow
def test_many_microbatches_keep_their_limit(compiled: None) -> None:
    """Values in flight, so no large problem's way: numbering the actions of one placement asks the clock, too."""
    problem = uniform_problem(ranks=4, microbatches=50_000, f=1, i=1, w=1)
    problem = problem.replace(edges=tuple(dataclasses.replace(edge, num_bytes=1) for edge in problem.edges))
    result, seconds = timed(problem, 0.5)
    assert result.plan is None and seconds <= 2.55


def test_a_solve_asks_the_clock_until_it_says_no() -> None:
    """The clock reaches work of any depth, and the driver keeps what was found."""
    asked = 0

    def left() -> float:
        nonlocal asked
        asked += 1
        return 1.0 if asked < 50 else -1.0

    pairs = next(item for item in BASELINES if item.name == "DualPipe").plan(
        uniform_problem(ranks=4, microbatches=1000, f=1, i=1, w=1, fb=2), split=False)
    with clock.watched(left), pytest.raises(clock.OutOfTimeError):
        lower(pairs)
    assert asked == 50
    clock.ask()  # nobody watches


def test_published_rows_without_time_are_left_out_and_say_so() -> None:
    """At 64 x 1,024 all published rows took 26 s, whatever the limit."""
    rows = compare(uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1), ["1F1B", "zb-v"],
                   PlanOptions(time_limit_s=1e-9))
    assert [row.name for row in rows] == ["1F1B", "ZB-V"]
    assert all(row.makespan is None and row.note.startswith("left out") for row in rows)


def test_a_solve_that_ctrl_c_ended_says_so_in_its_plan() -> None:
    def stop(state: Progress) -> None:
        raise KeyboardInterrupt

    result = plan(uniform_problem(ranks=4, microbatches=8, f=1, i=2, w=3), PlanOptions(), stop)
    assert result.plan is not None and result.plan.provenance["termination"] == Termination.INTERRUPTED.value


def test_an_import_of_the_solver_keeps_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: who waits for it is under the clock, and one without a clock waits."""
    ended, asked = threading.Event(), []

    def slow(name: str) -> SimpleNamespace:
        asked.append(name)
        assert ended.wait(30)
        return SimpleNamespace(Var="variable")

    monkeypatch.setattr(pyo, "_found", [])
    monkeypatch.setattr(pyo, "_importlib", SimpleNamespace(import_module=slow))
    left = iter((1.0, 1.0))
    with pytest.raises(clock.OutOfTimeError), clock.watched(lambda: next(left, 0.0)):
        pyo.Var  # noqa: B018
    ended.set()
    assert pyo.Var == "variable" and set(asked) == {"pyomo.environ"}
    monkeypatch.setattr(pyo, "_found", [])
    monkeypatch.setattr(pyo, "_importlib", SimpleNamespace(import_module=importlib.import_module))
    monkeypatch.setattr(pyo, "_ENVIRON", "no_such_module_of_mipipe")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_mipipe"):
        pyo.Var  # noqa: B018
