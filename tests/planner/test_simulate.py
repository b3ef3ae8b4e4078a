"""Lowering and simulation on random plans: branches, replicas, two streams, missing phases, fused actions."""

from __future__ import annotations

import dataclasses
import random
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import PlanError, ProgramError
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.check import check_plan, check_program
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, GroupEdge, Limits, OverlapRule, PhaseTimes, PlanningProblem
from mipipe.planner.timeline import Timeline


def random_problem(rng: random.Random, ranks: int, microbatches: int) -> PlanningProblem:
    """A DAG of 2 to 6 groups with random sizes; phases, collectives, loads and links vary."""
    count, least = rng.randint(2, 6), rng.choice((0, 1, 1))
    groups = []
    frozen = rng.randint(0, 1)
    for n in range(count):
        no_i = n == 0 and rng.random() < 0.5
        times = PhaseTimes(rng.randint(2 * least, 9), None if no_i else rng.randint(2 * least, 9),
                           None if n < frozen or rng.random() < 0.2 else rng.randint(2 * least, 9))
        loads = tuple(rng.choice((0.5, 1.0, 2.0)) for _ in range(microbatches)) if rng.random() < 0.3 else ()
        groups.append(Group(
            f"g{n}", {"a": times, "b": times}, resident_bytes=rng.randint(0, 50), gradient_bytes=rng.randint(least, 40),
            stream=Stream.COLLECTIVE if rng.random() < 0.25 else Stream.COMPUTE, saved_fi_bytes=rng.randint(0, 9),
            saved_fw_bytes=rng.randint(0, 9), saved_iw_bytes=rng.randint(0, 9), workspace_bytes=rng.randint(0, 5),
            recompute_bytes=rng.randint(0, 3), loads=loads,
            forward_workspace_bytes=random.Random(f"{n} {times}").choice((None, 0, 2, 8))))
    edges = []
    for n in range(1, count):
        source = rng.randrange(n)
        targets = {n} | {m for m in range(source + 1, count) if rng.random() < 0.2}
        back = None if rng.random() < 0.15 else rng.randint(0, 9)
        edges.append(GroupEdge(source, tuple(sorted(targets)), rng.randint(0, 9), back, f"v{n}"))
    devices = tuple(Device(f"d{r}", rng.choice("ab"), 10**6, host=f"h{r % 2}") for r in range(ranks))
    topology = Topology(devices, Link(rng.randint(least, 3)), Link(rng.randint(least, 6), 10**9))
    return PlanningProblem("random", tuple(groups), tuple(edges), topology, microbatches,
                           overlap=OverlapRule(rng.randint(2, 4), 4))


def random_placement(rng: random.Random, problem: PlanningProblem) -> Placement:
    """Stages are runs of groups of one stream in topological order, on one or several ranks, routed at random."""
    runs: list[list[int]] = [[0]]
    for n in range(1, len(problem.groups)):
        if problem.groups[n].stream is problem.groups[n - 1].stream and rng.random() < 0.4:
            runs[-1].append(n)
        else:
            runs.append([n])
    stages, routes = [], []
    for groups in runs:
        ranks = tuple(sorted(rng.sample(range(problem.num_ranks), rng.randint(1, min(2, problem.num_ranks)))))
        stages.append(Stage(tuple(groups), ranks, rng.random() < 0.2))
        routes.append(tuple(rng.choice(ranks) for _ in range(problem.num_microbatches)))
    return Placement(tuple(stages), tuple(routes))


