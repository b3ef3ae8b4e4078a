"""Options that a command line gives, whatever their defaults: one that would have no effect is refused."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from typer.core import TyperCommand

from mipipe.graphs.errors import InputError

_RUNNING: ContextVar[Any] = ContextVar("running", default=None)
"""The context of the verb that runs; None where one is called as a function."""


class NotingCommand(TyperCommand):
    """A verb whose options `given` can tell."""

    def invoke(self, ctx: Any) -> Any:
        token = _RUNNING.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _RUNNING.reset(token)


def given(names: Iterable[str]) -> list[str]:
    """Those of the running verb's parameters that are on the command line, as options are written there."""
    context = _RUNNING.get()
    if context is None:
        return []
    found = {param.name: max(param.opts, key=len) for param in context.command.params}
    return [found[name] for name in names
            if name in found and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def refuse(names: Iterable[str], why: str) -> None:
    """Raise `InputError` for the first of these parameters that is given: ``--held``, and ``why`` it has no effect."""
    for option in given(names):
        raise InputError(f"{option} {why}")
