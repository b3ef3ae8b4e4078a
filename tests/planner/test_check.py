"""Damaged plans and programs: each kind of damage gives its own message, with the place."""

from __future__ import annotations

import dataclasses

import pytest

from mipipe.graphs.errors import PlanError, ProgramError
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.actions import Action, ActionKind, Order, Stream
from mipipe.planner.check import check_plan, check_program
from mipipe.planner.execution.lower import lower
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.program import Instruction, Program


def order(text: str) -> Order:
    return tuple(map(Action.parse, text.split()))


def chain_plan(**changes) -> Plan:
    """Two ranks, three microbatches, 1F1B with split gradients; stage 1 could recompute."""
    groups = tuple(Group(f"g{n}", {"a": PhaseTimes(2, 2, 1)}, saved_fw_bytes=4, resident_bytes=100,
                         recompute_bytes=1 if n else None) for n in range(2))
    problem = PlanningProblem("chain2", groups, (GroupEdge(0, (1,), 8, 8, "x"),),
                              Topology.uniform(2, latency_ns=1, kind="a"), 3)
    placement = Placement((Stage((0,), (0,)), Stage((1,), (1,))), ((0, 0, 0), (1, 1, 1)), "chain")
    ranks = (RankOrder(order("0F0 0F1 0I0 0W0 0F2 0I1 0W1 0B2")), RankOrder(order("1F0 1B0 1F1 1B1 1F2 1B2")))
    return dataclasses.replace(Plan("1F1B", problem, placement, Schedule(ranks)), **changes)


def two_way_plan() -> Plan:
    """Two ranks, both stages on both; microbatch 1 runs upside down."""
    plan = chain_plan()
    problem = plan.problem.replace(num_microbatches=2)
    placement = Placement((Stage((0,), (0, 1)), Stage((1,), (1, 0))), ((0, 1), (1, 0)), "two-way")
    ranks = (RankOrder(order("0F0 1F1 1B1 0B0")), RankOrder(order("0F1 1F0 1B0 0B1")))
    return dataclasses.replace(plan, problem=problem, placement=placement, schedule=Schedule(ranks))


def collective_plan() -> Plan:
    """A compute stage and a collective stage on one rank."""
    groups = (Group("attention", {"a": PhaseTimes(2, 2, 1)}),
              Group("dispatch", {"a": PhaseTimes(2, 2, None)}, stream=Stream.COLLECTIVE))
    problem = PlanningProblem("streams", groups, (GroupEdge(0, (1,), 8, 8, "x"),), Topology.uniform(1, kind="a"), 1,
                              colocate=((0, 1),))
    placement = Placement((Stage((0,), (0,)), Stage((1,), (0,))), ((0,), (0,)))
    return Plan("streams", problem, placement, Schedule((RankOrder(order("0F0 0B0"), order("1F0 1I0")),)))


def reordered(plan: Plan, rank: int, text: str) -> Plan:
    ranks = list(plan.schedule.ranks)
    ranks[rank] = RankOrder(order(text), ranks[rank].collective)
    return dataclasses.replace(plan, schedule=Schedule(tuple(ranks)))


def placed(plan: Plan, stages=None, routes=None) -> Plan:
    placement = dataclasses.replace(plan.placement, stages=stages or plan.placement.stages,
                                    routes=routes or plan.placement.routes)
    return dataclasses.replace(plan, placement=placement)


def test_sound_plans_pass():
    for plan in (chain_plan(), two_way_plan(), collective_plan()):
        check_plan(plan)
        check_program(plan, lower(plan))
    recomputing = placed(chain_plan(), stages=(Stage((0,), (0,)), Stage((1,), (1,), recompute=True)))
    recomputing = reordered(recomputing, 1, "1F0 1R0 1B0 1F1 1R1 1B1 1F2 1R2 1B2")
    check_plan(recomputing)
    check_program(recomputing, lower(recomputing))


