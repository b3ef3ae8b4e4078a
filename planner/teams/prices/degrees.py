"""The degrees of a run: how many devices share what, and how much of a step one microbatch is.

Devices are numbered in the order of the mesh, the fastest axis first: tensor, context, copies, ranks. Members of a
tensor group are neighbours, the ranks of one pipeline furthest apart. Experts are divided over the devices of one rank
of all copies (``tensor * context * copies`` of them), neighbours first, whatever the other degrees are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from mipipe.graphs.costs.trace_facts import TeamSplit
from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT

Recompute = Literal["none", "latents", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
KEYS = ("ranks", "tensor", "sequence", "context", "expert", "copies", "chunks", "zero")
"""What ``--degrees`` may fix. ``sequence=8`` is ``tensor=8`` with activations between blocks divided as well."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """A run's degrees. ``microbatch`` counts sequences of one copy; ``chunks`` are stages per rank.

    ``zero``: what devices that hold the same (``alike``) divide among them: nothing (0), optimizer state (1), gradients
    too (2), parameters too (3).
    ``recompute``: what runs again in the backward: nothing, the up-projections of latents (``latents``), attention
    (``selective``), whole layers (``full``). ``batch_branches``: those that a search gives the mode ``batch`` along the
    tensor axis, where it may choose (`ModelPieces.encoders`).
    """

    __pydantic_config__: ClassVar = STRICT
    ranks: int = 1
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    expert: int = 1
    copies: int = 1
    chunks: int = 1
    microbatch: int = 1
    zero: int = 1
    recompute: Recompute = "none"
    batch_branches: tuple[str, ...] = ()

    @property
    def team(self) -> int:
        """Devices of a plan rank."""
        return self.tensor * self.context

    @property
    def devices(self) -> int:
        return self.ranks * self.team * self.copies

    @property
    def split(self) -> TeamSplit:
        return TeamSplit(self.tensor, self.context, self.expert, self.sequence)

    @property
    def division(self) -> tuple[TeamSplit, tuple[str, ...]]:
        """How the members of a team divide all branches' work."""
        return self.split, self.batch_branches

    @property
    def alike(self) -> int:
        """How many devices hold the same parameters, but experts: copies, and in all of them the members along the
        context axis."""
        return self.context * self.copies

    @property
    def alike_experts(self) -> int:
        """How many devices hold the same experts: where these are divided as all else is, or not, as many as of it."""
        return self.team * self.copies // self.expert if self.expert > 1 else self.alike

    def text(self) -> str:
        """As ``--degrees`` takes it; axes of size 1 are left out, ranks and copies never."""
        parts = [("ranks", self.ranks), ("sequence" if self.sequence else "tensor", self.tensor),
                 ("context", self.context), ("expert", self.expert), ("copies", self.copies), ("chunks", self.chunks)]
        return ",".join(f"{name}={size}" for name, size in parts if size > 1 or name in ("ranks", "copies"))


def parse_degrees(text: str) -> dict[str, int]:
    """``"tensor=8,ranks=4"`` as a mapping.

    Raises:
        InputError: an unknown name, no number, both ``tensor`` and ``sequence``.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in KEYS:
            raise InputError(f"--degrees {part.strip()}: expected name=number with a name of {', '.join(KEYS)}, such as"
                             " tensor=8,ranks=4,copies=2")
        least = least_of(name)
        if not value.isdecimal() or len(value) > 6 or int(value) < least or (name == "zero" and int(value) > 3):
            raise InputError(f"--degrees {part.strip()}: expected a number from {least}"
                             + (" to 3" if name == "zero" else ""))
        if name in found:
            raise InputError(f"--degrees: {name} is given twice")
        found[name] = int(value)
    if "tensor" in found and "sequence" in found:
        raise InputError("--degrees: tensor and sequence are one axis; sequence=8 divides what tensor=8 divides, and"
                         " the activations between blocks too")
    return found


def least_of(name: str) -> int:
    """The least that a degree can be."""
    return 0 if name == "zero" else 1


def check_given(given: Mapping[str, int], devices: int) -> None:
    """Raise `InputError` where what is fixed already cannot be part of so many devices."""
    sizes = {name: given[name] for name in ("ranks", "tensor", "sequence", "context", "copies") if name in given}
    used = math.prod(sizes.values())
    if devices % used:
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"--degrees: {shown} = {used} devices, which does not divide the {devices} there are")


def completed(given: Mapping[str, int], devices: int, microbatch: int, recompute: Recompute) -> Degrees:
    """The degrees that were given, with copies as the devices allow and 1 for all others.

    Raises:
        InputError: they do not multiply to the devices.
    """
    sizes = {name: given.get(name, 1) for name in ("ranks", "context", "chunks")}
    sizes["tensor"] = given.get("tensor", given.get("sequence", 1))
    used = sizes["ranks"] * sizes["tensor"] * sizes["context"]
    copies = given.get("copies", max(1, devices // used))
    if used * copies != devices:
        shown = " x ".join(f"{name} {size}" for name, size in (
            ("ranks", sizes["ranks"]), ("tensor", sizes["tensor"]), ("context", sizes["context"]), ("copies", copies))
            if size > 1 or name == "ranks")
        fits = devices // used if devices % used == 0 else None
        raise InputError(f"--degrees: {shown} = {used * copies} devices, but there are {devices}; "
                         + (f"copies={fits} would use them all" if fits else
                            f"ranks x tensor x context = {used} does not divide {devices}"))
    return Degrees(sizes["ranks"], sizes["tensor"], "sequence" in given and sizes["tensor"] > 1, sizes["context"],
                   given.get("expert", 1), copies, sizes["chunks"], microbatch, given.get("zero", 1), recompute)