def random_order(rng: random.Random, problem: PlanningProblem, placement: Placement) -> Schedule:
    """A random topological order of all actions, dealt to ranks and streams; some I and W fused to B."""
    stages = view(problem, placement)
    needs: dict[tuple, set[tuple]] = {}
    for m in range(problem.num_microbatches):
        for s, stage in enumerate(placement.stages):
            needs[ActionKind.F, s, m] = {(ActionKind.F, stages.edges[e].source, m) for e in stages.incoming[s]}
            phases = [kind for kind, times in ((ActionKind.I, stages.i_ns[s]), (ActionKind.W, stages.w_ns[s])) if times]
            if phases and stage.recompute:
                needs[ActionKind.RECOMPUTE, s, m] = {(ActionKind.F, s, m)}
            before: tuple = (ActionKind.RECOMPUTE if stage.recompute else ActionKind.F, s, m)
            for kind in phases:
                needs[kind, s, m] = {before}
                if before[0] in (ActionKind.F, ActionKind.RECOMPUTE):
                    needs[kind, s, m] |= {(ActionKind.I, stages.edges[e].target, m) for e in stages.outgoing[s]
                                          if stages.edges[e].grad_bytes is not None}
                before = (kind, s, m)
    lists: list[dict[Stream, list[Action]]] = [{stream: [] for stream in Stream} for _ in range(problem.num_ranks)]
    done: set[tuple] = set()
    while len(done) < len(needs):
        part = rng.choice(sorted(key for key, before in needs.items() if key not in done and before <= done))
        done.add(part)
        kind, s, m = part
        lane = lists[placement.routes[s][m]][stages.streams[s]]
        if kind is ActionKind.W and lane and lane[-1] == Action(s, ActionKind.I, m) and rng.random() < 0.7:
            lane[-1] = Action(s, ActionKind.B, m)
        else:
            lane.append(Action(s, kind, m))
    return Schedule(tuple(RankOrder(tuple(lane[Stream.COMPUTE]), tuple(lane[Stream.COLLECTIVE])) for lane in lists))


def with_overlaps(rng: random.Random, plan: Plan) -> Plan:
    """The plan with one adjacent F and B fused to an overlapped pair wherever that does not deadlock."""
    for rank, order in enumerate(plan.schedule.ranks):
        spots = [k for k in range(len(order.compute) - 1)
                 if (order.compute[k].kind, order.compute[k + 1].kind) == (ActionKind.F, ActionKind.B)]
        rng.shuffle(spots)
        for spot in spots:
            forward, back = order.compute[spot:spot + 2]
            fused = Action(forward.stage, ActionKind.OVERLAP_F_B, forward.microbatch, (back.stage, back.microbatch))
            lane = (*order.compute[:spot], fused, *order.compute[spot + 2:])
            ranks = list(plan.schedule.ranks)
            ranks[rank] = RankOrder(lane, order.collective)
            changed = dataclasses.replace(plan, schedule=Schedule(tuple(ranks)))
            try:
                evaluate(view(plan.problem, plan.placement), changed.schedule)
            except PlanError:
                continue
            plan = changed
            break
    return plan


def random_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    problem = random_problem(rng, rng.randint(1, 4), rng.randint(1, 4))
    placement = random_placement(rng, problem)
    return with_overlaps(rng, Plan("random", problem, placement, random_order(rng, problem, placement)))