CHAIN = chain_plan()
PLAN_DAMAGE = {
    "drop an action": (
        reordered(CHAIN, 0, "0F0 0F1 0I0 0W0 0F2 0I1 0W1"),
        "action 0I2: is not scheduled, nor are 1 others; expected on rank 0"),
    "duplicate": (
        reordered(CHAIN, 0, "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0B2 0W1"),
        r"rank 0, action 8 \(0W1\): 0W1 is scheduled twice, first at rank 0, action 6"),
    "duplicate within a fused action": (
        reordered(CHAIN, 1, "1F0 1B0 1F1 1B1 1F2 1B2 1I2"),
        r"rank 1, action 6 \(1I2\): 1I2 is scheduled twice, first at rank 1, action 5 \(1B2\)"),
    "wrong rank": (
        reordered(reordered(CHAIN, 0, "0F0 0F1 0I0 0W0 0F2 0I1 0W1"), 1, "1F0 1B0 1F1 1B1 1F2 1B2 0B2"),
        r"rank 1, action 6 \(0B2\): microbatch 2 of stage 0 is routed to rank 0"),
    "swap": (
        reordered(CHAIN, 0, "0F0 0F1 0W0 0I0 0F2 0I1 0W1 0B2"),
        r"order deadlocks: rank 0, action 2 \(0W0\) waits for 0I0 on rank 0\n"),
    "swap across ranks": (
        reordered(reordered(CHAIN, 0, "0F0 0I0 0F1 0W0 0F2 0I1 0W1 0B2"), 1, "1F0 1F1 1B0 1B1 1F2 1B2"),
        r"rank 0, action 1 \(0I0\) waits for 1I0 on rank 1; rank 1, action 1 \(1F1\) waits for 0F1 on rank 0\n"),
    "phase that does not exist": (
        reordered(CHAIN, 1, "1F0 1R0 1B0 1F1 1B1 1F2 1B2"),
        r"rank 1, action 1 \(1R0\): stage 1 has no RECOMPUTE phase, as it does not recompute"),
    "microbatch beyond the last": (
        reordered(CHAIN, 1, "1F0 1B0 1F1 1B1 1F2 1B2 1F3"),
        r"rank 1, action 6 \(1F3\): there are stages 0 to 1 and microbatches 0 to 2"),
    "no order for a rank": (
        dataclasses.replace(CHAIN, schedule=Schedule(CHAIN.schedule.ranks[:1])),
        "schedule: has orders for 1 ranks, but the topology has 2 devices"),
    "wrong stream": (
        dataclasses.replace(collective_plan(), schedule=Schedule((RankOrder(order("0F0 1F0 1I0 0B0")),))),
        r"rank 0, action 1 \(1F0\): stage 1 runs on the collective stream"),
    "bad route": (
        placed(CHAIN, routes=((0, 0, 0), (1, 0, 1))),
        "stage 1: microbatch 1 is routed to rank 0, which holds no replica of it; its replicas are on ranks 1"),
    "missing route": (placed(CHAIN, routes=((0, 0, 0), (1, 1))), "stage 1: has routes for 2 microbatches, expected 3"),
    "routes of too few stages": (placed(CHAIN, routes=((0, 0, 0),)), "placement: has routes for 1 stages, expected 2"),
    "group in two stages": (
        placed(CHAIN, stages=(Stage((0,), (0,)), Stage((0, 1), (1,)))),
        r"stage 1: holds group 0 \(g0\), which is also in stage 0"),
    "group in no stage": (placed(CHAIN, stages=(Stage((0,), (0,)),), routes=((0, 0, 0),)), "group g1: is in no stage"),
    "unknown group": (placed(CHAIN, stages=(Stage((0,), (0,)), Stage((7,), (1,)))), "stage 1: holds group 7"),
    "empty stage": (placed(CHAIN, stages=(Stage((), (0,)), Stage((1,), (1,)))), "stage 0: holds no group"),
    "unknown rank": (placed(CHAIN, stages=(Stage((0,), (0,)), Stage((1,), (1, 5)))), "stage 1: is on rank 5"),
    "replica twice": (placed(CHAIN, stages=(Stage((0,), (0,)), Stage((1,), (1, 1)))), "expected one or more different"),
    "stages out of order": (
        placed(CHAIN, stages=(Stage((1,), (1,)), Stage((0,), (0,))), routes=((1, 1, 1), (0, 0, 0))),
        "stage 1: its group g0 feeds stage 0, which comes before it"),
    "recompute not offered": (
        placed(CHAIN, stages=(Stage((0,), (0,), True), Stage((1,), (1,)))), "stage 0: recomputes, but"),
    "mixed streams": (
        placed(collective_plan(), stages=(Stage((0, 1), (0,)),), routes=((0,),)), "stage 0: mixes groups"),
    "apart": (
        dataclasses.replace(CHAIN, problem=CHAIN.problem.replace(colocate=((0, 1),))),
        "groups g0 and g1: on ranks 0 and 1 for microbatch 0; the problem wants them together"),
    "activations overfull": (
        dataclasses.replace(CHAIN, problem=CHAIN.problem.replace(limits=Limits(activation_bytes=23))),
        r"rank 0, at 4 ns \(.*\): activations and buffers take 24 bytes .* limit is 23 bytes"),
    "resident over the limit": (
        dataclasses.replace(CHAIN, problem=CHAIN.problem.replace(limits=Limits(resident_bytes=99))),
        "rank 0: its stages' resident bytes are 100 bytes .* limit is 99 bytes"),
    "device too small for its weights": (
        dataclasses.replace(CHAIN, problem=CHAIN.problem.replace(topology=dataclasses.replace(
            CHAIN.problem.topology, devices=(CHAIN.problem.topology.devices[0], Device("tiny", "a", 99))))),
        "rank 1: its stages' resident bytes are 100 bytes .* device tiny has 99 bytes"),
    "device too small for weights and activations": (
        dataclasses.replace(CHAIN, problem=CHAIN.problem.replace(topology=dataclasses.replace(
            CHAIN.problem.topology, devices=(Device("tiny", "a", 123), CHAIN.problem.topology.devices[1])))),
        "rank 0, at 4 ns .* takes 124 bytes .* of it 100 bytes .* device tiny has 123"),
    "wrong makespan": (
        dataclasses.replace(CHAIN, makespan_ns=1), "states a makespan of 1 ns, but its order takes 24 ns"),
    "wrong bound": (
        dataclasses.replace(CHAIN, bound_ns=30), "states a lower bound of 30 ns, but its order takes 24 ns"),
    "wrong bound at placement": (
        dataclasses.replace(CHAIN, placement_bound_ns=30), "a lower bound at this placement of 30 ns"),
    "bounds that disagree": (
        dataclasses.replace(CHAIN, bound_ns=20, placement_bound_ns=19), "a bound of 20 ns over all placements and one"),
}


