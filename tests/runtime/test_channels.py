"""Process groups: one global order for every process, opened before the first step; control traffic on the default."""

from __future__ import annotations

import ast
import importlib
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from runtime_cases import chain_graph, chain_state, plan_of, problem_of

import mipipe.runtime
from mipipe.graphs.errors import RunError
from mipipe.planner.comparison_rows import baseline_rows
from mipipe.planner.device_memory import CHANNEL_BLOCKS, GROUP_BLOCKS, RUNTIME_BYTES
from mipipe.planner.execution.lower import lower
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.team import Team
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks import mesh as meshes
from mipipe.runtime.ranks.groups import ALONE, GroupSpec, Use, group_specs, places_of
from mipipe.runtime.train import trace

RUNTIME = Path(mipipe.runtime.__file__).parent


def dualpipe(ranks):
    problem = uniform_problem(ranks=ranks, microbatches=2 * ranks, f=2, i=2, w=1, copies=2, activations=2 * ranks + 2)
    found = next(item for item in BASELINES if item.name == "DualPipe")
    return lower(next(row.plan for row in baseline_rows(problem, found) if row.plan is not None))


PROGRAMS = {ranks: dualpipe(ranks) for ranks in (2, 4)}


@given(ranks=st.sampled_from((2, 4)), copies=st.integers(1, 4), apart=st.booleans(), data=st.data())
def test_every_process_makes_the_same_groups(ranks, copies, apart, data):
    """Whatever the processes' order: each channel of each copy once, each set of ranks over all copies, and every
    process in the groups of its own rank; copies that share experts are neighbours, and one of each such group holds
    the same."""
    sharing = data.draw(st.sampled_from([size for size in range(1, copies + 1) if copies % size == 0]))
    order = data.draw(st.permutations(range(ranks * copies)))
    places = places_of(order, ranks, copies, ALONE)
    specs = group_specs(PROGRAMS[ranks], [((0, 1), (), False)], places, sharing, apart)
    assert len(specs) == len(set(specs))
    program = PROGRAMS[ranks]
    pairs = {(move.source_rank, move.target_rank) for move in program.transfers}
    channels = [spec for spec in specs if spec.use is Use.CHANNEL]
    assert {spec.members for spec in channels} == {(order[c * ranks + a], order[c * ranks + b])
                                                   for a, b in pairs for c in range(copies)}
    for spec in specs:
        if spec.use is Use.REDUCTION:
            assert set(spec.members) == {order[c * ranks + member] for c in range(copies) for member in spec.key[0]}
        own = [order[c * ranks + spec.key[0]] for c in range(copies)] if spec.key and len(spec.key) == 1 else []
        if spec.use in (Use.COPY, Use.COPY_CONTROL):
            assert spec.members == tuple(own)
        if spec.use is Use.EXCHANGE:
            first = own.index(spec.members[0])
            assert not first % sharing and spec.members == tuple(own[first:first + sharing])
        if spec.use is Use.EXPERT_COPIES:
            assert spec.members == tuple(own[own.index(spec.members[0])::sharing]) and len(spec.members) > 1
    assert any(spec.control for spec in specs) == (apart and copies > 1)
    for use, groups in ((Use.EXCHANGE, copies // sharing if sharing > 1 else 0),
                        (Use.EXPERT_COPIES, sharing if 1 < sharing < copies else 0)):
        assert sum(spec.use is use for spec in specs) == ranks * groups


@given(axes=st.sampled_from(({"tensor": 2}, {"context": 2, "tensor": 3})), copies=st.integers(1, 4), data=st.data())
def test_devices_that_share_experts_are_neighbours_of_one_rank(axes, copies, data):
    """Whatever divides the members of all copies, also groups that are parts of teams or go across them: every device
    is in one group of each kind, members before copies."""
    team = Team(axes)
    sharing = data.draw(st.sampled_from([size for size in range(1, copies * team.members + 1)
                                         if copies * team.members % size == 0]))
    places = places_of(range(2 * copies * team.members), 2, copies, team)
    specs = group_specs(PROGRAMS[2], [], places, sharing, False, team)
    for rank in (0, 1):
        seats = [places[copy, rank, member] for copy in range(copies) for member in range(team.members)]
        assert seats == sorted(seats)
        for use, wanted in ((Use.EXCHANGE, [seats[place:place + sharing] for place in range(0, len(seats), sharing)]),
                            (Use.EXPERT_COPIES, [seats[place::sharing] for place in range(sharing)])):
            found = [list(spec.members) for spec in specs if spec.use is use and spec.key == (rank,)]
            assert found == ([] if sharing == 1 or len(wanted[0]) == 1 else wanted)


CONTEXT_BYTES = 2 * 10**9
"""The driver's context with all kernels loaded, and the workspaces of libraries: an upper bound, not measured here."""
BLOCK_BYTES = (4 << 20) + (512 << 10) + 640 * 120 * 8 * 8
"""Buffers of one block of a communicator, one for each of NCCL's protocols: Simple (NCCL_BUFFSIZE, 4 MiB by its
documentation), LL (8 steps of 512 threads' 8 lines of 16 bytes) and LL128 (8 steps of 640 threads' 120 words of 8
bytes, as its sources have it)."""


def test_communicators_and_the_context_fit_beside_the_nominal_memory():
    """Four ranks in DualPipe's order on four copies with experts over two, two members each: of every process."""
    team = Team({"tensor": 2})
    places = places_of(range(32), 4, 4, team)
    specs = [spec for spec in group_specs(PROGRAMS[4], [((0, 1), (), False)], places, 2, True, team, True)
             if not spec.control]
    for process in range(32):
        mine = [spec for spec in specs if process in spec.members]
        channels = sum(spec.use is Use.CHANNEL for spec in mine)
        held = BLOCK_BYTES * (CHANNEL_BLOCKS * channels + GROUP_BLOCKS * (len(mine) - channels))
        assert len(mine) >= 8 and CONTEXT_BYTES + held <= RUNTIME_BYTES


class Counted(dist.Store):
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def _count(self, *given):
        self.asked += 1
        raise RuntimeError("asked")

    set = get = add = wait = check = _count


def test_groups_of_others_cost_a_process_no_wait():
    """In a run of 1,024 processes, of 256 copies of 4 ranks, one asks the others nothing about groups it is not in."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # a default group without peers
    store = Counted()
    dist.init_process_group("fake", rank=0, world_size=1024, store=store)
    try:
        specs = group_specs(PROGRAMS[4], [((0, 1), (), False)], places_of(range(1024), 4, 256, ALONE), 16, True)
        others = [spec for spec in specs if 0 not in spec.members]
        for spec in others:
            assert meshes._create(spec, torch.device("cpu"), timedelta(seconds=1)) is dist.GroupMember.NON_GROUP_MEMBER
        assert len(others) > 1700 and not store.asked
        with pytest.raises(RuntimeError, match="asked"):
            meshes._create(next(spec for spec in specs if 0 in spec.members), torch.device("cpu"), timedelta(seconds=1))
    finally:
        dist.destroy_process_group()


def opened():
    """What a rank opens while its engine is built, in order."""
    graph = chain_graph(1)
    plan = plan_of(problem_of(graph, 2, 2), [([0], [0]), ([1], [1])], [[0, 0], [1, 1]],
                   ["0F0 0F1 0B0 0B1", "1F0 1I0 1F1 1I1"])
    seen = []
    original = meshes._open
    meshes._open = lambda spec, *rest: (seen.append(spec), original(spec, *rest))
    try:
        Engine(plan, graph, chain_state(1))
    finally:
        meshes._open = original
    return seen


@pytest.mark.slow
@pytest.mark.distributed
def test_groups_are_opened_in_one_order(pool):
    """Two copies of two ranks: what two processes both open, they open in the same order; every channel is there."""
    answers = pool.run(4, __file__, "opened")
    for first in range(4):
        assert {spec.use for spec in answers[first]} == {Use.CHANNEL, Use.PLAN, Use.COPY}
        assert all(first in spec.members for spec in answers[first])
        for second in range(first):
            both = [[spec for spec in answer if {first, second} <= set(spec.members)] for answer in
                    (answers[first], answers[second])]
            assert both[0] == both[1]
    assert sum(spec.use is Use.CHANNEL for answer in answers for spec in answer) == 2 * 2 * 2


def late_peer():
    """Rank 1 never comes to the opening of a channel."""
    spec, group = GroupSpec(Use.CHANNEL, (0, 1), (0, 1)), dist.new_group([0, 1])
    if dist.get_rank():
        time.sleep(2.0)
        return ""
    mesh = meshes.Mesh(0, 2, 0, 1, torch.device("cpu"), {(0, 0, 0): 0, (0, 1, 0): 1})
    spec = GroupSpec(Use.CHANNEL, (1, 0), (1, 0))
    with pytest.raises(RunError) as caught:
        meshes._open(spec, group, mesh, timedelta(seconds=1))
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.slow
def test_who_does_not_come_to_an_opening_is_named(pool):
    text = pool.run(2, __file__, "late_peer")[0]
    assert text == "rank 0: opening the channel from rank 1: nothing for 1 s; the peer hangs or never starts its side"


def test_a_default_group_without_the_cpu_is_refused(monkeypatch):
    for given_, fine in (("cuda:nccl", False), ("cpu:gloo,cuda:nccl", True), ("cpu:gloo", True)):
        monkeypatch.setattr(dist, "get_backend_config", lambda text=given_: text)
        if fine:
            meshes.check_control()
        else:
            with pytest.raises(RunError, match=r'has the backend cuda:nccl.* use init_process_group\("gloo"\)'):
                meshes.check_control()


TENSORS = {"ranks/comm.py"}
"""Where collectives of tensors on the device are started."""
CONTROL = {"engine/engine.py": {"all_reduce", "all_gather"},
           "train/expert_run.py": {"all_reduce", "broadcast_object_list"},
           "recipes/policy_branches.py": {"broadcast_object_list"},
           "train/trace.py": {"send", "recv"}, "ranks/processes.py": {"all_gather_object", "gather_object"},
           "weights/host_weights.py": {"isend", "irecv"}, "worker.py": {"barrier"}}
"""Which collectives are called elsewhere, all with CPU tensors or objects."""
APART = {"train/links.py"}
"""A program of its own, which measures the tensors' backend."""
COLLECTIVES = {"all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_single", "send",
               "recv", "isend", "irecv", "barrier", "all_gather_object", "broadcast_object_list", "gather_object"}


def test_collectives_have_one_door():
    """No module starts a collective of device tensors by itself, and no control traffic has gone astray."""
    for path in RUNTIME.rglob("*.py"):
        place = path.relative_to(RUNTIME).as_posix()
        if place in TENSORS | APART or place.startswith("merge/"):
            continue
        called = {node.func.attr for node in ast.walk(ast.parse(path.read_text()))
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                  and isinstance(node.func.value, ast.Name) and node.func.value.id == "dist"}
        assert called & COLLECTIVES == CONTROL.get(place, set()), place


def offset(delay):
    """The measured distance of this rank's clock, were its host another one."""
    original, clock = trace._boot_id, time.perf_counter_ns
    trace._boot_id = lambda: f"host{dist.get_rank()}"
    trace.time.perf_counter_ns = lambda: clock() + delay * dist.get_rank()
    try:
        return trace.clock_offset_ns()
    finally:
        trace._boot_id, trace.time.perf_counter_ns = original, clock


@pytest.mark.distributed
def test_clocks_of_other_hosts_are_compared_over_the_default_group(pool):
    answers = pool.run(3, __file__, "offset", 10**12)
    assert answers[0] == 0
    for rank in (1, 2):
        assert answers[rank] == pytest.approx(-rank * 10**12, abs=10**8)


class Group:
    """What a group is asked for, in order."""

    def __init__(self) -> None:
        self.asked = []

    def _start_coalescing(self, device):
        self.asked.append("begin")

    def _end_coalescing(self, device):
        self.asked.append("end")
        return "one work"

    def send(self, tensors, peer, tag):
        self.asked.append(("send", tensors[0].shape[0], peer))
        return "a work"

    def recv(self, tensors, peer, tag):
        self.asked.append(("recv", tensors[0].shape[0], peer))
        return "a work"


@pytest.mark.parametrize("start, name", [(comm.start_send, "send"), (comm.start_receive, "recv")])
def test_values_of_a_transfer_go_in_one_launch_where_each_is_a_kernel(start, name):
    """In the transfer's order, with one work; on CPUs, and where there is one value, one message each as before."""
    for device, count, works in (("cpu", 3, ["a work"] * 3), ("meta", 1, ["a work"]), ("meta", 3, ["one work"])):
        group = Group()
        assert start(group, [torch.empty(size + 1, device=device) for size in range(count)], 1) == works
        messages = [(name, size + 1, 1) for size in range(count)]
        assert group.asked == (["begin", *messages, "end"] if works == ["one work"] else messages)


class Event:
    """A moment of a device that comes after so many looks."""

    def __init__(self, looks):
        self.looks = looks

    def query(self):
        self.looks -= 1
        return self.looks <= 0


def test_what_the_host_needs_now_is_waited_for_with_a_limit_and_a_name():
    """At once on a CPU; from a device once its event is over, or the line that says who did not come."""
    waits, counts = comm.Waits(timedelta(seconds=0.05), False), torch.arange(3)
    assert comm.to_host(counts).tensor is counts and comm.to_host(counts).event is None
    assert waits.arrived(comm.to_host(counts), lambda: "never asked") is counts
    assert waits.arrived(comm.Coming(counts, Event(5)), lambda: "never asked") is counts
    with pytest.raises(RunError, match=r"^the routing of layer 3: nothing for 0\.05 s; the peer hangs"):
        waits.arrived(comm.Coming(counts, Event(10**9)), lambda: "the routing of layer 3")
