"""Tables of published measurements: CSV files whose cells are text, and the numbers in them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError

Row = Mapping[str, str]
"""A row's cells by the names of their columns, without spaces around them; "" where there is nothing."""


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that has these columns; a cell that a row lacks is empty.

    Raises:
        InputError: no such file, no text, no row, or a column is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [{name: (value or "").strip() for name, value in row.items() if isinstance(name, str) and not
                     isinstance(value, list)} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: {told}; expected a CSV file in UTF-8") from None
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"{path}: no {'column ' + repr(missing[0]) if rows else 'rows'}; expected the columns"
                         f" {', '.join(columns)}")
    return rows


def number(row: Row, name: str) -> float:
    """The number in a cell.

    Raises:
        InputError: there is none above 0.
    """
    try:
        found = float(row[name])
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise InputError(f"{name}: found {row[name]!r}, expected a number above 0")
    return found


def measured(row: Row, name: str) -> float | None:
    """The number in a cell; None where the cell is empty or says that there is none."""
    return None if row[name].lower() in NOTHING else number(row, name)


NOTHING = ("", "-", "n/a", "na", "none", "not stated")
"""What cells say that have no number (in lower case)."""


def whole(row: Row, name: str) -> int:
    """The whole number in a cell.

    Raises:
        InputError: there is none of at least 1.
    """
    found = stated(row, name)
    if found is None:
        raise InputError(f"{name}: found {row[name]!r}, expected a whole number of at least 1")
    return found


def stated(row: Row, name: str) -> int | None:
    """A whole number where the cell has one; None where it says something else or nothing (``n/a``, ``not stated``).

    Raises:
        InputError: the number is below 1.
    """
    text = row[name].removesuffix(".0")
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        return None
    if int(text) < 1:
        raise InputError(f"{name}: found {row[name]!r}, expected a whole number of at least 1")
    return int(text)


def listed(row: Row, name: str) -> list[Any]:
    """The list that a cell has as JSON; empty where there is none."""
    try:
        found = json.loads(row[name])
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def whole_numbers(row: Row, name: str) -> list[int]:
    """The list of whole numbers in a cell.

    Raises:
        InputError: there is no list of numbers of at least 1.
    """
    found = listed(row, name)
    if not found or not all(type(item) is int and 0 < item < 10**6 for item in found):
        raise InputError(f"{name}: found {row[name]!r}, expected a list of whole numbers of at least 1")
    return found
