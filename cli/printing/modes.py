"""Modes of blocks as a person reads them: what each computes, sends and keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mipipe.cli.printing.output import emit, stdout

if TYPE_CHECKING:
    from mipipe.graphs.operator_graph import OperatorGraph


def show_modes(graph: OperatorGraph, members: int, json_output: bool) -> None:
    """What each mode of each block computes, sends and keeps on teams of ``members``."""
    from mipipe.cli.printing.tables import print_rows
    from mipipe.graphs.coarse.mode_rows import LEGEND, mode_rows, undivided

    rows, whole = mode_rows(graph, members), undivided(graph, members)
    if json_output:
        emit({"kind": "modes", "model": graph.model, "members": members, "rows": rows, "whole": whole})
        return
    console = stdout()
    print_rows(console, rows, title=f"{graph.model} on teams of {members}")
    for line in whole:
        console.print(f"whole: {line}", soft_wrap=True)
    console.print(LEGEND, style="dim", soft_wrap=True)
