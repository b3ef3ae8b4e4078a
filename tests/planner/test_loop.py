"""The loop of a solve: who goes next, what counts as gain, and that it ends early only with a proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest

from mipipe.graphs.topology import Topology
from mipipe.planner.ladder import loop as loop_module
from mipipe.planner.ladder.admission import admit_placement, take
from mipipe.planner.ladder.apart import Parting
from mipipe.planner.ladder.candidate import candidate, judge
from mipipe.planner.ladder.harvest import ANNEALING
from mipipe.planner.ladder.inherit import inherit
from mipipe.planner.ladder.loop import HOPE, Activity, gains, loop
from mipipe.planner.ladder.proposals import finest, replicas_fit
from mipipe.planner.ladder.state import Incumbent, Run
from mipipe.planner.milp.placement.shares import propose_beyond
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements import counts
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import Termination, plan


def test_gain_per_second_decides_and_slices_without_gain_grow() -> None:
    rich, poor = Activity("rich", lambda _: True, 1.0), Activity("poor", lambda _: True, 1.0)
    rich.note(0.01, 2.0)
    poor.note(0.0, 2.0)
    assert rich.worth > poor.worth == HOPE / 2.0
    assert rich.slice_s == 1.0 < poor.slice_s
    for _ in range(30):
        rich.note(0.0, 2.0)
    assert rich.worth < 10 * HOPE  # what was gained long ago is forgotten


def test_gains_go_to_who_made_them() -> None:
    steps = [(1000, "list"), (900, ANNEALING), (810, "windows MIP"), (729, ANNEALING)]
    history = [Incumbent(float(at), makespan, rung, "") for at, (makespan, rung) in enumerate(steps)]
    annealed, others = gains(history)
    assert abs(annealed - 0.2) < 1e-9 and abs(others - 0.1) < 1e-9


def test_nobody_starves_and_who_has_nothing_to_do_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice takes the same by the loop's clock, whatever else the machine does."""
    ticks = count()
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: 0.001 * next(ticks)))
    run = Run(uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1), PlanOptions(time_limit_s=0.5))
    calls = {"one": 0, "two": 0, "idle": 0}

    def step(name: str, active: bool) -> Activity:
        def work(seconds: float) -> bool:
            calls[name] += 1
            return active
        return Activity(name, work, 0.01)

    loop(run, [step("one", True), step("two", True), step("idle", False)], None)
    assert calls["idle"] == 1 and calls["one"] > 2 and abs(calls["one"] - calls["two"]) <= 1 and run.left <= 0


def test_short_slices_without_gain_do_not_take_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what slices took alone, the short ones would always be worthier than a long one has become."""
    now = [0.0]
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = Run(uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1), PlanOptions(time_limit_s=100.0))
    monkeypatch.setattr(Run, "left", property(lambda self: 100.0 - now[0]))
    spent = {"short": 0.0, "long": 0.0}

    def step(name: str, seconds: float) -> Activity:
        def work(_: float) -> bool:
            spent[name] += seconds
            now[0] += seconds
            return True
        return Activity(name, work, 1.0)

    loop(run, [step("short", 0.2), step("long", 2.0)], None)
    assert spent["long"] > 0.1 * spent["short"] > 4.0


def test_progress_of_its_own_is_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activity that works towards something better has a worth before its first incumbent."""
    ticks = count()
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: 0.001 * next(ticks)))
    run = Run(uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1), PlanOptions(time_limit_s=0.5))
    steps = {"towards": 0, "nothing": 0}

    def step(name: str) -> Callable[[float], bool]:
        def work(seconds: float) -> bool:
            steps[name] += 1
            run.interrupted = sum(steps.values()) == 40
            return True
        return work

    loop(run, [Activity("nothing", step("nothing"), 0.01),
               Activity("towards", step("towards"), 0.01, progress=lambda: 0.01 * steps["towards"])], None)
    assert steps["towards"] > 3 * steps["nothing"] > 0


