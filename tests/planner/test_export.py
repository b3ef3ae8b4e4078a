"""Exports: torch reads our CSV and gives its own program for it, and traces hold what Perfetto needs."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest

from mipipe.graphs.errors import InputError, PlanError
from mipipe.graphs.topology import MOST_DEVICES, Topology
from mipipe.planner.actions import Action, Stream
from mipipe.planner.check import check_plan
from mipipe.planner.execution.export import perfetto_text, read_torch_csv, torch_csv, with_torch_order
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.exportable import LARGER, plan_exportable
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.schedules import BASELINES

BY_NAME = {baseline.name: baseline for baseline in BASELINES}
CHAINS = ["GPipe", "1F1B", "Interleaved 1F1B", "ZB-H1", "ZB-H2", "ZB1P", "ZB-V", "V-Half", "V-Min", "DualPipeV"]


def test_where_a_value_crosses_every_cut_the_remedy_is_another() -> None:
    """`plan --exportable` does not send a user to itself: larger groups are what helps."""
    problem = uniform_problem(ranks=4, microbatches=4, f=1, i=1, w=1, layers=4, copies=1)
    crossed = problem.replace(edges=(*(edge for edge in problem.edges if edge.source), GroupEdge(0, (1, 2, 3))))
    found, _ = plan_exportable(crossed, PlanOptions(time_limit_s=1.0, use_milp=False))
    assert found.plan is None and found.reason.endswith(LARGER) and "--exportable" not in found.reason
    assert "torch's schedule CSV knows only chains" in found.reason


def planned(name: str, **options) -> Plan:
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, comm=1)
    return BY_NAME[name].plan(problem.replace(limits=Limits()), **options)


@pytest.mark.parametrize("name", CHAINS)
def test_torch_reads_our_orders(name):
    """torch's own parser and its pass that adds sends and receives accept every chain schedule we export."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    plan = planned(name)
    rows = torch_csv(plan).splitlines()
    actions = {rank: [schedules._Action.from_str(cell) for cell in row.split(",")] for rank, row in enumerate(rows)}
    assert [[str(action) for action in row] for row in actions.values()] == [
        [str(action) for action in order.compute] for order in plan.schedule.ranks]
    owner = [stage.ranks[0] for stage in plan.placement.stages]
    lowered = schedules._add_send_recv(actions, stage_to_rank=lambda stage: owner[stage], num_stages=len(owner))
    sends = sum("SEND" in str(action) for row in lowered.values() for action in row)
    assert sends == len(lower(plan).transfers)


@pytest.mark.parametrize("name", CHAINS)
def test_round_trip(name):
    plan = planned(name, split=False)
    again = with_torch_order(plan, torch_csv(plan))
    assert again.schedule == plan.schedule
    check_plan(again)


def chain(times: list[PhaseTimes], orders: list[str], edges=((0, (1,)),), streams=None) -> Plan:
    groups = tuple(Group(f"g{n}", {"a": time}, stream=(streams or {}).get(n, Stream.COMPUTE), recompute_bytes=1)
                   for n, time in enumerate(times))
    problem = PlanningProblem("p", groups, tuple(GroupEdge(s, t, 1, 1, "x") for s, t in edges),
                              Topology.uniform(2, kind="a"), 1)
    count = len(times)
    placement = Placement(tuple(Stage((n,), (n % 2,)) for n in range(count)), tuple((n % 2,) for n in range(count)))
    ranks = tuple(RankOrder(tuple(map(Action.parse, order.split()))) for order in orders)
    return Plan("p", problem, placement, Schedule(ranks))


def test_lone_gradients_are_backwards():
    """An embedding has only W, a frozen layer only I: for torch both are a full backward, and they come back."""
    plan = chain([PhaseTimes(1, None, 1), PhaseTimes(1, 1, None)], ["0F0 0W0", "1F0 1I0"])
    assert torch_csv(plan) == "0F0,0B0\n1F0,1B0\n"
    assert with_torch_order(plan, torch_csv(plan)).schedule == plan.schedule


def test_overlapped_pairs_are_torchs():
    assert "(0F7;7B3)OVERLAP_F_B" in torch_csv(planned("DualPipeV", split=False))


BOTH = PhaseTimes(1, 1, 1)


