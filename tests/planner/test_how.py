"""How a plan came about: HiGHS's calls are counted, and what it had no part in is not said to be its work."""

from __future__ import annotations

import contextvars
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyomo.environ as pyo
import pytest

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import load, save, to_data
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.how import How, by_highs, how_lines, how_of
from mipipe.planner.ladder import order_rungs as rungs
from mipipe.planner.ladder.admission import enter
from mipipe.planner.ladder.candidate import candidate, first_orders
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp import highs
from mipipe.planner.milp.calls import SolverCalls, counting
from mipipe.planner.options import PARTS, PlanOptions, without
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.search import annealing
from mipipe.planner.search.orders import orders_of_schedule
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from planner_problems import multimodal_problem


def _small(name: str) -> pyo.ConcreteModel:
    model = pyo.ConcreteModel(name=name)
    model.x = pyo.Var(range(8), domain=pyo.Binary)
    model.row = pyo.Constraint(expr=sum((3 + 2 * i) * model.x[i] for i in range(8)) <= 31)
    model.goal = pyo.Objective(expr=-sum((5 + 3 * i) * model.x[i] for i in range(8)))
    return model


def test_every_call_is_counted_under_its_formulation_in_all_open_ledgers() -> None:
    highs.solve(_small("before"), time_limit_s=5, seed=0)  # nobody counts
    with counting() as outer:
        first = highs.solve(_small("order MIP"), time_limit_s=5, seed=0)
        with counting() as inner, ThreadPoolExecutor(1) as pool:
            second = highs.solve(_small("order MIP"), time_limit_s=5, seed=0)
            context = contextvars.copy_context()
            pool.submit(context.run, highs.solve, _small("mode MIP"), time_limit_s=5, seed=0).result()
    assert [(row.formulation, row.calls) for row in inner.rows()] == [("order MIP", 1), ("mode MIP", 1)]
    order, mode = outer.rows()
    assert (order.formulation, order.calls, mode.calls) == ("order MIP", 2, 1)
    assert order.seconds == pytest.approx(first.seconds + second.seconds) and order.nodes == first.nodes + second.nodes


def test_what_highs_solved_is_known_by_its_name() -> None:
    for step in ("placement MIP", "configuration LP: 12 columns", "order MIP (the least of 3 placements)"):
        assert by_highs(step)
    for step in ("", "list", "shape v", "published ZB-V", "work of the compute stream over 4 devices"):
        assert not by_highs(step)


def _problem() -> PlanningProblem:
    return uniform_problem(ranks=3, microbatches=4, f=10, i=12, w=8, comm=1, activations=2, copies=1)


def test_a_solve_without_the_mip_says_that_highs_took_no_part() -> None:
    result = plan(_problem(), PlanOptions(time_limit_s=1.5, placement="chain", **without(["mip", "published"])))
    assert result.how.highs == () and result.how.highs_part == ()
    assert result.how.placement == ("shape chain",) and set(result.how.order) <= {"list", "annealing"}
    assert how_lines(result.how)[1] == "HiGHS was not called; it took no part in this plan"


def test_a_call_that_changed_nothing_is_counted_but_takes_no_part() -> None:
    """The order MIP proves the order at its placement, which is not what the printed bound rests on."""
    how = How(("shape v",), ("list", "annealing"), "one microbatch's critical path", "order MIP",
              (SolverCalls("order MIP", 2, 1.25, 7),))
    assert how.highs_part == ()
    assert how_lines(how) == [
        "placement by shape v; order by list, annealing; bound by one microbatch's critical path",
        "HiGHS: 2 calls, 1.2 s, 7 nodes (order MIP 2); took no part in this plan"]
    took = replace(how, placement=("placement MIP",), order=("list", "windows MIP"), bound="placement MIP")
    assert took.highs_part == ("placement", "order", "bound")


def test_what_goes_on_from_a_mips_order_keeps_its_share() -> None:
    """Annealing from an adopted order names both; a rung that began anew names itself alone."""
    run = Run(_problem(), PlanOptions(time_limit_s=5, placement="chain"))
    enter(run)
    found = run.candidates[0]
    assert found.lineage == ("list",)
    better = plan(_problem(), PlanOptions(time_limit_s=2, placement="chain", use_milp=False)).plan
    assert better is not None
    found.best = replace(found.best, makespan_ns=2 * found.best.makespan_ns)
    assert rungs.adopt(run, found, better.schedule, "windows MIP", found.lineage)
    assert found.lineage == found.searched == ("list", "windows MIP")


def test_a_schedule_no_search_can_begin_at_is_kept() -> None:
    """A search takes the microbatches of a replica in their order; here 1 must come first, where routes cross."""
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(1, 1, 1)}) for n in range(3))
    edges = tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(2))
    topology = Topology((Device("a", "d", 1000), Device("b", "d", 1000)), Link(), Link())
    problem = PlanningProblem("crossing", groups, edges, topology, 2)
    placement = Placement((Stage((0,), (0,)), Stage((1,), (1,)), Stage((2,), (0, 1))), ((0, 0), (1, 1), (1, 0)))
    f, i, w = ActionKind.F, ActionKind.I, ActionKind.W
    orders = ([(0, f, 1), (2, f, 1), (2, i, 1), (2, w, 1), (0, f, 0), (0, i, 1), (0, w, 1), (0, i, 0), (0, w, 0)],
              [(1, f, 1), (1, i, 1), (1, w, 1), (1, f, 0), (2, f, 0), (2, i, 0), (2, w, 0), (1, i, 0), (1, w, 0)])
    schedule = Schedule(tuple(RankOrder(tuple(Action(*action) for action in order)) for order in orders))
    run = Run(problem, PlanOptions(time_limit_s=5))
    found = candidate(problem, placement)
    first = first_orders(found, compiled=False)
    assert first is not None and orders_of_schedule(found.instance, schedule) is None
    search = found.search = annealing.start(found.instance, first, 0, found.bound.ns)
    assert rungs.adopt(run, found, schedule, "windows MIP")
    assert found.best is not None and found.best.schedule is schedule and found.search is search
    rungs.seed(run, found)
    assert found.search is search and run.candidates == [found]


@pytest.mark.slow
def test_a_placement_of_the_mip_is_called_its_own(tmp_path: Path) -> None:
    result = plan(multimodal_problem(), PlanOptions(time_limit_s=15.0, use_search=False))
    assert result.plan is not None
    calls = {row.formulation: row.calls for row in result.how.highs}
    assert calls["placement MIP"] >= 1 and result.how.seconds > 0
    assert ("placement MIP" in result.how.placement) == result.plan.placement.name.startswith("mip")
    assert how_of(result.plan) == result.how and how_of(replace(result.plan, provenance={})) is None
    save(result.plan, tmp_path / "plan.json")
    assert how_of(load(tmp_path / "plan.json", Plan)) == result.how


def test_other_objectives_count_the_calls_of_all_their_solves() -> None:
    with counting() as outer:
        result = plan(_problem(), PlanOptions(time_limit_s=3, objective="memory", epsilon=0.3, use_search=False))
    assert result.plan is not None and result.plan.provenance["how"] == to_data(result.how)
    assert result.how.highs == outer.rows() and result.how.calls >= 1


def test_parts_are_switched_off_by_name() -> None:
    assert PlanOptions(**without(PARTS)) == PlanOptions(use_milp=False, use_search=False, use_baselines=False)
    assert without(()) == {}
    with pytest.raises(InputError, match="without: found 'mips', expected mip, search, published"):
        without(["mip", "mips"])
