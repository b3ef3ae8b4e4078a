"""What a worker tells people and its launcher: lines, progress, and the error that it ends with.

With a folder (``--report``) the launcher reads it there (`mipipe.runtime.train.launching.failures`); else lines go to
stderr, and progress to stdout or stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import tells_all
from mipipe.runtime.train.launching.failures import SAID, STARTED, signals_of
from mipipe.runtime.train.training import Trainer


def tell(folder: str | None, text: str) -> None:
    """A line for people: through the launcher, or on stderr."""
    if folder is None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        return
    with contextlib.suppress(OSError), (Path(folder) / SAID).open("a") as stream:
        stream.write(text + "\n")


def announce(folder: str | None, trainer: Trainer, done: int, who: str = "") -> None:
    """Say which step the run (``who``: of its branches) starts from, and from what; after a restart also why."""
    config, restart = trainer.config, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    source = f"checkpoint {trainer.restored}" if trainer.restored is not None else \
        f"the weights in {config.weights}" if config.weights else f"random weights (seed {config.seed})"
    why = ""
    if restart:
        cause = signals_of(Path(folder), reported=False) if folder is not None else ""  # it is removed by now
        why = f"restart {restart}{f' ({cause})' if cause else ''}: "
    text = f"starting with step {done + 1} of {config.steps} from {source}"
    if done >= config.steps:
        text = f"all {config.steps} steps are done in {source}"
    tell(folder, who + why + text)
    if folder is not None and not (Path(folder) / STARTED).exists():
        (Path(folder) / STARTED).write_text(json.dumps({"step": done, "source": source}))


class ProgressBar:
    """One line on stderr (``-``) or in a file that is overwritten, or ``lines`` on stdout; called with (step, loss).

    The first step, which warms up, does not count for the pace. A line is for the first and last step, and for
    every `_SHARE` of the steps or every `_PAUSE_S` seconds in between.
    """

    _SHARE, _PAUSE_S = 0.05, 10.0

    def __init__(self, steps: int, target: str) -> None:
        self._steps, self._target = steps, target
        self._first: tuple[int, float] | None = None
        self._told = 0, 0.0

    def __call__(self, step: int, loss: float) -> None:
        now, pace = time.monotonic(), ""
        if self._first is None:
            self._first = step, now
        else:
            each = (now - self._first[1]) / (step - self._first[0])
            pace = f"  {each:.2f} s a step  {timedelta(seconds=round(each * (self._steps - step)))} left"
        line = f"step {step}/{self._steps}  loss {loss:.4f}{pace}"
        if self._target == "lines":
            since, waited = step - self._told[0], now - self._told[1]
            if step == self._steps or since >= self._SHARE * self._steps or waited >= self._PAUSE_S:
                self._told = step, now
                print(line, flush=True)
            return
        text = f"\r\x1b[K{line}" + ("\n" if step == self._steps else "")
        with contextlib.suppress(OSError), \
                open(self._target, "w") if self._target != "-" else contextlib.nullcontext(sys.stderr) as stream:
            stream.write(text)
            stream.flush()


def report(folder: str | None, error: BaseException) -> None:
    """Leave the error for the launcher: type, message, exit code, moment, and the traceback of an unexpected one."""
    if folder is None:
        return
    place = os.environ.get("RANK", "0")
    data: dict[str, Any] = {"rank": int(place), "type": type(error).__name__, "message": str(error),
                            "time": time.time(),
                            "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
                            "exit_code": getattr(error, "exit_code", 4),
                            "traceback": "" if tells_all(error) else traceback.format_exc()}
    path = Path(folder) / f"error-rank{place}.json"
    path.write_text(json.dumps(data))
