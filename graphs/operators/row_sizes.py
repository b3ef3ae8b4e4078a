"""Sizes in a traced graph that depend on rows picked by data become operators that ask for them.

A segment is traced twice, with other stand-ins for the counts (`mipipe.graphs.tracing.dynamic_rows`). What differs
between the traces is matched with a multiple of one count, or of the sum of counts of several masks in a row (rows
concatenated over experts, and where each part begins); if none fits, with such a sum and a constant (rows beside fixed
ones). What fits two of them is refused.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from mipipe.graphs.errors import GraphError

_ADVICE = "pad to a fixed number, or weigh rows by the mask instead of picking them"


def restore_sizes(graph: fx.Graph, other: fx.Graph) -> None:
    """Replace stand-ins in ``graph`` by operators that ask for the count; ``other`` is its trace with the second ones.

    Raises:
        GraphError: a size is none of the forms above, or of two of them.
    """
    picks = [node for node in graph.nodes if node.target is torch.ops.mipipe.nonzero.default]
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    if len(graph.nodes) != len(other.nodes) or any(str(a.target) != str(b.target) for a, b in pairs
                                                   if a.op == "call_function"):
        raise GraphError(f"its operators differ with the number of rows that a mask picks; {_ADVICE}")

    def size(node: fx.Node, first: Any, second: Any) -> fx.Node:
        found = matched(picks, first, second) if type(first) is int and type(second) is int else None
        if found is None:
            raise GraphError(f"{node.target} has an argument that depends on the rows that masks pick, and is no"
                             f" multiple or sum of their numbers; {_ADVICE}")
        with graph.inserting_before(node):
            made = graph.call_function(torch.ops.mipipe.row_count.default, found)
        made.meta.update(val=first)
        return made

    def merged(node: fx.Node, first: Any, second: Any) -> Any:
        if isinstance(first, (tuple, list)):
            return type(first)(merged(node, *pair) for pair in zip(first, second, strict=True))
        if isinstance(first, fx.Node) or first == second or first is second:
            return first
        return size(node, first, second)

    for node, twin in pairs:
        if node.op == "call_function" and node.target not in (operator.getitem, torch.ops.mipipe.nonzero.default):
            node.args = merged(node, tuple(node.args), tuple(twin.args))
            node.kwargs = {key: merged(node, item, twin.kwargs[key]) for key, item in node.kwargs.items()}


def matched(picks: Sequence[fx.Node], first: int, second: int) -> tuple[list[fx.Node], int, int] | None:
    """The rows, factor and constant that give ``first`` in one trace and ``second`` in the other; None: none, or two.

    Args:
        picks: nodes that pick rows, in graph order, with their two stand-ins as second and third argument.
        first, second: sizes in the two traces.
    """
    found: list[tuple[list[fx.Node], int, int]] = []
    for rows in _runs(picks):
        ones, twos = (sum(item.args[place] for item in rows) for place in (1, 2))  # type: ignore[misc]
        factor, rest = divmod(second - first, twos - ones)
        if not rest and factor and (factor == 1 or first == factor * ones):
            found.append((rows, factor, first - factor * ones))
    whole = [item for item in found if not item[2]]
    chosen = whole or found
    return chosen[0] if len(chosen) == 1 else None


def _runs(picks: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """One pick, or several in a row: those with the same stand-ins have the same count and are one."""
    unique = list({pick.args[1:]: pick for pick in reversed(picks)}.values())[::-1]
    for start, end in itertools.combinations(range(len(unique) + 1), 2):
        yield unique[start:end]