@pytest.mark.parametrize("damage", PLAN_DAMAGE)
def test_damaged_plans(damage):
    plan, message = PLAN_DAMAGE[damage]
    with pytest.raises(PlanError, match=message) as caught:
        check_plan(plan)
    assert not isinstance(caught.value, ProgramError)


def test_messages_differ():
    """No two kinds of damage are told by the same words."""
    messages = set()
    for plan, _ in PLAN_DAMAGE.values():
        with pytest.raises(PlanError) as caught:
            check_plan(plan)
        messages.add(str(caught.value))
    assert len(messages) == len(PLAN_DAMAGE)


def test_deadlock_shows_the_grid():
    plan = PLAN_DAMAGE["swap across ranks"][0]
    with pytest.raises(PlanError) as caught:
        check_plan(plan)
    assert str(caught.value).splitlines()[1:] == [
        "  rank 0  [0]  0F0 →0I0  0F1  0W0  0F2  0I1  0W1",
        "  rank 1  [0]  1F0 →1F1  1B0  1B1  1F2  1B2",
    ]


def edited(program: Program, rank: int, change) -> Program:
    """The program with one rank's list of instructions changed by a function."""
    instructions = list(program.ranks[rank])
    changed = change(instructions)
    ranks = list(program.ranks)
    ranks[rank] = tuple(instructions if changed is None else changed)
    return dataclasses.replace(program, ranks=tuple(ranks))


def find(instructions: list[Instruction], kind: ActionKind, nth: int = 0) -> int:
    return [k for k, item in enumerate(instructions) if item.kind is kind][nth]


def drop(kind: ActionKind, nth: int = 0):
    return lambda items: items.__delitem__(find(items, kind, nth))


def twice(kind: ActionKind):
    return lambda items: items.insert(find(items, kind) + 1, items[find(items, kind)])


def move(kind: ActionKind, nth: int, place: int):
    return lambda items: items.insert(place, items.pop(find(items, kind, nth)))


def swap(kind: ActionKind, first: int, second: int):
    def change(items):
        a, b = find(items, kind, first), find(items, kind, second)
        items[a], items[b] = items[b], items[a]
    return change


