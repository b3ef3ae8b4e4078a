"""Ctrl-C of a search that keeps the best it has found."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noting_ctrl_c(note: Callable[[], None]) -> Iterator[None]:
    """Call ``note`` at Ctrl-C beside raising it: a compiler's callback, or a solve inside, may swallow the exception,
    not the note. Nothing changes off the main thread, or where something else has the signal already."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def noted(number: int, frame: FrameType | None) -> None:
        note()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, noted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
