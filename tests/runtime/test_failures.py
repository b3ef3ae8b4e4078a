"""What goes wrong is said by name, soon: peers that hang or die, plans and batches that do not fit."""

import dataclasses
import functools
import time
from datetime import timedelta

import pytest
import runtime_cases as cases
import runtime_equal as equal
import torch
import torch.distributed as dist
from runtime_pool import TaskError

from mipipe.graphs.errors import GraphError, PlanError, ProgramError, RunError
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.execution.lower import lower
from mipipe.planner.program import Instruction
from mipipe.planner.team import Team
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks.options import EngineOptions

ORDERS = ["0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1W0 1F1 1I1 1W1"]


def two_ranks():
    problem = cases.problem_of(cases.chain_graph(), 2, 2, [["layer0"], ["layer1", "loss"]])
    return cases.plan_of(problem, [([0], [0]), ([1], [1])], [[0, 0], [1, 1]], ORDERS)


def one_rank():
    problem = cases.problem_of(cases.chain_graph(), 2, 1)
    return cases.plan_of(problem, [([0, 1, 2], [0])], [[0, 0]], ["0F0 0B0 0F1 0B1"])


def hang(plan):
    """Rank 1 never steps; rank 0 says for whom it waited."""
    engine = Engine(plan, cases.chain_graph(), cases.chain_state(), options=EngineOptions(timeout_s=1.0))
    if engine.mesh.rank == 1:
        time.sleep(4)
        return None
    start = time.monotonic()
    with pytest.raises(RunError) as caught:
        engine.step(cases.chain_batch(2))
    return str(caught.value), time.monotonic() - start


def fail(plan):
    """Rank 1 raises in the middle of its second action."""
    engine = Engine(plan, cases.chain_graph(), cases.chain_state(), options=EngineOptions(timeout_s=20.0))
    if engine.mesh.rank == 1:
        part = engine.compiled.stages[1].parts["I"]

        def broken(*_):
            raise ValueError("out of luck")

        part.calls[0].function = broken
        engine.step(cases.chain_batch(2))
        return None
    start = time.monotonic()
    with pytest.raises(RunError) as caught:
        engine.step(cases.chain_batch(2))
    raise RuntimeError(f"rank 0 after {time.monotonic() - start:.1f} s: {caught.value}")


@pytest.mark.distributed
def test_a_peer_that_hangs_is_named_within_the_timeout(pool):
    """The message has the rank, the instruction, the transfer and the peer."""
    (text, took), _ = pool.run(2, __file__, "hang", two_ranks())
    assert text.startswith("rank 0, instruction ")
    assert "0⇒1:0" in text and "rank 1" in text and "nothing for 1 s" in text
    assert took < 3


def hang_in_a_team(plan, graph, state, batch):
    """Member 1 never steps; member 0 says at what it waited."""
    engine = Engine(plan, graph, state, options=EngineOptions(timeout_s=1.0))
    if engine.mesh.member == 1:
        time.sleep(3)
        return None
    with pytest.raises(RunError) as caught:
        engine.step(batch)
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_member_that_hangs_is_named_within_the_timeout(pool):
    """The message has the rank and member, the instruction, the axis and the collective."""
    made = equal.case("llama")
    plan = cases.plan_of(cases.problem_of(made.graph, 1, 1, [[item.name for item in made.graph.segments]]),
                         [([0], [0])], [[0]], ["0F0 0B0"])
    plan = dataclasses.replace(plan, team=Team({"tensor": 2}))
    text, _ = pool.run(2, __file__, "hang_in_a_team", plan, made.graph, made.state(), made.batch(1))
    assert text == ("rank 0, member 0, instruction 0 (0F0): member 0 of axis tensor: all-reduce: nothing for 1 s; the"
                    " peer hangs or never starts its side")


@pytest.mark.distributed
def test_a_rank_that_raises_takes_its_peer_along(pool):
    """The failing rank names its instruction and cause; the peer notices the closed connection at once."""
    with pytest.raises(TaskError) as caught:
        pool.run(2, __file__, "fail", two_ranks(), timeout=20)
    text = str(caught.value)
    assert "rank 1, instruction" in text and "1I0" in text and "ValueError: out of luck" in text
    assert "the peer has failed" in text
    seconds = float(text.split("RuntimeError: rank 0 after ")[1].split(" s")[0])
    assert seconds < 5