F, SEND, RECV, FREE, STEP = (ActionKind.F, ActionKind.SEND, ActionKind.RECV, ActionKind.FREE, ActionKind.OPTIMIZER_STEP)
LOWERED = lower(CHAIN)
PROGRAM_DAMAGE = {
    "drop a receive": (
        edited(LOWERED, 1, drop(RECV)), "rank 1, 1F0: reads 0⇒1:0, which rank 0 sends but it never receives"),
    "drop a send": (
        edited(LOWERED, 0, drop(SEND)), "rank 1, 1F0: receives 0⇒1:0 from rank 0, which never sends it"),
    "drop a free": (edited(LOWERED, 0, drop(FREE)), "rank 0: never frees 0⇒1:0"),
    "free twice": (
        edited(LOWERED, 0, twice(FREE)),
        r"rank 0, instruction 6 \(FREE 0⇒1:0\): comes a second time, first at instruction 5"),
    "send twice": (edited(LOWERED, 0, twice(SEND)), r"\(SEND 0⇒1:0\): comes a second time, first at instruction 1"),
    "receive twice": (edited(LOWERED, 1, twice(RECV)), r"\(RECV 0⇒1:0\): comes a second time, first at instruction 0"),
    "drop an action": (
        edited(LOWERED, 1, drop(F, 1)), "rank 1, action 2 of the compute stream: found 1B1, but the plan says 1F1"),
    "other order of actions": (
        edited(LOWERED, 0, swap(F, 0, 1)), "rank 0, action 0 of the compute stream: found 0F1, but the plan says 0F0"),
    "send before it is made": (
        edited(LOWERED, 0, move(SEND, 0, 0)), "rank 0, instruction 0: sends 0⇒1:0 before 0F0 has made it"),
    "free before it is sent": (
        edited(LOWERED, 0, move(FREE, 0, 1)), "rank 0, instruction 1: frees 0⇒1:0 before it sends it"),
    "receive after it is read": (
        edited(LOWERED, 1, move(RECV, 0, 4)), "receives 0⇒1:0 only after 1F0, which reads it"),
    "channel order": (
        edited(LOWERED, 1, swap(RECV, 0, 1)),
        r"channel 0->1, transfer 0: rank 0 sends 0⇒1:0 \(instruction 1\), but rank 1 receives 0⇒1:1 \(instruction 0\)"),
    "send by another rank": (
        edited(LOWERED, 1, lambda items: items.insert(0, Instruction(SEND, Stream.CHANNEL, transfer=0))),
        r"rank 1, instruction 0 \(SEND 0⇒1:0\): belongs to rank 0"),
    "no optimizer step": (edited(LOWERED, 1, drop(STEP)), "a rank ends with OPTIMIZER_STEP, once"),
    "early optimizer step": (
        edited(LOWERED, 1, move(STEP, 0, 0)), r"rank 1, instruction 0 \(OPTIMIZER_STEP\): a rank ends with"),
    "unknown transfer": (
        edited(LOWERED, 1, lambda items: items.insert(0, Instruction(RECV, Stream.CHANNEL, transfer=99))),
        "names transfer 99, but there are 6"),
    "send of nothing": (
        edited(LOWERED, 1, lambda items: items.insert(0, Instruction(SEND, Stream.CHANNEL))),
        "rank 1, instruction 0: a SEND without what it works on"),
    "too few bytes": (
        dataclasses.replace(LOWERED, transfers=(dataclasses.replace(LOWERED.transfers[0], num_bytes=7),
                                                *LOWERED.transfers[1:])),
        r"transfer 0 \(0⇒1:0\): has num_bytes 7, but the plan says 8"),
    "other values": (
        dataclasses.replace(LOWERED, transfers=(dataclasses.replace(LOWERED.transfers[0], values=("y",)),
                                                *LOWERED.transfers[1:])),
        r"transfer 0 \(0⇒1:0\): has values \('y',\), but the plan says \('x',\)"),
    "transfer of nothing": (
        dataclasses.replace(LOWERED, transfers=(*LOWERED.transfers, dataclasses.replace(
            LOWERED.transfers[0], source_stage=1, target_stage=0, microbatch=9))),
        "transfer 6 .*: the plan has no such value between ranks"),
    "transfer in the table twice": (
        dataclasses.replace(LOWERED, transfers=(*LOWERED.transfers, LOWERED.transfers[0])),
        r"transfer 6 \(0⇒1:0\): is the same as transfer 0"),
    "missing transfer": (
        dataclasses.replace(LOWERED, transfers=LOWERED.transfers[:-1], ranks=tuple(
            tuple(item for item in rank if item.transfer != 5) for rank in LOWERED.ranks)),
        r"its values for stage 0 \(1⇐0:2\) are in no transfer"),
    "another plan": (
        dataclasses.replace(LOWERED, plan_digest="0"), "program: was lowered from plan 0, but this plan is"),
    "ranks": (dataclasses.replace(LOWERED, ranks=LOWERED.ranks[:1]), "program: is for 1 ranks, but the plan has 2"),
    "memory": (
        edited(LOWERED, 0, lambda items: [item for item in items if item.kind is RECV]
               + [item for item in items if item.kind is not RECV]), None),
}


