"""SIGTERM: a cluster's way to say that a job must go. It is noted; the training loop ends after the step and saves.

A worker's handler only sets a flag. All ranks hear of it with the loss of the step (`mipipe.runtime.engine.engine`), so
that all stop after the same one.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_asked = threading.Event()


def listen() -> None:
    """Note SIGTERM from now on, and let SIGHUP end the process at once, whatever a shell has set (``nohup``)."""
    _asked.clear()
    signal.signal(signal.SIGTERM, _note)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def asked() -> bool:
    """Whether this process has been asked to end."""
    return _asked.is_set()


def _note(number: int, frame: FrameType | None) -> None:
    _asked.set()