def test_a_plan_for_another_graph_is_refused():
    plan = dataclasses.replace(one_rank(), problem=one_rank().problem.replace(graph_digest="0" * 16))
    with pytest.raises(PlanError, match="made for graph 0000000000000000, but this graph's digest is"):
        Engine(plan, cases.chain_graph(), cases.chain_state())


def test_more_ranks_than_processes_is_refused():
    with pytest.raises(PlanError, match="2 ranks, but this process was not started by torchrun"):
        Engine(two_ranks(), cases.chain_graph(), cases.chain_state())


@pytest.mark.distributed
def test_a_world_that_is_no_multiple_of_the_plan_is_refused(pool):
    for text in pool.run(3, __file__, "refused", two_ranks()):
        assert text.startswith("3 processes were started, but the plan has 2 ranks")


def refused(plan):
    with pytest.raises(RunError) as caught:
        Engine(plan, cases.chain_graph(), cases.chain_state())
    return str(caught.value)


@pytest.mark.parametrize("change, message", [
    (lambda b: b.pop("t"), "input 't' of chain is missing"),
    (lambda b: b.update(y=b["x"]), "'y' is no input of chain; expected x, t"),
    (lambda b: b.update(x=b["x"][:4]), r"captured with float64 \[3, 4\]"),
    (lambda b: b.update(x=b["x"].float()), r"x is torch.float32 \[3, 4\]"),
    (lambda b: b.update(x=b["x"][:5]), "x has 5 rows, not a multiple of the plan's 2 microbatches"),
])
def test_batches_that_do_not_fit_are_refused(change, message):
    engine = Engine(one_rank(), cases.chain_graph(), cases.chain_state())
    batch = cases.chain_batch(2)
    change(batch)
    with pytest.raises(RunError, match=message):
        engine.step(batch)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("layer1.w"), "'layer1.w' is in the operator graph but not in the model"),
    (lambda s: s.update({"layer1.w": torch.zeros(2, 2)}), r"layer1.w has shape \(2, 2\), expected \(4, 4\)"),
    (lambda s: s.update({"layer1.w": torch.zeros(4, 4, device="meta")}), "on the meta device"),
])
def test_weights_that_do_not_fit_are_refused(change, message):
    state = cases.chain_state()
    change(state)
    with pytest.raises(GraphError, match=message):
        Engine(one_rank(), cases.chain_graph(), state)


def test_one_process_needs_no_process_group():
    """A one-rank plan runs as it is, and its loss and gradients are autograd's."""
    losses, gradients = cases.run_chain(one_rank(), 2, 2)
    loss, expected = cases.chain_reference(2, 2)
    assert losses == pytest.approx([loss], rel=1e-12)
    assert all(torch.allclose(gradients[name], expected[name], rtol=1e-12) for name in expected)


def without(program, kind):
    """The program without the first instruction of a kind on the rank that has one."""
    rank, place = next((rank, place) for rank, items in enumerate(program.ranks)
                       for place, item in enumerate(items) if item.kind is kind)
    items = program.ranks[rank]
    ranks = (*program.ranks[:rank], items[:place] + items[place + 1:], *program.ranks[rank + 1:])
    return dataclasses.replace(program, ranks=ranks)


def with_first(program, instruction):
    return dataclasses.replace(program, ranks=((instruction, *program.ranks[0]), *program.ranks[1:]))