@pytest.mark.parametrize("damage", [name for name, (_, message) in PROGRAM_DAMAGE.items() if message])
def test_damaged_programs(damage):
    program, message = PROGRAM_DAMAGE[damage]
    with pytest.raises(ProgramError, match=message):
        check_program(CHAIN, program)


def test_receives_posted_too_soon_overfill_memory():
    """The plan fits in 24 bytes; with all receives posted at once, their buffers do not."""
    plan = dataclasses.replace(CHAIN, problem=CHAIN.problem.replace(limits=Limits(activation_bytes=24)))
    check_plan(plan)
    check_program(plan, lower(plan))
    early = dataclasses.replace(PROGRAM_DAMAGE["memory"][0], plan_digest="")
    check_program(CHAIN, early)
    with pytest.raises(ProgramError, match=r"activations and buffers take .* limit is 24 bytes"):
        check_program(plan, early)


def test_a_slower_program_is_told():
    plan = dataclasses.replace(CHAIN, makespan_ns=24)
    check_program(plan, lower(plan))
    late = lower(plan)  # rank 1 waits for every transfer as soon as it has sent it
    for nth in (0, 1):
        late = edited(late, 1, lambda items, nth=nth: items.insert(
            find(items, SEND, nth) + 1, items.pop(find(items, FREE, nth))))
    with pytest.raises(ProgramError, match="program: takes 25 ns, but its plan 24 ns"):
        check_program(plan, late)


def test_program_deadlock_names_the_cycle_and_shows_the_grid():
    """Each rank waits for its own transfer before it posts the receive the other one waits for."""
    plan = two_way_plan()
    program = lower(plan)
    for rank in (0, 1):
        program = edited(program, rank, lambda items: items.insert(find(items, SEND) + 1, items.pop(find(items, FREE))))
    with pytest.raises(ProgramError) as caught:
        check_program(plan, program)
    first, *rows = str(caught.value).splitlines()
    assert first.startswith("program: deadlock: ")
    for part in ("FREE 0⇒1:0 of rank 0", "FREE 0⇒1:1 of rank 1", "RECV 0⇒1:0 of rank 1", "transfer 0⇒1:1"):
        assert part in first
    assert [row.split("→")[1].split()[0] for row in rows] == ["FREE", "FREE"]


def test_reductions():
    plan = two_way_plan()
    program = lower(plan)
    reduce = ActionKind.ALL_REDUCE
    check_program(plan, program)
    for change, message in [
            (drop(reduce), "rank 0: never reduces the gradients of stage"),
            (twice(reduce), r"\(ALL_REDUCE .\): comes a second time"),
            (move(reduce, 0, 2), "comes after the reduction of stage"),
            (lambda items: [*(item for item in items[:-1] if item.kind is not reduce), *(
                item for item in items[::-1] if item.kind is reduce), items[-1]], "program: deadlock: "),
            (lambda items: items.__setitem__(find(items, reduce), dataclasses.replace(
                items[find(items, reduce)], peers=(0,))), r"has members \(0,\), but the stage is on ranks"),
    ]:
        with pytest.raises(ProgramError, match=message):
            check_program(plan, edited(program, 0, change))
    with pytest.raises(ProgramError, match="the stage has no replicas"):
        check_program(CHAIN, edited(LOWERED, 0, lambda items: items.insert(
            len(items) - 1, Instruction(reduce, Stream.COLLECTIVE, stage=0, peers=(0, 1)))))


def test_links_are_read():
    """A slower link makes the plan longer: the checker uses the topology, not the plan's word."""
    topology = dataclasses.replace(CHAIN.problem.topology, overrides={"1->0": Link(5)})
    plan = dataclasses.replace(CHAIN, problem=CHAIN.problem.replace(topology=topology), makespan_ns=24)
    with pytest.raises(PlanError, match="its order takes 32 ns"):
        check_plan(plan)
