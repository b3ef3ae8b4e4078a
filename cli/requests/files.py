"""Opening what a verb is given: one file of one of several formats, told apart by its ``format`` key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import check_header, from_data, load_data
from mipipe.graphs.units import parse_bytes
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.from_csv import read_csv_problem


def open_any(path: Path, *kinds: Any) -> Any:
    """The content of a file whose format is one of ``kinds`` (dataclasses with ``FORMAT`` and ``VERSION``); a planning
    problem may be CSV.

    Raises:
        InputError: unreadable, no JSON, of a format that is not expected here, an unknown key or a wrong type.
    """
    if str(path).endswith(".csv") and PlanningProblem in kinds:
        return read_csv_problem(path)
    data = load_data(path)
    for kind in kinds:
        if data.get("format") == kind.FORMAT:
            check_header(data, kind.FORMAT, kind.VERSION, str(path))
            return from_data({key: item for key, item in data.items() if key not in ("format", "version")}, kind,
                             str(path))
    expected = " or ".join(repr(kind.FORMAT) for kind in kinds)
    raise InputError(f"{path}: found {data.get('format', 'no format at all')!r}, expected a file of format {expected}")


def check_positive(value: int | None, option: str) -> None:
    """Raise `InputError` unless a count is at least 1 (or not given)."""
    if value is not None and value < 1:
        raise InputError(f"{option} {value}: expected at least 1")


def read_size(text: str, option: str) -> int:
    """Bytes of an option such as ``80GB``, at least 1.

    Raises:
        InputError: no such size, or 0.
    """
    size = parse_bytes(text, option)
    if size < 1:
        raise InputError(f"{option} {text}: expected a size above 0, such as 80GB")
    return size
