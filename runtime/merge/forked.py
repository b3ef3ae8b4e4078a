"""Ranks of a merge as forks of this process: what is imported once need not be imported by each of them.

The parent does no work: it passes on what ranks gather, notices at once when one fails or dies, and then ends the
others. A process with threads is not forked: it starts one of its own that is. Ranks on CUDA devices are started by
torchrun (`mipipe.runtime.merge.launching.launch`), because a device that the parent has opened cannot be used by its
forks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from mipipe.graphs import errors
from mipipe.graphs.children import die_with_parent, signals_wait
from mipipe.graphs.errors import MipipeError, RunError
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.output.lock import let_go_in_fork
from mipipe.runtime.train.launching.failures import signal_name

POLL_S = 60.0
"""How long the parent waits for a message before it looks again; a rank that dies closes its pipe, so none is lost."""


class ForkedRanks(MergeRanks):
    """One of the ranks, which gathers through the parent."""

    def __init__(self, rank: int, size: int, parent: Connection) -> None:
        super().__init__(rank, size, rank)
        self._parent = parent

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on all ranks.

        Raises:
            RunError: the parent is gone.
        """
        try:
            self._parent.send(("value", value))
            found: list[Any] = self._parent.recv()
        except (EOFError, OSError):
            raise RunError("the process that started the merge has ended") from None
        return found

    def tell(self, num_bytes: int) -> None:
        """Say how many more bytes are done."""
        with contextlib.suppress(OSError):
            self._parent.send(("done", num_bytes))

    def __enter__(self) -> ForkedRanks:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        pass


def forks_here() -> bool:
    """Whether this system forks processes safely: Linux does."""
    return sys.platform == "linux" and hasattr(os, "fork")


def can_fork() -> bool:
    """Whether this process may be forked: no other thread holds locks that a fork would keep.

    A thread that draws progress counts as none: its locks are those of its own screen, where forks write nothing.
    """
    others = [thread for thread in threading.enumerate()
              if thread is not threading.current_thread() and not type(thread).__module__.startswith("rich.")]
    return forks_here() and not others


def run_forked(work: Callable[[ForkedRanks], object], size: int, advance: Callable[[int], None]) -> None:
    """Run ``work`` in ``size`` forks, to its end.

    Args:
        advance: called with the bytes of every finished tensor of any rank.

    Raises:
        MipipeError: as the first failing rank raised it, or `RunError` for any other error, or a rank that died.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pipes: list[Connection] = []
    pids: list[int] = []
    try:
        for rank in range(size):
            ours, theirs = Pipe()
            with signals_wait() as go_on:
                pid = os.fork()
                if pid == 0:
                    for other in (*pipes, ours):
                        other.close()
                    _child(work, ForkedRanks(rank, size, theirs), theirs, go_on)
                theirs.close()
                pipes.append(ours)
                pids.append(pid)
        _serve(pipes, pids, advance)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for pipe in pipes:
            pipe.close()


def _child(work: Callable[[ForkedRanks], object], ranks: ForkedRanks, parent: Connection,
           go_on: Callable[[], None]) -> None:
    """A rank's life; never returns."""
    let_go_in_fork()
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    go_on()
    message: tuple[str, Any] = ("end", None)
    try:
        work(ranks)
    except BaseException as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        told = str(error) if isinstance(error, MipipeError) else f"{type(error).__name__}: {error}{notes}"
        message = ("error", (type(error).__name__, told, "" if isinstance(error, MipipeError)
                             else traceback.format_exc()))
    with contextlib.suppress(OSError):
        parent.send(message)
    os._exit(0)


def _serve(pipes: list[Connection], pids: list[int], advance: Callable[[int], None]) -> None:
    """Pass values on until every rank has said that it is at its end."""
    values: dict[int, Any] = {}
    left = set(range(len(pipes)))
    while left:
        for ready in wait([pipes[rank] for rank in left], POLL_S):
            rank = next(number for number in left if pipes[number] is ready)
            try:
                kind, value = pipes[rank].recv()
            except (EOFError, OSError):
                raise RunError(f"rank {rank} {_end_of(pids, rank)}; the same command continues from what is done") \
                    from None
            if kind == "error":
                _raise(rank, *value)
            if kind == "done":
                advance(value)
            elif kind == "end":
                left.discard(rank)
            else:
                values[rank] = value
        if len(values) == len(pipes):
            everyone = [values[rank] for rank in range(len(pipes))]
            values = {}
            for pipe in pipes:
                pipe.send(everyone)


def _end_of(pids: list[int], rank: int) -> str:
    """How a rank that closed its pipe ended, in words; its process is then no longer waited for."""
    _, status = os.waitpid(pids.pop(rank), 0)
    code = os.waitstatus_to_exitcode(status)
    memory = " (by hand, or by the kernel for want of memory: see dmesg)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal_name(-code)}{memory}" if code < 0 else f"ended with status {code}"


def _raise(rank: int, name: str, text: str, trace: str) -> None:
    """Raise a rank's error here."""
    kind = vars(errors).get(name)
    if isinstance(kind, type) and issubclass(kind, MipipeError):
        raise kind(text)
    sys.stderr.write(trace)
    raise RunError(f"rank {rank}: {text}")
