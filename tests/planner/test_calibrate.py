"""Calibration: a run that is slower by known factors gives these factors back, and then simulates exactly."""

import dataclasses

import pytest

from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import ProblemError, TimelineError
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.calibrate import calibrate, with_costs
from mipipe.planner.check import check_plan
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.replan import replan
from mipipe.planner.timeline import Timeline

MICROBATCHES = 5


def table_of(problem):
    entries = []
    for group in problem.groups:
        for kind, times in group.times.items():
            named = {Phase.F: times.f_ns, Phase.I: times.i_ns, Phase.W: times.w_ns}
            entries.append(GroupCost(group.name, kind, {p: t for p, t in named.items() if t is not None}, "roofline"))
    return CostTable("g", tuple(entries))


@pytest.fixture
def plan():
    times = [(100, None, 100), (200, 300, 100), (400, 500, 300)]
    groups = tuple(Group(f"g{n}", {"device": PhaseTimes(*time), "other": PhaseTimes(*time)})
                   for n, time in enumerate(times))
    edges = (GroupEdge(0, (1,), 10, 10, "a"), GroupEdge(1, (2,), 10, 10, "b"))
    problem = PlanningProblem("p", groups, edges, Topology.uniform(2, latency_ns=7), MICROBATCHES, graph_digest="g")
    placement = Placement((Stage((0, 1), (0,)), Stage((2,), (1,))), ((0,) * MICROBATCHES, (1,) * MICROBATCHES))
    rank0 = " ".join(["0F0", "0F1", *(f"0I{m} 0W{m} 0F{m + 2}" for m in range(3)), "0I3 0W3 0I4 0W4"])
    rank1 = " ".join(f"1F{m} 1B{m}" for m in range(MICROBATCHES))
    orders = [RankOrder(tuple(map(Action.parse, text.split()))) for text in (rank0, rank1)]
    return Plan("test", problem, placement, Schedule(tuple(orders)))


def run_with(plan, costs):
    """The timeline of a machine on which the plan's groups take these times."""
    there = dataclasses.replace(plan, problem=with_costs(plan.problem, costs))
    timeline = simulate(there, lower(there))
    return Timeline("measured", timeline.num_ranks, timeline.spans)


def slower(costs, factors):
    """``factors[group][phase]`` applied to the device that runs."""
    return dataclasses.replace(costs, entries=tuple(
        dataclasses.replace(entry, times_ns={phase: round(time * factors[entry.group][phase])
                                             for phase, time in entry.times_ns.items()})
        for entry in costs.entries))


def test_known_factors_come_back_and_the_new_costs_simulate_the_run(plan):
    costs = table_of(plan.problem)
    first = {Phase.F: 2.0, Phase.I: 3.0, Phase.W: 0.5}
    real = slower(costs, {"g0": first, "g1": first, "g2": dict.fromkeys(Phase, 1.5)})
    measured = run_with(plan, real)
    table, drift = calibrate(plan, measured, costs)
    assert table.find("g0", "device").times_ns == {Phase.F: 200, Phase.W: 50}
    assert table.find("g1", "device").times_ns == {Phase.F: 400, Phase.I: 900, Phase.W: 50}
    assert table.find("g2", "device").times_ns == {Phase.F: 600, Phase.I: 750, Phase.W: 450}
    assert {entry.origin for entry in table.entries if entry.device_kind == "device"} == {"calibrated"}
    assert table.find("g0", "other") == costs.find("g0", "other")
    assert drift.recalibrated_ns == drift.measured_ns == measured.makespan_ns and drift.ratio_after == 1
    assert drift.simulated_ns == simulate(plan, lower(plan)).makespan_ns < drift.measured_ns
    rows = {row.what: row for row in drift.rows}
    assert (rows["stage 0 F"].planned_ns, rows["stage 0 F"].measured_ns) == (300, 600)
    assert rows["stage 1 I"].ratio == 1.5 and rows["stage 1 I"].samples == MICROBATCHES
    assert rows["transfers 0->1"].ratio == 1


def test_one_disturbed_microbatch_does_not_move_the_median(plan):
    costs = table_of(plan.problem)
    measured = run_with(plan, costs)
    spans = tuple(dataclasses.replace(span, end_ns=span.end_ns + 10**6) if span.label == "1F2" else span
                  for span in measured.spans)
    table, drift = calibrate(plan, dataclasses.replace(measured, spans=spans), costs)
    assert table.find("g2", "device").times_ns == costs.find("g2", "device").times_ns
    assert drift.measured_ns > drift.recalibrated_ns


