"""Lowered programs: what every rank is told, instruction by instruction."""

from __future__ import annotations

import dataclasses

import pytest

from mipipe.graphs.errors import PlanError
from mipipe.graphs.serialize import digest, load, save
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.execution.execute import describe
from mipipe.planner.execution.lower import lower
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.program import Program


def chain(num_stages: int, microbatches: int, orders: list[str], comm: int = 1, replicas: bool = False) -> Plan:
    """A chain of equal stages with the given order per rank; with replicas, odd microbatches run upside down."""
    groups = tuple(Group(f"g{n}", {"a": PhaseTimes(3, 3, 2)}, saved_fw_bytes=4, gradient_bytes=100)
                   for n in range(num_stages))
    edges = tuple(GroupEdge(n, (n + 1,), 8, 8, f"x{n}") for n in range(num_stages - 1))
    topology = Topology.uniform(num_stages, latency_ns=comm, bytes_per_s=10**9 if replicas else None, kind="a")
    problem = PlanningProblem("chain", groups, edges, topology, microbatches)
    last = num_stages - 1
    stages = tuple(Stage((n,), (n, last - n) if replicas else (n,)) for n in range(num_stages))
    routes = tuple(tuple(last - n if replicas and m % 2 else n for m in range(microbatches)) for n in range(num_stages))
    ranks = tuple(RankOrder(tuple(map(Action.parse, order.split()))) for order in orders)
    return Plan("hand-made", problem, Placement(stages, routes), Schedule(ranks))


def written(program: Program, rank: int) -> str:
    return ", ".join(describe(program, item) for item in program.ranks[rank])


def test_two_ranks():
    """Sends follow producers; rank 1 posts its second receive early, as that transfer runs while 1F0 still does."""
    program = lower(chain(2, 2, ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]))
    assert written(program, 0) == ("0F0, SEND 0⇒1:0, 0F1, SEND 0⇒1:1, RECV 1⇐0:0, FREE 0⇒1:0, FREE 0⇒1:1, 0B0,"
                                   " RECV 1⇐0:1, 0B1, OPTIMIZER_STEP")
    assert written(program, 1) == ("RECV 0⇒1:0, RECV 0⇒1:1, 1F0, 1B0, SEND 1⇐0:0, 1F1, FREE 1⇐0:0, 1B1, SEND 1⇐0:1,"
                                   " FREE 1⇐0:1, OPTIMIZER_STEP")


def test_transfers_say_what_they_carry():
    program = lower(chain(2, 1, ["0F0 0B0", "1F0 1B0"]))
    forward, back = program.transfers
    assert (forward.source_rank, forward.target_rank, forward.num_bytes, forward.values) == (0, 1, 8, ("x0",))
    assert (back.source_stage, back.target_stage, back.backward, back.values) == (1, 0, True, ("x0",))


def test_no_transfer_within_a_rank():
    """Both stages on one rank: nothing is sent."""
    plan = chain(2, 1, ["0F0 1F0 1B0 0B0", ""])
    placement = Placement((Stage((0,), (0,)), Stage((1,), (0,))), ((0,), (0,)))
    program = lower(dataclasses.replace(plan, placement=placement))
    assert not program.transfers
    assert written(program, 1) == "OPTIMIZER_STEP"


def test_reductions_come_last_and_in_one_order():
    """Two-way pair of ranks: both reduce both stages, in the same order, after their last W of each."""
    program = lower(chain(2, 2, ["0F0 1F1 1B1 0B0", "0F1 1F0 1B0 0B1"], replicas=True))
    reductions = [[item.stage for item in rank if item.kind is ActionKind.ALL_REDUCE] for rank in program.ranks]
    assert reductions[0] == reductions[1] and sorted(reductions[0]) == [0, 1]
    for rank in program.ranks:
        for stage in (0, 1):
            done = max(k for k, item in enumerate(rank) if item.action is not None and item.action.stage == stage)
            reduced, = (k for k, item in enumerate(rank) if item.kind is ActionKind.ALL_REDUCE and item.stage == stage)
            assert done < reduced
            assert sorted(rank[reduced].peers) == [0, 1]
            assert rank[reduced].stream is Stream.COLLECTIVE
        assert rank[-1].kind is ActionKind.OPTIMIZER_STEP


def test_programs_are_files(tmp_path):
    plan = chain(2, 2, ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])
    program = lower(plan)
    save(program, tmp_path / "program.json")
    assert load(tmp_path / "program.json", Program) == program
    assert program.plan_digest == digest(plan)


def test_a_plan_that_deadlocks_is_not_lowered():
    with pytest.raises(PlanError, match="deadlocks"):
        lower(chain(2, 1, ["0B0 0F0", "1F0 1B0"]))
