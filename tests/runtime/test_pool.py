"""The tests' own pool of workers: what it answers belongs to what it was asked."""

import os
import signal
import threading
import time

import pytest

pytestmark = pytest.mark.distributed


def said(text, seconds):
    """What a rank does."""
    time.sleep(seconds)
    return text


def test_a_task_that_nobody_waits_for_answers_nobody(pool):
    """A test that runs out of time, or Ctrl-C: the next task gets its own answer."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(2, __file__, "said", "first", 2.0)
    assert pool.run(2, __file__, "said", "second", 0.0) == ["second"] * 2
