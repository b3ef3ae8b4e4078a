"""Why `mipipe train` refuses a plan of teams for a graph: the plan's printout and the run say the same."""

from __future__ import annotations

from mipipe.graphs.coarse.totals import num_sequences
from mipipe.graphs.exchange import exchanges
from mipipe.graphs.named_code import is_named_code
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.planner.team import Team


def refusal(team: Team, graph: OperatorGraph, sequences: int | None = None) -> str | None:
    """The first reason, with what would do; None: such a plan runs, if the training configuration allows.

    ``sequences``: those of a microbatch that the graph will be captured with again (None: it stays as it is).
    """
    rows = num_sequences(graph)
    sequences = rows if sequences is None else sequences
    picking = picks_rows(graph) if team.members > 1 else None
    if picking is not None:
        return (f"its ranks are teams ({team.text()}), but segment {picking} picks rows by data, in which members"
                " would differ; capture the model with grouped experts, or plan with --degrees tensor=1,context=1")
    if team.microbatch not in (0, sequences):
        own = "batch" not in graph.source or is_named_code(str(graph.source.get("source")))
        again = f"example inputs of {team.microbatch}" if own else f"--batch {team.microbatch}"
        return (f"it has microbatches of {team.microbatch} sequence{'s' * (team.microbatch > 1)}, but the graph was"
                f" captured with {sequences}; capture it with {again} and plan that")
    if exchanges(graph):
        tokens = undivided_tokens(graph, team.members, sequences / rows)
        return None if tokens is None else (
            f"{tokens} tokens of a microbatch do not divide among the {team.members} members of its teams"
            f" ({team.text()}), each of which sends its part to the experts; plan with --degrees whose members divide"
            " them, or capture with another --batch or --seq")
    if team.expert > 1 and (team.expert != team.axes.get("tensor") or "context" in team.axes):
        return (f"it divides experts over {team.expert} devices, but of a graph captured without --expert-parallel"
                f" training divides them over the tensor axis of a team alone ({team.text()}); capture with"
                f" --expert-parallel {team.expert} and plan that graph, or plan with --degrees expert=1 or with"
                f" tensor={team.expert},expert={team.expert},context=1")
    return None


def picks_rows(graph: OperatorGraph) -> str | None:
    """The first segment (by name) that picks rows by data; None: none does."""
    from mipipe.graphs.sharding.member import has_dynamic_rows  # torch

    picking = {trace.digest for trace in graph.traces if has_dynamic_rows(trace)}
    return next((segment.name for segment in graph.segments if segment.trace in picking), None)


def undivided_tokens(graph: OperatorGraph, members: int, times: float = 1.0) -> int | None:
    """The tokens that a layer sends to its experts, ``times`` those of a microbatch as captured, where they do not
    divide among the members of a team; None where those of all layers do."""
    from mipipe.graphs.operators.expert_kernels import ROUTE  # torch
    from mipipe.graphs.sharding.steps import specs_of

    for trace in graph.traces if members > 1 else ():
        specs = specs_of(trace)
        for operator in trace.phase_operators(Phase.F):
            tokens = round(specs[operator.inputs[0]].shape[0] * times) if operator.kind == ROUTE else 0
            if tokens % members:
                return tokens
    return None
