"""The exceptions of mipipe: one small tree, each with the exit code the command line ends with.

A message is one line that says where, what was found, what was expected, and what to do.
"""

from __future__ import annotations


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
