"""Processes that this one starts, and ends: none outlives what it was started for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

GRACE_S = 10.0
"""How long a process gets to end its own before it is killed; torchrun's own patience is 30 s."""


@contextlib.contextmanager
def running(command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own, which is ended with all it started where the block ends with an exception, and
    (Linux) when this process is killed. Signals wait until it is there: else nothing would end a process just begun."""
    waiting = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    process = None

    def begin() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        die_with_parent(signal.SIGTERM)

    try:
        try:
            process = subprocess.Popen(command, start_new_session=True, preexec_fn=begin, **streams)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
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