@pytest.mark.parametrize("damage, message", [
    (lambda p: with_first(p, Instruction(ActionKind.ALL_TO_ALL, Stream.COLLECTIVE)),
     "rank 0, instruction 0: a ALL_TO_ALL without what it works on"),
    (lambda p: without(p, ActionKind.RECV), "which rank 1 sends but it never receives"),
    (lambda p: without(p, ActionKind.SEND), "which never sends it"),
    (lambda p: without(p, ActionKind.FREE), "never frees"),
    (lambda p: without(p, ActionKind.F), "action 0 of the compute stream: found 0F1, but the plan says 0F0"),
    (lambda p: without(p, ActionKind.OPTIMIZER_STEP), "a rank ends with OPTIMIZER_STEP"),
])
def test_programs_that_cannot_run_are_refused_before_they_start(damage, message):
    """A program of the user's own is checked against its plan: one line, before any process waits for another."""
    plan = two_ranks()
    with pytest.raises(ProgramError, match=message):
        Engine(plan, cases.chain_graph(), cases.chain_state(), program=damage(lower(plan)))


class Launched:
    """A work of a device that the host runs ahead of: `wait` puts the wait into the device's queue."""

    def __init__(self, done_after=0):
        self.looks, self.done_after, self.waited = 0, done_after, False

    def wait(self):
        self.waited = True

    def is_completed(self):
        self.looks += 1
        return self.looks > self.done_after


def test_a_host_that_runs_ahead_settles_in_the_order_of_its_waits():
    """Every wait goes to the device; the host comes back when all are done, and starts anew for the next step."""
    waits = comm.Waits(timedelta(seconds=5), blocking=False)
    works = [Launched(3), Launched(), Launched(1)]
    for work in works:
        waits.wait([work], lambda: pytest.fail("nothing is late"))
    assert all(work.waited and not work.looks for work in works)
    waits.settle()
    assert [work.looks for work in works] == [4, 1, 2]
    waits.settle()
    assert [work.looks for work in works] == [4, 1, 2]


def test_the_first_wait_that_is_not_over_is_named():
    """The limit is for standing still: works that go on coming are no fault, however long they take together."""
    waits = comm.Waits(timedelta(seconds=0.4), blocking=False)
    for number in range(4):
        waits.wait([Launched(400)], functools.partial("wait {}".format, number))  # 0.2 s each and more
    waits.settle()
    for number, done in enumerate((0, 10**9, 0)):
        waits.wait([Launched(done)], functools.partial("wait {}".format, number))
    with pytest.raises(RunError, match=r"^wait 1: nothing for 0.4 s; the peer hangs or never starts its side$"):
        waits.settle()
    waits.settle()  # a failed step leaves nothing


def run_ahead(stuck):
    """A step of a rank whose host does not wait, and in which rank ``stuck`` never sees a receive end."""
    original = comm.start_receive

    class Real:
        def __init__(self, work):
            self.work = work

        def wait(self):
            self.work.wait(timedelta(seconds=20))

        def is_completed(self):
            return dist.get_rank() != stuck and self.work.is_completed()

    graph = cases.chain_graph(1)
    plan = cases.plan_of(cases.problem_of(graph, 2, 2), [([0], [0]), ([1], [1])], [[0, 0], [1, 1]],
                         ["0F0 0F1 0B0 0B1", "1F0 1I0 1F1 1I1"])
    engine = Engine(plan, graph, cases.chain_state(1), options=EngineOptions(timeout_s=1.0, share_loss=False))
    waits = comm.Waits(timedelta(seconds=1), blocking=False)
    engine._executor._waits = engine._executor._reducer._waits = waits
    comm.start_receive = lambda *rest: [Real(work) for work in original(*rest)]
    try:
        return engine.step(cases.chain_batch(2))
    except RunError as error:
        return str(error)
    finally:
        comm.start_receive = original


@pytest.mark.distributed
def test_who_hangs_is_named_where_hosts_run_ahead(pool):
    """The same engine, its waits settled at the end: equal results; and rank, transfer and peer of a wait that never
    ends."""
    loss, _ = cases.chain_reference(1, 2)
    assert pool.run(2, __file__, "run_ahead", None)[1] == pytest.approx(loss, rel=1e-12)
    texts = pool.run(2, __file__, "run_ahead", 0)
    assert texts[0] == "rank 0, receiving 1⇐0:0 from rank 1: nothing for 1 s; the peer hangs or never starts its side"
    assert texts[1] == pytest.approx(loss, rel=1e-12)
