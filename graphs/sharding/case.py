"""One operator of a trace and how its arguments lie on the team; the ways to run it that rules offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.operator_graph import Operator, TensorSpec
from mipipe.graphs.operators.collectives import Sections
from mipipe.graphs.sharding.parts import WHOLE, Kind, Part, fits


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run an operator on a team.

    ``needs``: how the tensors must lie that it reads (those left out may lie in any way, only their shapes matter);
    ``gives``: how each result lies. ``share``: the part of the operator's flops that a member has. ``args``: new values
    of positional arguments, for sizes that are a member's own. ``program``: the name of a program of
    `mipipe.graphs.sharding.programs` that runs in the operator's place, with these collectives ``inside`` it (kinds,
    and bytes as `mipipe.graphs.modes.Collective` has them; not those of a few numbers).
    """

    needs: Mapping[str, Part]
    gives: tuple[Part, ...]
    share: float = 1.0
    args: Mapping[int, Any] = field(default_factory=dict)
    program: str = ""
    inside: tuple[tuple[CollectiveKind, int], ...] = ()

    @property
    def sent(self) -> float:
        """Bytes sent inside the program; an all-reduce counts twice."""
        return sum((2.0 if kind is CollectiveKind.ALL_REDUCE else 1.0) * size for kind, size in self.inside)


@dataclass(frozen=True)
class Case:
    """An operator, the specs and the present parts of what it reads, and the size of the team.

    ``scatter`` gives the division in which a sum over members of a certain shape had best arrive (sequence mode), if
    there is one, ``tokens`` that of the tokens that members send to experts; ``is_zero`` tells tensors made of zeros;
    ``goal`` is how the result is wanted in the end, if known; ``deferred``: see `Layouts`; ``blocks``: the
    sections into which the trace cuts dimensions of a length.
    """

    op: Operator
    specs: Mapping[str, TensorSpec]
    parts: Mapping[str, Part]
    size: int
    scatter: Callable[[tuple[int, ...]], Part | None]
    tokens: Callable[[tuple[int, ...]], Part | None]
    is_zero: Callable[[str], bool]
    goal: Part | None = None
    deferred: bool = False
    blocks: Callable[[int], Sequence[Sections]] = lambda length: ()

    def name(self, index: int) -> str | None:
        """The tensor at a positional argument; None where there is none."""
        if index >= len(self.op.args):
            return None
        value = self.op.args[index]
        return value["ref"] if isinstance(value, dict) and set(value) == {"ref"} else None

    def names(self, index: int) -> list[str | None]:
        """The tensors of a list argument."""
        return [item["ref"] if isinstance(item, dict) else None for item in self.op.args[index]]

    def value(self, index: int, default: Any = None) -> Any:
        """A positional argument that is no tensor."""
        return self.op.args[index] if index < len(self.op.args) else default

    def shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of the (first) result."""
        return self.op.outputs[0].shape

    def divisions(self, *names: str | None) -> list[Part]:
        """The distinct divisions that some of these tensors have."""
        found = [self.parts[name] for name in names if name is not None and self.parts[name].kind is Kind.DIVIDED]
        return list(dict.fromkeys(found))

    def fits(self, name: str, part: Part) -> bool:
        return fits(self.shape(name), part, self.size)

    def choice(self, needs: Mapping[Any, Part], *gives: Part, **details: Any) -> Choice | None:
        """A choice, unless some tensor does not divide so; ``needs`` by names, of which None are dropped."""
        wanted = {name: part for name, part in needs.items() if name is not None}
        if not all(self.fits(name, part) for name, part in wanted.items()):
            return None
        outputs = self.op.outputs  # fewer than ``gives`` where an operator leaves out results: all lie as the first
        if not all(fits(spec.shape, part, self.size) for spec, part in zip(outputs, gives, strict=False)
                   if len(outputs) == len(gives)):
            return None
        return Choice(wanted, gives, **details)

    def whole(self) -> Choice:
        """Every member runs the operator as it is."""
        return Choice(dict.fromkeys(self.op.inputs, WHOLE), (WHOLE,) * len(self.op.outputs))


def positive(dim: int, dims: int) -> int:
    """A dimension counted from the front."""
    return dim + dims if dim < 0 else dim
