"""Regular expressions from people's files, with bounded work: one that tries without end is an error, not a hang.

A pattern such as ``(a+)+$`` takes time exponential in a name's length where it does not match (Davis et al., "The
Impact of Regular Expression Denial of Service in Practice", ESEC/FSE 2018). Python's matcher looks for signals now and
then; a timer of this process's own computing time raises one. Signals reach the main thread alone: elsewhere nothing
ends the matching.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mipipe.graphs.errors import InputError, shown

SECONDS = 2.0
"""Computing time of one pattern on one name; a pattern that means what it says takes microseconds."""


def check_expression(text: str, where: str) -> re.Pattern[str]:
    """The compiled expression.

    Raises:
        InputError: it is none; the message begins with ``where``.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: {shown(text)} is no regular expression: {error}") from None


def search(text: str, name: str) -> re.Match[str] | None:
    """Where a pattern is found in a name, as `re.search` does.

    Raises:
        InputError: the pattern tries too many ways.
    """
    with _bounded(text, name):
        return re.search(text, name)


def substitute(text: str, target: str, name: str, count: int = 0) -> str:
    """A name with what a pattern finds replaced, as `re.sub` does.

    Raises:
        InputError: the pattern tries too many ways.
    """
    with _bounded(text, name):
        return re.sub(text, target, name, count=count)


@contextmanager
def _bounded(text: str, name: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _expired)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    except _TooLongError:
        raise InputError(f"{shown(text)} takes more than {SECONDS:g} s to look for in {shown(name)}; a repetition"
                         " within a repetition, such as (a+)+, tries every way to divide a name: write it with one"
                         ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


class _TooLongError(Exception):
    """The timer ran out."""


def _expired(number: int, frame: FrameType | None) -> None:
    raise _TooLongError
