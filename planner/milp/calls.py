"""The ledger of HiGHS's calls in a solve: how many, how long, how many nodes, by formulation.

`mipipe.planner.milp.highs` notes every call in the ledger that is open where it runs (`counting`); ledgers may nest,
and a call counts in all of them. A thread of a pool starts without one: what calls HiGHS there runs in a copy of the
solve's context (``pool.submit(contextvars.copy_context().run, ...)``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar

from mipipe.graphs.serialize import STRICT


@dataclass(frozen=True, slots=True)
class SolverCalls:
    """HiGHS's calls for one formulation: their number, wall-clock seconds and nodes of branch and bound."""

    __pydantic_config__: ClassVar = STRICT
    formulation: str
    calls: int
    seconds: float
    nodes: int


@dataclass(slots=True)
class Ledger:
    """The calls of a solve, in the order in which formulations were first used. Threads may add at the same time."""

    outer: Ledger | None = None
    found: dict[str, SolverCalls] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, formulation: str, seconds: float, nodes: int) -> None:
        """Count a call here and in the ledgers around this one."""
        with self.lock:
            known = self.found.get(formulation, SolverCalls(formulation, 0, 0.0, 0))
            self.found[formulation] = SolverCalls(formulation, known.calls + 1, known.seconds + seconds,
                                                  known.nodes + nodes)
        if self.outer is not None:
            self.outer.add(formulation, seconds, nodes)

    def rows(self) -> tuple[SolverCalls, ...]:
        """The calls so far, a row for each formulation."""
        with self.lock:
            return tuple(self.found.values())


_OPEN: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def counting() -> Iterator[Ledger]:
    """Open a ledger for the calls made meanwhile."""
    ledger = Ledger(_OPEN.get())
    token = _OPEN.set(ledger)
    try:
        yield ledger
    finally:
        _OPEN.reset(token)


def note(formulation: str, seconds: float, nodes: int) -> None:
    """Count a call, if a ledger is open."""
    ledger = _OPEN.get()
    if ledger is not None:
        ledger.add(formulation, seconds, nodes)
