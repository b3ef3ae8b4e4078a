"""Tables for people: rows of named cells as a rich table, numbers aligned to the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]], title: str | None = None,
               styles: Sequence[str] = ()) -> None:
    """Print rows that share their keys; a missing value is an empty cell, floats get four digits."""
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        numeric = all(not isinstance(row.get(name), str) or row[name][:1] in "0123456789" for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*(cell(row.get(name)) for name in rows[0]), style=styles[number] if styles else None)
    if title:
        console.print(title, style="italic")
    before = console.width
    console.width = 1000  # a cell cut short would be worse than a long line
    console.width = max(before, Measurement.get(console, console.options, table).maximum)
    console.print(table)
    console.width = before


def cell(value: Any) -> str:
    """A value as text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 100000 else str(value)
