"""Branches with a mode of their own along the tensor axis: which may have it, and which a search gives it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mipipe.graphs.coarse.graph_index import GraphIndex
from mipipe.graphs.coarse.totals import TOKENS
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph


def encoders_of(graph: OperatorGraph, index: GraphIndex) -> tuple[str, ...]:
    """The branches that encode something else than tokens for others: they have layers, read neither tokens nor what
    another branch makes, and another branch reads them."""
    found = {segment.tags.branch for segment in graph.segments if segment.tags.layer is not None}
    read = set[str | None]()
    for segment in graph.segments:
        for name in segment.inputs:
            source, own = index.source[name], segment.tags.branch
            other = own if source < 0 else graph.segments[source].tags.branch
            if name in TOKENS or other != own:
                found.discard(own)
            if other != own:
                read.add(other)
    return tuple(sorted(branch for branch in found & read if branch is not None))


def together(graph: OperatorGraph, branches: Collection[str]) -> str | None:
    """The first segment of these branches (by name) that looks at several samples at once, so that members cannot have
    samples each; None where there is none."""
    from mipipe.graphs.sharding.samples import samples_together  # torch

    return samples_together(graph, branches) if branches else None


def check_modes(graph: OperatorGraph, modes: Mapping[str, str]) -> None:
    """Raise `InputError` where members cannot have samples each of a branch in ``batch`` mode."""
    apart = [branch for branch, mode in modes.items() if mode == "batch"]
    found = together(graph, apart)
    if found is not None:
        raise InputError(f"--modes {','.join(f'{branch}=batch' for branch in apart)}: {found} looks at several"
                         " samples at once, so that members cannot have samples each; leave its branch out")
