"""Names of slices of parameters: ``layers.0.mlp.experts.down_proj[0:16]`` is rows 0 to 16 of an expert bank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

RowRange = tuple[int, int]
T = TypeVar("T")


def parse_slice(fqn: str) -> tuple[str, RowRange | None]:
    """The parameter that an FQN names and the rows of it: ``'a.b[0:16]'`` -> ``('a.b', (0, 16))``; None: all."""
    match = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", fqn)
    return (match[1], (int(match[2]), int(match[3]))) if match else (fqn, None)


def slice_tensor(named: Mapping[str, T], fqn: str) -> T:
    """The tensor of an FQN, cut to its rows if it names a slice; ``named`` has whole parameters (or the slice)."""
    base, rows = parse_slice(fqn)
    return named[fqn] if fqn in named or rows is None else named[base][rows[0]:rows[1]]  # type: ignore[index]
