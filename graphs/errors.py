"""The exceptions of mipipe: one small tree, each with the exit code the command line ends with.

A message is one line that says where, what was found, what was expected, and what to do.
"""

from __future__ import annotations

import unicodedata

SHOWN = 100
"""How many characters of a value that somebody gave are echoed in an error."""


def shown(value: object, quoted: bool = True, most: int = SHOWN) -> str:
    """A value as an error echoes it: as Python writes it (or the bare text), in one line, cut."""
    if isinstance(value, str):
        text = repr(value[:most + 1]) if quoted else value[:4 * most]
        long = len(value) > most
    elif isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write very large ones
        return f"{'-' if value < 0 else ''}(a number of {value.bit_length()} bits)"
    elif isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    else:
        text = repr(value) if quoted else str(value)
        long = len(text) > most
    text = printable(text)
    return text if not long and len(text) <= most + 2 else text[:most] + "..."


def printable(text: str) -> str:
    """Text in one line, safe for a terminal: control characters, line ends and lone surrogates are written out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if unicodedata.category(letter)[0] != "C" and letter not in "\u2028\u2029"
                   else " " if letter in "\n\r\t" else letter.encode("unicode_escape").decode() for letter in text)


class MipipeError(Exception):
    """The base of every error a user can cause. ``exit_code`` is the process's status when it reaches the top."""

    exit_code = 1


class InputError(MipipeError):
    """A file or option is wrong: unreadable, foreign, unknown keys, a value out of range."""


class GraphError(MipipeError):
    """An operator graph is inconsistent, or a model cannot be captured."""


class ProblemError(MipipeError):
    """A planning problem is inconsistent: a cyclic graph, a missing cost, zero microbatches."""


class InfeasibleError(MipipeError):
    """No plan exists. The message gives the reason and the smallest change that would help."""

    exit_code = 3


class RunError(MipipeError):
    """A run under torchrun failed."""

    exit_code = 4


class StoppedError(MipipeError):
    """A run was asked to end (SIGTERM) and did so between two steps, with what was done saved."""

    exit_code = 130


class BatchError(RunError):
    """A batch cannot be trained on: short, of another shape, without labels. Nothing has changed; every rank of every
    copy of the plan knows."""


class DataEnd(BatchError):
    """A copy's loader gives no next batch: it has ended, or cannot read on. No batch is passed over for it, on any
    copy."""


def tells_all(error: BaseException | None) -> bool:
    """Whether an error's message is meant for people, and no traceback adds to it: neither it nor what made a run fail
    came from outside."""
    while isinstance(error, RunError):
        error = error.__cause__
    return error is None or isinstance(error, MipipeError)


class PlanError(MipipeError):
    """A plan violates a rule: an action missing or twice, an order that deadlocks, memory above the cap."""

    exit_code = 5


class ProgramError(PlanError):
    """A lowered program violates a rule: a receive without its send, a buffer freed twice, a deadlock."""


class TimelineError(MipipeError):
    """A timeline is inconsistent: a span that ends before it starts, spans that overlap on one stream."""


class TimeUpError(MipipeError):
    """The time limit passed before any plan was found."""

    exit_code = 6
