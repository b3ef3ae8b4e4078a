"""Degrees as the `Team` of a plan: what the runtime is to do, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence

from mipipe.graphs.costs.trace_facts import heads_of
from mipipe.graphs.exchange import exchanges
from mipipe.graphs.operator_graph import OperatorGraph, Role
from mipipe.planner.plan import Plan
from mipipe.planner.team import Team, TeamMode
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.pieces import ModelPieces


def branches_of(graph: OperatorGraph) -> list[str]:
    """The branches that have layers: one for a plain language model."""
    return sorted({segment.tags.branch or "" for segment in graph.segments if segment.tags.layer is not None})


def team_of(model: ModelPieces, degrees: Degrees, kind: str, recompute: Sequence[Recompute] = ()) -> Team:
    """The team of a model's plan on devices of a kind.

    Experts to which tokens travel follow `Team.expert` alone; else those of a team with a tensor axis are divided along
    it. ``recompute``: of every piece; empty: the degrees' for all layers.
    """
    graph = model.graph
    axes = {name: size for name, size in (("context", degrees.context), ("tensor", degrees.tensor)) if size > 1}
    modes = [TeamMode("tensor", "sequence")] if degrees.sequence and degrees.tensor > 1 else []
    modes += [TeamMode("tensor", mode, tuple(item.name for item in graph.segments if item.tags.branch == branch))
              for branch, mode in model.own_modes(degrees).items()]
    experts = tuple(segment.name for segment in graph.segments if segment.tags.role is Role.EXPERTS)
    if degrees.expert > 1 and degrees.tensor > 1 and experts and not exchanges(graph):
        modes.append(TeamMode("tensor", "expert", experts))
    ways = recompute or [degrees.recompute if piece.layer is not None else "none" for piece in model.pieces]
    again = tuple(tuple(graph.segments[member].name for member in piece.members)
                  for piece, way in zip(model.pieces, ways, strict=True) if way == "full")
    attention = tuple(graph.segments[member].name for piece, way in zip(model.pieces, ways, strict=True)
                      for member in piece.members if way == "selective" and heads_of(model.index.traces[member]))
    latents = tuple(graph.segments[member].name for piece, way in zip(model.pieces, ways, strict=True)
                    for member in piece.members if way == "latents" and member in model.latents)
    return Team(axes, degrees.copies, tuple(modes), kind, degrees.microbatch, degrees.expert, degrees.zero, again,
                attention, latents)


def degrees_of(plan: Plan, copies: int | None = None) -> Degrees:
    """The degrees of a plan, with one chunk; of one of single devices, too. ``copies``: of it that run; None: those it
    was made for."""
    team = plan.team if plan.team is not None else Team({})
    sequence = any(item.mode == "sequence" and not item.segments for item in team.modes)
    return Degrees(plan.problem.num_ranks, team.axes.get("tensor", 1), sequence, team.axes.get("context", 1),
                   team.expert, team.copies if copies is None else copies, microbatch=max(1, team.microbatch),
                   zero=team.zero)
