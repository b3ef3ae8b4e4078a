"""The collective stream's thread: order, keys, and errors that name the action they came from."""

import threading

import pytest
import torch

from mipipe.graphs.errors import RunError
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
