"""The operators by which members of a team talk, as torch.compile calls them: from inside a compiled function.

`mipipe.graphs.operators.collectives` defines operators that name an axis, and whoever runs a program gives what they
do. torch.compile takes an operator of the dispatcher as it is, and looks into everything else; so a team's
implementations become operators of a library of their own, one for each engine, which ends with it. The compiler
reorders what does not depend on each other. It must not do that here: all members start their collectives in one order,
so those that talk are registered as having an effect, which keeps them in the order of the program.

While functions are compiled and rehearsed, nobody talks: members compile at their own pace, and a collective would have
to wait for the slowest.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.operators.collectives import SHAPED, SILENT
from mipipe.graphs.tracing.operator_kinds import resolve_operator

_NUMBERS = itertools.count()
"""Numbers of libraries: the same in every run, so that code that was compiled once is found again."""


def can_order() -> bool:
    """Whether this torch can keep operators in the order of the program."""
    return hasattr(torch.library.Library, "_register_effectful_op")


class TeamCalls:
    """``calls``: operators of the dispatcher by kind, which do what ``operators`` do."""

    def __init__(self, operators: Mapping[str, Callable[..., Tensor]]) -> None:
        self._quiet = False
        space = f"mipipe_team{next(_NUMBERS)}"
        self._library = torch.library.Library(space, "DEF")
        self.calls: dict[str, Callable[..., Any]] = {}
        for kind, function in operators.items():
            name = kind.split(".")[1]
            found: Any = resolve_operator(kind)
            schema = str(found._schema)
            self._library.define(name + schema[schema.index("("):])
            self._library.impl(name, self._called(function, SHAPED[name]), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{space}::{name}", SHAPED[name], lib=self._library)
            if name not in SILENT:
                self._library._register_effectful_op(f"{space}::{name}", torch.library.EffectType.ORDERED)
            self.calls[kind] = getattr(getattr(torch.ops, space), name).default

    def _called(self, function: Callable[..., Tensor], shaped: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What an operator does: contiguous, as the compiler was told."""
        def call(x: Tensor, *args: Any) -> Tensor:
            return shaped(x, *args).zero_() if self._quiet else function(x, *args).contiguous()

        return call

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nobody talks meanwhile: results are zeros."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
