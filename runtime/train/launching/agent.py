"""torchrun with a report: ``python -m mipipe.runtime.train.launching.agent REPORT START_S <torchrun's arguments>``.

The same as ``python -m torch.distributed.run``, with three differences that its users cannot ask for by flags:

- when workers fail it leaves who did, and how, in ``REPORT/failures.json``, before it ends the others. These end at
  once (SIGHUP), while workers that are asked to end (SIGTERM) get the time to finish their step and save;
- where no worker has started after ``START_S`` seconds (the rendezvous is not answered, such as by a program that is
  not torchrun), it gives up; torch's store waits for ever for the answer of a listener that speaks otherwise;
- when who started it is gone, it removes the report's folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mipipe.runtime.train.launching.failures import FAILURES


def watch(report: Path, started: threading.Event) -> None:
    """Let torch's manager of worker processes say when it starts them, and whose failure it ends them for."""
    start, close = SubprocessContext._start, SubprocessContext._close
    told: weakref.WeakSet[Any] = weakref.WeakSet()

    def noted_start(self: Any) -> None:
        started.set()
        start(self)

    def noted_close(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        failed = {int(self.envs[place]["RANK"]): failure for place, failure in self._failures.items()}
        if failed:
            if self not in told:  # torch closes twice, and then counts those it ended itself among the failed
                told.add(self)
                write_report(report, failed)
            close(self, signal.SIGHUP, timeout)
            return
        if death_sig is signal.SIGTERM:  # to the workers alone: their data loaders go on until the step is done
            running = [item.proc for item in self.subprocess_handlers.values() if item.proc.poll() is None]
            for process in running:
                process.send_signal(signal.SIGTERM)
            until = time.monotonic() + timeout
            while time.monotonic() < until and any(process.poll() is None for process in running):
                time.sleep(0.05)
        close(self, death_sig, timeout)

    SubprocessContext._start, SubprocessContext._close = noted_start, noted_close  # type: ignore[method-assign]


def write_report(report: Path, failed: Mapping[int, ProcessFailure]) -> None:
    """Exit codes and times by rank; a negative code is the signal that ended the worker."""
    if report.is_dir():
        (report / FAILURES).write_text(json.dumps({rank: {"code": failure.exitcode, "time": failure.timestamp}
                                                   for rank, failure in failed.items()}))


def give_up(report: Path, started: threading.Event, start_s: float, endpoint: str) -> None:
    """End this process, with an error for the launcher, where no worker starts in time."""
    if started.wait(start_s):
        return
    message = (f"torchrun's rendezvous{endpoint} did not come about within {start_s:g} s (timeout_s): other nodes are"
               " missing, or another program listens there; see that all nodes name the same free port")
    if report.is_dir():
        (report / "error-rank-agent.json").write_text(json.dumps(
            {"rank": -1, "type": "RunError", "message": message, "time": time.time(), "attempt": 0, "exit_code": 4,
             "traceback": ""}))
    os._exit(4)


def endpoint_of(arguments: list[str]) -> str:
    """Where the rendezvous is, as the flags say, for people."""
    for number, item in enumerate(arguments):
        name, equals, value = item.partition("=")
        if name.replace("_", "-") in ("--rdzv-endpoint", "--master-port", "--master-addr"):
            return f" at {value if equals else ''.join(arguments[number + 1:number + 2])}"
    return ""


def main(arguments: list[str]) -> None:
    """Run torchrun; raise what it raises."""
    report, seconds, *rest = arguments
    folder, started, parent = Path(report), threading.Event(), os.getppid()
    watch(folder, started)
    threading.Thread(target=give_up, args=(folder, started, float(seconds), endpoint_of(rest)), daemon=True).start()
    try:
        run.main(rest)
    except ChildFailedError as error:
        if not (folder / FAILURES).exists():
            write_report(folder, error.failures)
        raise
    finally:
        started.set()
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
