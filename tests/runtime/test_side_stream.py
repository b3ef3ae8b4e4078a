"""The collective stream's thread: order, keys, and errors that name the action they came from."""

import contextlib
import dataclasses
import threading

import pytest
import runtime_experts as ex
import torch

from mipipe.graphs.errors import RunError
from mipipe.runtime.engine import executor
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.engine.side_stream import SideStream


def test_actions_run_in_order_beside_the_caller():
    """Handing over does not wait; a key waits for its action and those before it; no gradients are recorded there."""
    side, gate, done = SideStream(), threading.Event(), []
    side.submit(lambda: done.append(gate.wait(10)), "0F0", ["a"])
    side.submit(lambda: done.append(torch.is_grad_enabled()), "1F0", ["b", "c"])
    assert not done
    gate.set()
    side.wait("b")
    assert done == [True, False]
    side.wait("nothing under this key")
    side.join()


@pytest.mark.parametrize("kind", [RunError, ValueError])
def test_what_follows_a_failure_does_not_run(kind):
    """Whoever waits for it or for anything after it gets the first error, with the action's name."""
    def fail():
        raise kind("out of luck")

    side, done = SideStream(), []
    side.submit(fail, "2I1", ["a"])
    side.submit(lambda: done.append(1), "3I1", ["b"])
    with pytest.raises(RunError, match=r"2I1 on the collective stream: .*out of luck"):
        side.wait("b")
    with pytest.raises(RunError, match="2I1 on the collective stream"):
        side.join()
    assert not done


def test_an_abandoned_stream_runs_nothing_more():
    """What had not begun is dropped."""
    side, gate, begun, done = SideStream(), threading.Event(), threading.Event(), []
    side.submit(lambda: (begun.set(), gate.wait(10)), "0F0", [])
    side.submit(lambda: done.append(1), "1F0", [])
    begun.wait(10)
    side.abandon()
    gate.set()
    assert not done


class Clocks:
    """Streams that compute at once and keep account: what each stream knows of the other, and for whom tensors are
    kept. A read of what the other stream made, without a mark that was followed, is an error, as it is on a GPU."""

    def __init__(self):
        self.here = threading.local()
        self.done = {"main": 0, "side": 0}
        self.known = {"main": {"main": 0, "side": 0}, "side": {"main": 0, "side": 0}}
        self.made, self.kept, self.faults, self.crossings = {}, set(), [], 0

    @property
    def stream(self):
        return getattr(self.here, "name", "main")

    def mark(self):
        name = self.stream
        return {**self.known[name], name: self.done[name]}

    def follow(self, mark):
        mine = self.known[self.stream]
        mine.update({name: max(mine[name], moment) for name, moment in mark.items()})

    @contextlib.contextmanager
    def beside(self):
        self.here.name = "side"
        yield
        del self.here.name

    def keep(self, tensor, aside):
        self.kept.add((tensor.untyped_storage().data_ptr(), "side" if aside else "main"))

    def ran(self, reads, results):
        """A call on the current stream."""
        name = self.stream
        for tensor in reads:
            pointer = tensor.untyped_storage().data_ptr()
            maker, moment = self.made.get(pointer, (name, 0))
            if maker != name:
                self.crossings += 1
                if self.known[name][maker] < moment:
                    self.faults.append(f"{name} reads what {maker} has not made")
                if (pointer, name) not in self.kept:
                    self.faults.append(f"{name} reads what {maker} may give away")
        self.done[name] += 1
        for tensor in results:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in {item.untyped_storage().data_ptr() for item in reads}:
                self.made[pointer] = (name, self.done[name])
                self.kept -= {(pointer, "main"), (pointer, "side")}


def test_who_waits_follows_and_who_hands_over_is_followed():
    """The action knows what was launched before it was handed over; the caller knows the action after `wait` and
    `join`, not after `launched`."""
    streams = Clocks()
    side = SideStream(streams)
    streams.ran([], [])
    seen = []
    side.submit(lambda: (seen.append(streams.known["side"]["main"]), streams.ran([], [])), "0F0", ["a"])
    side.launched("a")
    assert seen == [1] and streams.known["main"]["side"] == 0
    side.submit(lambda: streams.ran([], []), "1F0", ["b"])
    side.wait("b")
    assert streams.known["main"]["side"] == 2
    side.submit(lambda: streams.ran([], []), "2F0", [])
    side.join()
    assert streams.known["main"]["side"] == 3


def run_on_clocks(plan, graph, state):
    """A copy's two steps with its all-to-alls on a second stream that keeps account: faults, crossings, losses."""
    patch, clocks = pytest.MonkeyPatch(), Clocks()
    original = executor.run_calls

    def run_calls(calls, frame, seed):
        for call in calls:
            watched = call.function

            def function(*arguments, watched=watched):
                results = watched(*arguments)
                clocks.ran([item for item in arguments if isinstance(item, torch.Tensor)], results)
                return results

            original([dataclasses.replace(call, function=function, drops=())], frame, seed)
            for slot in call.drops:
                frame[slot] = None

    patch.setattr(executor, "streams_of", lambda device: clocks)
    patch.setattr(executor, "run_calls", run_calls)
    try:
        engine = Engine(plan, graph, state)
        losses = [engine.step(ex.batch_of(step, engine.mesh.copy, engine.mesh.num_copies)) for step in range(2)]
        return clocks.faults, clocks.crossings, losses
    finally:
        patch.undo()


@pytest.mark.distributed
def test_no_stream_reads_what_the_other_has_not_made(pool):
    """Experts of two copies, all-to-alls on the collective stream: order and memory as two CUDA streams need them."""
    module, graph = ex.captured()
    plan, state = ex.solved_plan(graph, 1), ex.state_of(module)
    for faults, crossings, losses in pool.run(2, __file__, "run_on_clocks", plan, graph, state):
        assert not faults and crossings > 20 and len(losses) == 2