def test_the_optimizer_is_left_out_of_the_step(plan):
    costs = table_of(plan.problem)
    measured = run_with(plan, costs)
    last = dataclasses.replace(measured.spans[-1], kind=ActionKind.OPTIMIZER_STEP, label="OPTIMIZER_STEP", end_ns=10**9)
    _, drift = calibrate(plan, dataclasses.replace(measured, spans=(*measured.spans, last)), costs)
    assert drift.measured_ns == measured.makespan_ns


@pytest.mark.parametrize(("damage", "error", "message"), [
    (lambda plan, measured, costs: (plan, dataclasses.replace(measured, origin="simulated"), costs), TimelineError,
     "found a simulated timeline"),
    (lambda plan, measured, costs: (plan, dataclasses.replace(measured, num_ranks=3), costs), TimelineError,
     "the timeline has 3 ranks, but plan test has 2"),
    (lambda plan, measured, costs: (plan, dataclasses.replace(measured, spans=()), costs), TimelineError,
     "no action of plan test"),
    (lambda plan, measured, costs: (plan, dataclasses.replace(measured, spans=tuple(
        dataclasses.replace(span, rank=1 - span.rank) for span in measured.spans)), costs), TimelineError,
     "which plan test does not give it"),
    (lambda plan, measured, costs: (plan, measured, dataclasses.replace(costs, graph_digest="h")), ProblemError,
     "the cost table is of graph h, but the plan of graph g"),
    *((lambda plan, measured, costs, lost=phase: (plan, measured, dataclasses.replace(costs, entries=tuple(
        dataclasses.replace(entry, times_ns={kept: time for kept, time in entry.times_ns.items() if kept is not lost})
        for entry in costs.entries))), ProblemError, "but the graph has F, .*W; make the table for this graph again")
      for phase in Phase),
])
def test_what_does_not_belong_together_is_refused(plan, damage, error, message):
    costs = table_of(plan.problem)
    measured = run_with(plan, costs)
    with pytest.raises(error, match=message):
        calibrate(*damage(plan, measured, costs))


def test_what_passes_between_actions_is_added_to_them(plan):
    """A machine that takes 20 ns before each action: the new costs have it, and simulate the run."""
    planned = table_of(plan.problem)
    calm = run_with(plan, planned)
    spans = []
    for rank in range(2):
        mine = sorted((span for span in calm.spans if span.rank == rank and span.peer is None),
                      key=lambda span: span.start_ns)
        spans += [dataclasses.replace(span, start_ns=span.start_ns + 20 * number, end_ns=span.end_ns + 20 * number)
                  for number, span in enumerate(mine)]
    _, drift = calibrate(plan, Timeline("measured", 2, tuple(spans)), planned)
    assert drift.launch_ns == 20
    assert drift.recalibrated_ns > drift.simulated_ns and drift.ratio_after == pytest.approx(1, abs=0.05)


def test_planning_again_with_the_corrected_costs(plan):
    """A stage that proved slower than planned moves work elsewhere: the new plan is checked, and never a worse one."""
    planned = table_of(plan.problem)
    real = slower(planned, {name: dict.fromkeys(Phase, factor) for name, factor in (("g0", 1), ("g1", 6), ("g2", 1))})
    table, drift = calibrate(plan, run_with(plan, real), planned)
    found = replan(plan, table, PlanOptions(time_limit_s=1, use_milp=False, threads=1))
    assert found.problem == with_costs(plan.problem, table)
    check_plan(found)
    assert simulate(found, lower(found)).makespan_ns == found.makespan_ns < drift.recalibrated_ns


def test_an_order_that_nothing_beats_is_kept(plan):
    """With less time than a search needs the old order stays, timed with the new costs."""
    planned = table_of(plan.problem)
    best = replan(plan, planned, PlanOptions(time_limit_s=1, use_milp=False, threads=1))
    again = replan(best, planned, PlanOptions(time_limit_s=1, use_milp=False, use_search=False, threads=1))
    assert again.schedule == best.schedule and again.makespan_ns == best.makespan_ns
    assert again.provenance["method"] == f"order of {best.name}, kept"