SEEDS = st.integers(0, 2**32)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_program_takes_as_long_as_the_plan(seed):
    """The lowered program simulates to the very times of the plan's order, transfers and reductions included."""
    plan = random_plan(seed)
    program = lower(plan)
    compiled, evaluation = evaluate(view(plan.problem, plan.placement), plan.schedule)
    timeline = simulate(plan, program)
    assert timeline.makespan_ns == evaluation.makespan_ns
    starts = {span.label: span.start_ns for span in timeline.spans if span.stream is not Stream.CHANNEL}
    for node, action in enumerate(compiled.actions):
        assert starts[str(action)] == evaluation.starts[node]
    moved = sorted((span.start_ns, span.end_ns) for span in timeline.spans if span.stream is Stream.CHANNEL)
    assert moved == sorted((move.start_ns, move.end_ns) for move in evaluation.transfers)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_the_checker_agrees(seed):
    """The independent check finds the same makespan and the same peak memory, to the byte, in plan and program."""
    plan = random_plan(seed)
    timeline = simulate(plan, lower(plan))
    plan = dataclasses.replace(plan, makespan_ns=timeline.makespan_ns)
    check_plan(plan)
    check_program(plan, lower(plan))
    if any(span.start_ns == span.end_ns for span in timeline.spans):
        return  # what takes no time may be ordered either way, and receives are then posted sooner
    peaks = [timeline.peak_bytes(rank) - timeline.resident_bytes[rank] for rank in range(plan.problem.num_ranks)]
    rank = peaks.index(max(peaks))
    for size, raises in ((peaks[rank], False), (peaks[rank] - 1, peaks[rank] > 0)):
        problem = plan.problem.replace(limits=Limits(activation_bytes=size))
        capped = dataclasses.replace(plan, problem=problem)
        for check in (lambda plan=capped: check_plan(plan), lambda plan=capped: check_program(plan, lower(plan))):
            with pytest.raises(PlanError, match="activations and buffers take") if raises else nullcontext():
                check()


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_memory_equals_the_definition(seed):
    """At every moment the simulated memory is the sum the problem defines, computed here moment by moment."""
    plan = random_plan(seed)
    program = lower(plan)
    timeline = simulate(plan, program)
    problem, placement = plan.problem, plan.placement
    for rank in range(problem.num_ranks):
        for time_ns, size in timeline.memory[rank]:
            assert size == memory_at(plan, timeline, program, rank, time_ns)
    assert all(curve[-1][1] == resident for curve, resident in
               zip(timeline.memory, timeline.resident_bytes, strict=True))
    assert sum(timeline.resident_bytes) == sum(
        len(stage.ranks) * problem.groups[group].resident_bytes for stage in placement.stages for group in stage.groups)


def memory_at(plan: Plan, timeline: Timeline, program, rank: int, now: int) -> int:
    """Bytes on a rank at one moment, by the definition in `mipipe.planner.problem`, group by group."""
    problem, placement = plan.problem, plan.placement
    spans = {}
    total = 0
    for span in timeline.spans:
        if span.stream is Stream.CHANNEL or span.kind is ActionKind.ALL_REDUCE:
            continue
        action = Action.parse(span.label)
        for kind, stage, microbatch in action.parts():
            spans[kind, stage, microbatch] = span
        if span.rank == rank and span.start_ns <= now < span.end_ns:
            needs = {}
            for kind, stage, _ in action.parts():
                forward = kind in (ActionKind.F, ActionKind.RECOMPUTE)
                for group in (problem.groups[n] for n in placement.stages[stage].groups):
                    own = group.forward_workspace_bytes if forward else None
                    needs[stage] = max(needs.get(stage, 0), group.workspace_bytes if own is None else own)
            total += sum(needs.values())
    stage_of = {group: s for s, stage in enumerate(placement.stages) for group in stage.groups}

    def scaled(size, group, m):
        return round(size * group.loads[m]) if group.loads else size

    for s, stage in enumerate(placement.stages):
        total += sum(problem.groups[group].resident_bytes for group in stage.groups) * (rank in stage.ranks)
        for m in range(problem.num_microbatches):
            if placement.routes[s][m] != rank:
                continue
            forward, back_i, back_w, again = (spans.get((kind, s, m)) for kind in
                                              (ActionKind.F, ActionKind.I, ActionKind.W, ActionKind.RECOMPUTE))
            begin = forward if again is None else again
            end_i = (back_i or back_w or forward).end_ns
            end_w = (back_w or back_i or forward).end_ns
            for group in (problem.groups[n] for n in stage.groups):
                if again is not None and forward.start_ns <= now < again.start_ns:
                    total += scaled(group.recompute_bytes, group, m)
                total += scaled(group.saved_fi_bytes, group, m) * (begin.start_ns <= now < end_i)
                total += scaled(group.saved_fw_bytes, group, m) * (begin.start_ns <= now < end_w)
                if back_i and back_w:
                    late = [edge.grad_bytes or 0 for edge in problem.edges if problem.groups[edge.source] is group
                            and group.times["a"].i_ns is None and group.times["a"].w_ns is not None
                            and any(problem.groups[other].times["a"].i_ns is not None for other in edge.targets)]
                    for size in (group.saved_iw_bytes, *late):
                        total += scaled(size, group, m) * (back_i.start_ns <= now < end_w)
    posted = posting_times(timeline, program, rank)
    moved = {(span.label): span for span in timeline.spans if span.stream is Stream.CHANNEL}
    for edge in problem.edges:
        source = stage_of[edge.source]
        for target in {stage_of[group] for group in edge.targets} - {source}:
            for m in range(problem.num_microbatches):
                size = scaled(edge.num_bytes, problem.groups[edge.source], m)
                total += size * held(spans[ActionKind.F, source, m], spans[ActionKind.F, target, m],
                                     moved.get(f"{source}⇒{target}:{m}"), posted, rank, now)
                reader = spans.get((ActionKind.I, source, m)) or spans.get((ActionKind.W, source, m))
                pays = any(problem.groups[group].times["a"].i_ns is not None for group in edge.targets
                           if stage_of[group] == target)
                if edge.grad_bytes is not None and pays and reader is not None:
                    size = scaled(edge.grad_bytes, problem.groups[edge.source], m)
                    total += size * held(spans[ActionKind.I, target, m], reader, moved.get(f"{target}⇐{source}:{m}"),
                                         posted, rank, now)
    return total


