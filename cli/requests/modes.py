"""Modes on the command line: which to find out, on teams of which sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mipipe.graphs.errors import InputError
from mipipe.graphs.modes import MODES

if TYPE_CHECKING:
    from mipipe.graphs.operator_graph import OperatorGraph

MOST_MEMBERS = 1024


def parse_modes(modes: str | None, team: str | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """``--modes tensor,sequence --team 2,4`` as names and sizes; empty where neither is given.

    Raises:
        InputError: one without the other, an unknown mode, or a size that is none.
    """
    if modes is None and team is None:
        return (), ()
    if modes is None or team is None:
        given, other = ("--team", "--modes tensor,sequence") if modes is None else ("--modes", "--team 4")
        raise InputError(f"{given} needs {other} beside it: a mode is found out for teams of a size")
    names = tuple(dict.fromkeys(part.strip() for part in modes.split(",")))
    wrong = next((name for name in names if name not in MODES), None)
    if wrong is not None:
        raise InputError(f"--modes {modes}: {wrong!r} is no mode; expected some of {', '.join(MODES)}")
    sizes = tuple(dict.fromkeys(part.strip() for part in team.split(",")))
    for size in sizes:
        if not size.isascii() or not size.isdecimal() or not 2 <= int(size[:9]) <= MOST_MEMBERS:
            raise InputError(f"--team {team}: found {size!r}, expected numbers of members from 2 to {MOST_MEMBERS}")
    return names, tuple(map(int, sizes))


def captured_graph(source: str, asked: bool) -> OperatorGraph | None:
    """The graph that a file named as the source of a capture holds, to which modes are added; None for models.

    Raises:
        InputError: it is a graph, and no modes were asked for.
    """
    path = Path(source)
    if not source.endswith(".json") or path.name == "config.json" or not path.is_file():
        return None
    from mipipe.cli.requests.files import open_any
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.serialize import load_data

    if load_data(path, foreign=True).get("format") != OperatorGraph.FORMAT:
        return None
    if not asked:
        raise InputError(f"{source}: is a captured graph already; give --modes and --team to add modes to it")
    graph: OperatorGraph = open_any(path, OperatorGraph)
    return graph
