"""What ends a solve, for work of any depth: ``ask()`` raises once the time of the solve that runs it is over, and
`noting_ctrl_c` keeps a note of Ctrl-C.

A solve says once how much time is left (`watched`); loops over actions, placements, rules and rows ask now and then,
wherever they stand, without carrying a deadline through their arguments. Where no solve is watched (a test, a verb that
only simulates), asking does nothing. Threads start unwatched: what runs in one takes a ``stop`` of its own, or a copy
of the context of the solve (`contextvars.copy_context`), under whose clock it is then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")


LEAST_S = 0.05
"""Seconds of a solve or a MIP whose turn comes when none are left; none begins for less."""

STEPS = 4_096
"""Steps of a loop over actions between two looks at the clock: some hundredths of a second."""


class OutOfTimeError(Exception):
    """The time of the solve is over; the driver of the solve catches it and keeps the best plan."""


_LEFT: ContextVar[Callable[[], float] | None] = ContextVar("left", default=None)


@contextmanager
def watched(left: Callable[[], float] | None) -> Iterator[None]:
    """Let `ask` raise as soon as no seconds are left by ``left()``, or of what this is a part of; None: never, for what
    must be finished."""
    whole = _LEFT.get()
    token = _LEFT.set(left if left is None or whole is None else lambda: min(left(), whole()))
    try:
        yield
    finally:
        _LEFT.reset(token)


def ask() -> None:
    """Go on only while there is time.

    Raises:
        OutOfTimeError: the solve's time is over.
    """
    left = _LEFT.get()
    if left is not None and left() <= 0:
        raise OutOfTimeError


def asking(items: Iterable[Item], every: int = STEPS) -> Iterator[Item]:
    """The items, with a look at the clock at the first and after every so many."""
    for at, item in enumerate(items):
        if not at % every:
            ask()
        yield item


@contextmanager
def noting_ctrl_c(note: Callable[[], None]) -> Iterator[None]:
    """Call ``note`` at Ctrl-C beside raising it: a compiler's callback, or a solve inside, may swallow the exception,
    not the note; where one is in another, both are called. Nothing changes off the main thread, or where something else
    has the signal already."""
    usual = signal.getsignal(signal.SIGINT)
    free = usual is signal.default_int_handler or isinstance(usual, _Noted)
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _Noted(note, usual))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@dataclass(frozen=True, slots=True)
class _Noted:
    """A handler of SIGINT that calls ``note``, then what had the signal before, which raises in the end."""

    note: Callable[[], None]
    usual: Any

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.note()
        self.usual(number, frame)
