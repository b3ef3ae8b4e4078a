"""Values and their files: what every function of the face takes is the value itself or the path of its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from mipipe.graphs.cluster import Cluster
    from mipipe.graphs.serialize import Saved

T = TypeVar("T")
PathLike = str | Path


@overload
def load(path: PathLike) -> Any: ...
@overload
def load(path: PathLike, kind: type[T]) -> T: ...


def load(path: PathLike, kind: Any = None) -> Any:
    """What a file of mipipe's holds: a graph, costs, a problem, a plan, a program or a timeline.

    ``kind`` (such as ``mipipe.Plan``) is what is expected; None takes any of them.

    Raises:
        InputError: unreadable, or another kind of file.
    """
    from mipipe.cli.requests.files import open_any
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.planner.plan import Plan
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.program import Program
    from mipipe.planner.timeline import Timeline

    kinds = (OperatorGraph, CoarseGraph, CostTable, PlanningProblem, Plan, Program, Timeline)
    return open_any(Path(path), *(kinds if kind is None else (kind,)))


def save(value: Saved, path: PathLike) -> None:
    """Write a graph, costs, a problem, a plan, a program or a timeline to a file, whole or not at all."""
    from mipipe.graphs.serialize import save as write

    write(value, path)


def load_cluster(path: PathLike) -> Cluster:
    """The devices and links of a cluster file (YAML).

    Raises:
        InputError: unreadable, an unknown key, a wrong value.
    """
    from mipipe.graphs.cluster import load_cluster as read

    return read(path)


def value_of(item: T | PathLike, kind: type[T]) -> T:
    """The value, or what its file holds."""
    return load(item, kind) if isinstance(item, (str, Path)) else item


def size_of(text: int | str | None, where: str) -> int | None:
    from mipipe.graphs.units import parse_bytes

    if isinstance(text, int) and not isinstance(text, bool):  # integers of a program are bytes
        text = f"{text}B"
    return None if text is None else parse_bytes(text, where)