def held(producer, consumer, move, posted, rank, now):
    """How many ends of a value are in memory of the rank: 0 or 1."""
    if move is None:
        return int(producer.rank == rank and producer.end_ns <= now < consumer.start_ns)
    at_sender = producer.rank == rank and producer.end_ns <= now < move.end_ns
    at_receiver = consumer.rank == rank and posted[move.label] <= now < consumer.start_ns
    return int(at_sender) + int(at_receiver)


def posting_times(timeline, program, rank):
    """When each receive of a rank is posted: at the end of the last compute action before it."""
    ends = {span.label: span.end_ns for span in timeline.spans if span.stream is Stream.COMPUTE}
    now, posted = 0, {}
    for instruction in program.ranks[rank]:
        if instruction.kind is ActionKind.RECV:
            posted[str(program.transfers[instruction.transfer])] = now
        elif instruction.action is not None and instruction.stream is Stream.COMPUTE:
            now = ends[str(instruction.action)]
    return posted


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_receives_are_posted_late_and_in_time(seed):
    """No receive delays its transfer, and none is posted before the last compute action that had ended by then."""
    plan = random_plan(seed)
    program = lower(plan)
    timeline = simulate(plan, program)
    moved = {span.label: span for span in timeline.spans if span.stream is Stream.CHANNEL}
    for rank in range(plan.problem.num_ranks):
        posted = posting_times(timeline, program, rank)
        ends = [span.end_ns for span in timeline.spans if span.rank == rank and span.stream is Stream.COMPUTE]
        for label, time_ns in posted.items():
            assert time_ns <= moved[label].start_ns
            if all(span.end_ns > span.start_ns for span in timeline.spans):  # what takes no time may go either way
                assert time_ns == max([0, *(end for end in ends if end <= moved[label].start_ns)])


def chain_plan() -> Plan:
    """Two ranks, two microbatches, 1F1B: small enough to edit by hand."""
    groups = tuple(Group(f"g{n}", {"a": PhaseTimes(2, 2, 1)}, saved_fw_bytes=4) for n in range(2))
    problem = PlanningProblem("chain2", groups, (GroupEdge(0, (1,), 8, 8, "x"),),
                              Topology.uniform(2, latency_ns=1, kind="a"), 2)
    placement = Placement((Stage((0,), (0,)), Stage((1,), (1,))), ((0, 0), (1, 1)), "chain")
    orders = ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")
    ranks = tuple(RankOrder(tuple(map(Action.parse, order.split()))) for order in orders)
    return Plan("1F1B", problem, placement, Schedule(ranks))


