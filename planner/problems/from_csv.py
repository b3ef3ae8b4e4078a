"""A planning problem as CSV: lines of settings that begin with ``#``, then one row for each group.

::

    # devices: 4
    # microbatches: 8
    # memory: 80GB
    # bandwidth: 50GB/s
    # latency: 5us
    group,f,i,w,resident,gradient,saved_fi,saved_fw,saved_iw,workspace,output,reads
    embed,1ms,,1ms,2GB,500MB,,10MB,,,16MB,
    layer 0,2ms,2ms,1ms,2GB,500MB,40MB,20MB,,8MB,16MB,embed

Devices are equal, on one host. Durations and sizes have units; an empty cell is 0, of ``i`` and ``w`` a phase that the
group does not have. ``output`` is the value that the group makes of a microbatch; ``reads`` names the groups, divided
by ``;``, whose values it takes: empty is the row above, ``-`` none. Gradients are as large as values, and flow to
groups that have I or W. What a CSV does not say (loads, several device kinds, colocated groups) JSON does.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.serialize import read_text
from mipipe.graphs.topology import Topology
from mipipe.graphs.units import parse_bytes, parse_ns, parse_rate
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem

SETTINGS = ("devices", "microbatches", "memory", "bandwidth", "latency")
SIZES = ("resident", "gradient", "saved_fi", "saved_fw", "saved_iw", "workspace")
COLUMNS = ("group", "f", "i", "w", *SIZES, "output", "reads")
KIND = "device"


def read_csv_problem(path: Path) -> PlanningProblem:
    """The problem of a file.

    Raises:
        InputError: a setting or column is missing, unknown or given twice, or a cell is not what it should be.
        ProblemError: the rows make no problem.
    """
    settings: dict[str, str] = {}
    rows: list[tuple[int, str]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.startswith("#"):
            name, _, value = (part.strip() for part in line[1:].partition(":"))
            if name not in SETTINGS or name in settings:
                raise InputError(f"{path}, line {number}: found {shown(name)}, expected each of"
                                 f" {', '.join(SETTINGS)} once, as in '# devices: 4'")
            settings[name] = value
        elif line.strip():
            rows.append((number, line))
    header = _cells(path, *rows[0]) if rows else []
    wrong = [name for name in header if name not in COLUMNS or header.count(name) > 1]
    if wrong or "group" not in header or "f" not in header:
        raise InputError(f"{path}: found the columns {shown(','.join(header))}, expected group and f, and of"
                         f" {', '.join(COLUMNS[2:])} any, each once")
    cells = []
    for number, line in rows[1:]:
        found = _cells(path, number, line)
        if len(found) != len(header):
            raise InputError(f"{path}, line {number}: has {len(found)} cells, expected {len(header)}")
        cells.append((f"{path}, line {number}", dict(zip(header, found, strict=True))))
    groups = tuple(_group(where, row) for where, row in cells)
    named: set[str] = set()
    for (where, _), group in zip(cells, groups, strict=True):
        if group.name in named:
            raise InputError(f"{where}: two groups are named {shown(group.name)}; expected a name of its own for each")
        named.add(group.name)
    return PlanningProblem(path.stem, groups, tuple(_edges(cells, groups)), _topology(path, settings),
                           _count(path, settings, "microbatches"))


def _cells(path: Path, number: int, line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], strict=True))]
    except csv.Error as error:
        raise InputError(f"{path}, line {number}: {error}; expected cells divided by commas") from None


def _group(where: str, row: Mapping[str, str]) -> Group:
    f, i, w = ((parse_ns(row[phase], f"{where}, {phase}") if row.get(phase) else None) for phase in ("f", "i", "w"))
    if f is None or not row["group"]:
        raise InputError(f"{where}: has no {'name' if f is not None else 'f'}; expected a group's name and the duration"
                         " of its forward, such as 2ms")
    sizes: dict[str, Any] = {f"{name}_bytes": _size(where, row, name) for name in SIZES}
    return Group(row["group"], {KIND: PhaseTimes(f, i, w)}, **sizes)


def _size(where: str, row: Mapping[str, str], column: str) -> int:
    return parse_bytes(row[column], f"{where}, {column}") if row.get(column) else 0


def _edges(cells: list[tuple[str, dict[str, str]]], groups: tuple[Group, ...]) -> list[GroupEdge]:
    """One value for each group that others read."""
    number_of = {group.name: number for number, group in enumerate(groups)}
    readers: dict[int, list[int]] = {}
    for number, (where, row) in enumerate(cells):
        reads = row.get("reads", "")
        if not reads and number:
            readers.setdefault(number - 1, []).append(number)
        for name in map(str.strip, reads.split(";") if reads not in ("", "-") else ()):
            if name not in number_of or number_of[name] >= number:
                raise InputError(f"{where}, reads: found {shown(name)}, expected names of groups in rows above, divided"
                                 " by ;")
            readers.setdefault(number_of[name], []).append(number)
    found = []
    for source, targets in sorted(readers.items()):
        where, row = cells[source]
        times, size = groups[source].times[KIND], _size(where, row, "output")
        back = None if times.i_ns is None and times.w_ns is None else size
        found.append(GroupEdge(source, tuple(dict.fromkeys(targets)), size, back, f"output of {groups[source].name}"))
    return found


def _topology(path: Path, settings: Mapping[str, str]) -> Topology:
    memory = parse_bytes(settings["memory"], f"{path}, memory") if "memory" in settings else None
    rate = parse_rate(settings["bandwidth"], f"{path}, bandwidth") if "bandwidth" in settings else None
    latency = parse_ns(settings["latency"], f"{path}, latency") if "latency" in settings else 0
    own: dict[str, Any] = {} if memory is None else {"memory_bytes": memory}
    return Topology.uniform(_count(path, settings, "devices"), latency_ns=latency, bytes_per_s=rate, kind=KIND, **own)


def _count(path: Path, settings: Mapping[str, str], name: str) -> int:
    text = settings.get(name, "")
    if not text.isascii() or not text.isdecimal() or not 1 <= len(text) <= 6 or int(text) < 1:
        raise InputError(f"{path}: found {shown(text)} {name}, expected a line such as '# {name}: 4'")
    return int(text)
