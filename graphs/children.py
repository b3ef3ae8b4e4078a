"""Processes that this one starts, and ends: none outlives what it was started for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

GRACE_S = 10.0
"""How long a process gets to end its own before it is killed; torchrun's own patience is 30 s."""


@contextlib.contextmanager
def signals_wait() -> Iterator[Callable[[], None]]:
    """Let Ctrl-C and SIGTERM wait until the end of the block, in which a process is started and noted.

    Else nothing would end a process just begun; and what is raised while Python forks is lost. A fork calls what this
    yields, once it is ready for signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

    def go_on() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield go_on
    finally:
        go_on()


@contextlib.contextmanager
def running(command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own, which is ended with all it started where the block ends with an exception, and
    (Linux) when this process is killed."""
    process = None
    try:
        with signals_wait() as go_on:
            def begin() -> None:
                go_on()
                die_with_parent(signal.SIGTERM)

            process = subprocess.Popen(command, start_new_session=True, preexec_fn=begin, **streams)
        yield process
    except BaseException:
        if process is not None:
            end_process(process)
        raise


def end_process(process: subprocess.Popen[Any]) -> None:
    """End a process of `running`: politely, so that it ends its own, then all of its session by force."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel (Linux) to signal this process when its parent is gone, so that no orphan holds a device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)