def test_what_gains_more_than_annealing_has_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only once it has gained: until then, and beside what gains nothing, the other threads anneal."""
    ticks = count()
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: 0.001 * next(ticks)))
    run = Run(uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1), PlanOptions(time_limit_s=0.5, threads=2))
    calls: list[tuple[str, int]] = []

    def wide(name: str) -> Callable[..., bool]:
        def work(seconds: float, threads: int = 1) -> bool:
            calls.append((name, threads))
            run.interrupted = len(calls) == 30
            return True
        return work

    def race(seconds: float, threads: int, stop: object = None) -> bool:
        calls.append(("annealing", threads))
        return True

    gain = Activity("gain", wide("gain"), 0.01, progress=lambda: 0.01 * len(calls), wide=wide("gain"))
    loop(run, [gain, Activity("nothing", wide("nothing"), 0.01, wide=wide("nothing"))],
         SimpleNamespace(step=race))  # type: ignore[arg-type]
    first, *later = [threads for name, threads in calls if name == "gain"]
    assert first == 1 and {*later} == {2}
    assert all(threads == 1 for name, threads in calls if name == "nothing")
    run.interrupted = False
    calls.clear()
    monkeypatch.setattr(Run, "left", property(lambda self: 0.0 if self.interrupted else 0.1))  # of 0.5: the last fifth
    loop(run, [gain], SimpleNamespace(step=race))  # type: ignore[arg-type]
    assert {threads for name, threads in calls if name == "gain"} == {1}


def test_a_loop_with_nothing_left_to_do_ends() -> None:
    run = Run(uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1), PlanOptions(time_limit_s=60))
    loop(run, [Activity("idle", lambda _: False, 0.01)], None)
    assert run.left > 50


def test_a_proof_over_all_placements_by_cuts() -> None:
    """Two layers on two ranks: every placement is looked at, so the best order of the best one is the optimum."""
    problem = uniform_problem(ranks=2, microbatches=3, f=3, i=4, w=2, comm=1, layers=2, copies=1, activations=2)
    result = plan(problem, PlanOptions(time_limit_s=10))
    assert result.termination is Termination.OPTIMAL and result.seconds < 10
    assert "MIP" in result.how.bound


def test_no_replica_fits_one_copy_and_cuts_leave_nothing_of_two_layers() -> None:
    problem = uniform_problem(ranks=2, microbatches=3, f=3, i=4, w=2, comm=1, layers=2, copies=1, activations=2)
    assert not replicas_fit(problem) and replicas_fit(uniform_problem(ranks=2, microbatches=3, f=3, i=4, w=2, copies=2))
    chain = next(iter(propose_shapes(problem, "chain")))
    assert finest(problem, chain).stages == chain.stages
    none, outcome = propose_beyond(problem, [chain], hop_weight=1.0, pressure=1.0, max_replicas=1, cutoff_ns=10**12,
                                   time_limit_s=5, seed=0)
    assert none is None and outcome.infeasible


def test_a_placement_inherits_the_order_of_one_like_it() -> None:
    """The same placement under another name is at least as good at once; one with two positions exchanged is sound."""
    problem = uniform_problem(ranks=4, microbatches=8, f=3, i=4, w=2, comm=1, layers=8, copies=1, activations=5)
    run = Run(problem, PlanOptions(time_limit_s=60))
    best = admit_placement(run, next(iter(propose_shapes(problem, "v"))))
    assert best is not None and run.best is best
    again = candidate(problem, replace(best.placement, name="again"))
    assert inherit(run, again) and again.makespan_ns <= best.makespan_ns
    chain = counts.chain_of(problem)
    assert chain is not None
    cut = counts.cut_of(chain, best.placement, 1)
    assert cut is not None
    turned = replace(cut, devices=(*cut.devices[:6], cut.devices[7], cut.devices[6]))
    other = candidate(problem, counts.placement_of(problem, chain, turned))
    assert inherit(run, other) and other.best is not None and other.best.fits
    assert judge(other.view, other.best.schedule).makespan_ns == other.makespan_ns >= other.bound.ns


def test_of_few_groups_placements_are_looked_at_with_groups_apart() -> None:
    """Two copies side by side: the gradients of the last group are reduced while the first still works, 10 ns each."""
    times = ((9, 5, 7), (6, 7, 7), (1, 8, 3))
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(*of)}, gradient_bytes=10) for n, of in enumerate(times))
    problem = PlanningProblem("apart", groups, tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(2)),
                              Topology.uniform(2, bytes_per_s=10**9, kind="d"), 2)
    run = Run(problem, PlanOptions(time_limit_s=60))
    assert admit_placement(run, next(iter(propose_shapes(problem, "twin-chain")))) is not None
    parting = Parting(run, take)
    while parting.step(1.0):
        pass
    assert [len(found.placement.stages) for found in run.candidates] == [1, 3]
    assert run.candidates[1].proposer[-1] == "groups apart" and run.best is run.candidates[1]
    assert run.makespan_ns < run.candidates[0].makespan_ns == 53 + 30
    many = Run(problem.replace(num_microbatches=300), PlanOptions(time_limit_s=60))
    assert not Parting(many, take).step(1.0)