@pytest.mark.parametrize(("plan", "message"), [
    (BY_NAME["DualPipe"].plan(uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1)),
     "stage 0: is on ranks 0, 1; torch's schedule CSV has one rank for each stage"),
    (BY_NAME["ZB-H1"].plan(two_stream_problem(ranks=2, microbatches=4)), "stage 1: runs on the collective stream"),
    (chain([BOTH] * 3, ["0F0 2F0 2B0 0B0", "1F0 1B0"], edges=((0, (1, 2)), (1, (2,)))),
     "stage 0: feeds stages 1, 2, expected 1; torch's schedule CSV knows only chains"),
    (chain([BOTH] * 3, ["0F0 2F0 2B0 0B0", "1F0 1B0"], edges=((0, (2,)), (1, (2,)))),
     "stage 0: feeds stages 2, expected 1"),
    (chain([PhaseTimes(1, None, None), BOTH], ["0F0", "1F0 1B0"]), "stage 0: has no gradients"),
])
def test_what_torch_cannot_say_is_refused(plan, message):
    with pytest.raises(PlanError, match=message):
        torch_csv(plan)


def test_recomputation_is_refused():
    plan = chain([BOTH, BOTH], ["0F0 0R0 0B0", "1F0 1B0"])
    stages = (Stage((0,), (0,), True), plan.placement.stages[1])
    with pytest.raises(PlanError, match="stage 0: recomputes"):
        torch_csv(dataclasses.replace(plan, placement=dataclasses.replace(plan.placement, stages=stages)))


def test_bad_csv():
    plan = planned("1F1B")
    with pytest.raises(InputError, match=r"orders.csv: rank 1, cell 2: action '1X0': expected"):
        read_torch_csv("0F0,0B0\n1F0,,1X0\n", "orders.csv")
    with pytest.raises(InputError, match="has 1 rows, but the plan has 4 ranks"):
        with_torch_order(plan, "0F0,0B0\n", "orders.csv")
    assert read_torch_csv("0F0,,\n") == ((Action.parse("0F0"),),)


def test_trace():
    """Every span is a slice inside its rank and stream, every transfer an arrow to its reader, memory a counter."""
    plan = planned("DualPipe", split=False)
    timeline = simulate(plan, lower(plan))
    events = json.loads(perfetto_text(timeline))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(timeline.spans)
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(timeline.makespan_ns / 1000)
    assert {event["pid"] for event in slices} == set(range(4))
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads[0, 0] == "compute" and "to rank 0" in {name for (rank, _), name in threads.items() if rank == 1}
    assert len({(rank, name) for (rank, _), name in threads.items()}) == len(threads)
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) == len(lower(plan).transfers)
    moved = {(e["pid"], e["tid"], e["ts"]): e for e in slices if e["cat"] == "SEND"}
    begun = {(event["pid"], event["tid"], event["ts"]) for event in slices}
    for number, event in starts.items():
        transfer = moved[event["pid"], event["tid"], event["ts"]]
        reader = ends[number]
        assert (reader["pid"], reader["tid"], reader["ts"]) in begun
        assert reader["pid"] == transfer["args"]["peer"] and reader["ts"] >= transfer["ts"] + transfer["dur"]
    counters = [event for event in events if event["ph"] == "C"]
    assert max(event["args"]["bytes"] for event in counters if event["pid"] == 0) == timeline.peak_bytes(0)
    # No two slices of one thread overlap.
    for thread in threads:
        lane = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if (e["pid"], e["tid"]) == thread)
        assert all(first[1] <= second[0] + 1e-9 for first, second in pairwise(lane))


def test_two_timelines_in_one_trace():
    plan = planned("1F1B")
    simulated = simulate(plan, lower(plan))
    measured = dataclasses.replace(simulated, origin="measured", memory=())
    events = json.loads(perfetto_text(simulated, measured))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names[0] == "rank 0, simulated" and names[MOST_DEVICES] == "rank 0, measured"
    arrows = [event["id"] for event in events if event["ph"] == "s"]
    assert len(arrows) == len(set(arrows)) == 2 * len(lower(plan).transfers)
    assert sum(event["ph"] == "X" for event in events) == 2 * len(simulated.spans)
