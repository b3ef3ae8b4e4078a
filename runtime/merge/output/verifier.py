"""Verification beside the merge: a fork that imports transformers meanwhile, and checks the result when it is there.

Importing transformers takes seconds and a hundred megabytes, which a merge does without: the process that merges stays
small, and where a processor is free nobody waits. Where transformers has opened the same config and tensors before
(`mipipe.runtime.merge.output.opened`), there is no fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType

import torch

from mipipe.graphs.children import die_with_parent, signals_wait
from mipipe.runtime.merge.output.lock import let_go_in_fork
from mipipe.runtime.merge.output.verify import verify_output

NEEDLESS = "scipy"
"""What transformers imports where it can for losses, which no result is opened with: a fifth of the fork's memory."""
PASSED = "passed"
PATIENCE_S = 120.0
"""How long the fork may take to check the result, once it is there; then it is taken to hang."""


class Verifier:
    """A context manager around the merge. ``architecture``: the class that the result will be opened as.

    Without ``forks`` (or if the fork dies) `check` does the work itself.
    """

    def __init__(self, architecture: str, forks: bool) -> None:
        self._architecture, self._forks = architecture, forks
        self._child: tuple[int, Connection] | None = None

    def __enter__(self) -> Verifier:
        if self._forks:
            ours, theirs = Pipe()
            try:
                with signals_wait() as go_on:
                    pid = os.fork()
                    if pid == 0:
                        ours.close()
                        _serve(theirs, self._architecture, go_on)
                    theirs.close()
                    self._child = pid, ours
            except BaseException:
                self._end()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._child is not None:
            pid, pipe = self._child
            pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._child = None

    def check(self, folder: Path) -> str:
        """What `mipipe.runtime.merge.output.verify.verify_output` returns and raises.

        The fork, which has less than all there is to import, only tells what has passed.
        """
        if self._child is not None:
            pipe = self._child[1]
            with contextlib.suppress(EOFError, OSError):
                pipe.send(str(folder))
                if pipe.poll(PATIENCE_S) and pipe.recv() == PASSED:
                    return ""
        return verify_output(folder)


def _serve(pipe: Connection, architecture: str, go_on: Callable[[], None]) -> None:
    """The fork's life; never returns."""
    let_go_in_fork()
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    go_on()
    torch.set_num_threads(1)
    sys.modules.setdefault(NEEDLESS, None)  # type: ignore[arg-type]  # Python's way to say that there is none
    gc.disable()  # a fifth of the time that importing transformers takes; nothing lives long here
    with contextlib.suppress(BaseException):
        # ahead of the folder: what transformers has under this name of the recipe's models is looked up, not called
        getattr(importlib.import_module("transformers"), architecture, None)
        pipe.send(verify_output(Path(pipe.recv())) or PASSED)
    os._exit(0)