def test_worked_example():
    """2 ranks, transfers of 1: F 0-2, over at 3, B of rank 1 3-8, its gradient only then back at 9."""
    plan = chain_plan()
    timeline = simulate(plan, lower(plan))
    spans = {span.label: (span.start_ns, span.end_ns) for span in timeline.spans}
    assert spans["0⇒1:0"] == (2, 3) and spans["1B0"] == (5, 8) and spans["1⇐0:0"] == (8, 9)
    assert spans["0B0"] == (9, 12) and spans["0B1"] == (14, 17)
    assert timeline.makespan_ns == 17
    assert timeline.bubbles_ns() == (7, 7)
    # Rank 0 peaks from 4 to 5: two activations, microbatch 1's value under way, a receive posted: 4 + 4 + 8 + 8.
    assert timeline.memory[0][:5] == ((0, 4), (2, 16), (3, 8), (4, 24), (5, 16))


def without(program, rank, kind):
    """The program without the first instruction of a kind on a rank."""
    instructions = list(program.ranks[rank])
    del instructions[next(k for k, item in enumerate(instructions) if item.kind is kind)]
    ranks = list(program.ranks)
    ranks[rank] = tuple(instructions)
    return dataclasses.replace(program, ranks=tuple(ranks))


@pytest.mark.parametrize(("rank", "kind", "message"), [
    (1, ActionKind.RECV, r"channel 0->1: its transfer 0 is sent as 0⇒1:0 but received as 0⇒1:1"),
    (0, ActionKind.SEND, r"channel 0->1: its transfer 0 is sent as 0⇒1:1 but received as 0⇒1:0"),
    (1, ActionKind.F, "sends 1⇐0:0 before it has made its values|comes before"),
])
def test_damaged_programs_do_not_simulate(rank, kind, message):
    plan = chain_plan()
    with pytest.raises(ProgramError, match=message):
        simulate(plan, without(lower(plan), rank, kind))


def test_a_free_before_its_peer_can_answer_deadlocks():
    """Rank 0 waits for a transfer whose receive rank 1 posts only after what rank 0 would send later."""
    plan = chain_plan()
    program = lower(plan)
    first = list(program.ranks[1])
    receives = [item for item in first if item.kind is ActionKind.RECV]
    first = [item for item in first if item.kind is not ActionKind.RECV]
    program = dataclasses.replace(program, ranks=(program.ranks[0], (receives[0], *first, receives[1])))
    with pytest.raises(ProgramError, match="1F1: reads"):
        simulate(plan, program)
    sends = [item for item in program.ranks[0] if item.kind is ActionKind.SEND]
    other = [item for item in program.ranks[0] if item.kind is not ActionKind.SEND]
    late = dataclasses.replace(lower(plan), ranks=((*other, *sends), lower(plan).ranks[1]))
    with pytest.raises(ProgramError, match="waits for ever"):
        simulate(plan, late)


def test_latency_passes_for_several_transfers_at_once():
    """Two values ready together: their bytes take 3 each, one after the other; 5 of latency passes for both at once."""
    groups = tuple(Group(name, {"a": PhaseTimes(1, None, None)}) for name in ("make", "one", "two"))
    edges = (GroupEdge(0, (1,), 3, None, "x"), GroupEdge(0, (2,), 3, None, "y"))
    topology = Topology.uniform(2, latency_ns=5, bytes_per_s=10**9, kind="a")
    problem = PlanningProblem("fork", groups, edges, topology, 1)
    placement = Placement((Stage((0,), (0,)), Stage((1,), (1,)), Stage((2,), (1,))), ((0,), (1,), (1,)))
    orders = tuple(RankOrder(tuple(map(Action.parse, text.split()))) for text in ("0F0", "1F0 2F0"))
    plan = Plan("fork", problem, placement, Schedule(orders))
    timeline = simulate(plan, lower(plan))
    moved = sorted((span.start_ns, span.end_ns) for span in timeline.spans if span.kind is ActionKind.SEND)
    assert moved == [(1, 1 + 3 + 5), (1 + 3, 1 + 3 + 3 + 5)]
    assert timeline.makespan_ns == evaluate(view(problem, placement), plan.schedule)[1].makespan_ns == 13
    check_program(plan, lower(plan))
