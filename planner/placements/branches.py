"""Placements for models with encoders beside a trunk: multimodal models, and any graph whose branches join.

The trunk is the branch that ends the model (its loss or head); everything before it of other branches is an encoder, a
projector between them included. Untagged graphs are told apart by structure: what lies before the first join, except
the arm with the least work (usually the trunk's own embedding).

- ``apart``: the encoders, as a chain, on the first ranks; the trunk on the rest, as a chain or a V.
- ``colocated``: the trunk on all ranks, the encoders cut beside its first stages, forth or back; or whole on every
  rank (``+spread``), each microbatch where the load is lowest: then encoders fill the ranks that wait for the trunk.

How many ranks the encoders take is chosen by the load of the busiest rank: apart, among the counts near their share of
the work; colocated, among powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mipipe.planner.placements.cuts import Shape, fit_cuts, loads, place, place_spread, units
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem

KEPT = 2
"""Splits of the ranks proposed for each shape of the trunk: the one with the lightest busiest rank and the next."""


def encoders(problem: PlanningProblem) -> list[int]:
    """The encoders' groups in topological order; none where the model has one branch, or branches never join."""
    ahead = _ancestors(problem)
    branches = [group.tags.branch for group in problem.groups]
    trunk = branches[-1]
    if trunk is not None and len(set(branches) - {None}) > 1:
        others = [g for g, branch in enumerate(branches) if branch not in (None, trunk)]
        found = set(others).union(*(ahead[g] for g in others))
    else:
        found = _before_first_join(problem, ahead)
    chosen = sorted(found - {len(branches) - 1})
    split = [members for members in problem.colocate if 0 < len(found.intersection(members)) < len(members)]
    return [] if split or len(chosen) == len(branches) else chosen


def _ancestors(problem: PlanningProblem) -> list[set[int]]:
    """For every group the groups that come before it."""
    ahead: list[set[int]] = [set() for _ in problem.groups]
    for edge in sorted(problem.edges, key=lambda edge: edge.source):
        for target in edge.targets:
            ahead[target] |= ahead[edge.source] | {edge.source}
    return ahead


def _before_first_join(problem: PlanningProblem, ahead: Sequence[set[int]]) -> set[int]:
    """All arms that end at the first group where separate sources meet, but the one with the least work."""
    sources = [g for g in range(len(problem.groups)) if not ahead[g]]
    join = next((g for g in range(len(problem.groups)) if len(ahead[g].intersection(sources)) > 1), None)
    if join is None:
        return set()
    arms = [{source} | {g for g in ahead[join] if source in ahead[g]} for source in sources if source in ahead[join]]
    work = loads(problem)
    lightest = min(arms, key=lambda arm: sum(work[g][0] for g in arm))
    return ahead[join] - lightest


def branch_placements(problem: PlanningProblem, name: str = "free") -> Iterator[Placement]:
    """Placements of the shapes of this module that a placement option allows; none for a model without encoders."""
    chosen = encoders(problem)
    if not chosen or problem.num_ranks < 2:
        return
    if name in ("free", "apart"):
        yield from _apart(problem, chosen)
    if name in ("free", "colocated"):
        yield from _colocated(problem, chosen)


def _apart(problem: PlanningProblem, chosen: Sequence[int]) -> Iterator[Placement]:
    """Encoders on ranks of their own: the best splits for a trunk in a chain and in a V."""
    rest = [g for g in range(len(problem.groups)) if g not in set(chosen)]
    own, others = len(units(problem, chosen)), len(units(problem, rest))
    for turns in (1, 2):
        found: list[tuple[float, Placement]] = []
        for count in _near_share(problem, chosen):
            forth = tuple(range(count, problem.num_ranks))
            trunk = Shape("apart", forth + forth[::-1] if turns == 2 else forth)
            if count > own or trunk.num_stages > others:
                continue
            encoder = Shape("apart", tuple(range(count)))
            found.append(_joined(problem, encoder, fit_cuts(problem, encoder, chosen), trunk,
                                 fit_cuts(problem, trunk, rest)))
        yield from _lightest(found)


def _near_share(problem: PlanningProblem, chosen: Sequence[int]) -> list[int]:
    """Numbers of ranks near the encoders' share of the work."""
    work = loads(problem)
    share = sum(work[g][0] for g in chosen) / max(1, sum(row[0] for row in work)) * problem.num_ranks
    return [count for count in range(int(share) - 1, int(share) + 3) if 1 <= count < problem.num_ranks]


def _colocated(problem: PlanningProblem, chosen: Sequence[int]) -> Iterator[Placement]:
    """Encoders beside the trunk's first stages, and encoders on every rank."""
    ranks = problem.num_ranks
    rest = [g for g in range(len(problem.groups)) if g not in set(chosen)]
    own, others = len(units(problem, chosen)), len(units(problem, rest))
    forth = tuple(range(ranks))
    for trunk in (Shape("colocated", forth), Shape("colocated", forth + forth[::-1])):
        if trunk.num_stages > others:
            continue
        found: list[tuple[float, Placement]] = []
        for count in [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= min(ranks, own)]:
            for order in (forth[:count], forth[:count][::-1])[:1 if count == 1 else 2]:
                encoder = Shape("colocated", order)
                parts = fit_cuts(problem, encoder, chosen)
                beside = list(zip(order, parts, strict=True))
                found.append(_joined(problem, encoder, parts, trunk, fit_cuts(problem, trunk, rest, beside)))
        yield from _lightest(found)
        yield place_spread(problem, trunk, [], chosen)


def _joined(problem: PlanningProblem, encoder: Shape, encoder_parts: Sequence[Sequence[int]], trunk: Shape,
            trunk_parts: Sequence[Sequence[int]]) -> tuple[float, Placement]:
    """(load of the busiest rank, the placement) of encoders and trunk cut separately; empty stages are left out."""
    whole = Shape(trunk.name, encoder.rank_of + trunk.rank_of)
    parts = [*encoder_parts, *trunk_parts]
    work = loads(problem)
    load = [0.0] * problem.num_ranks
    for rank, part in zip(whole.rank_of, parts, strict=True):
        load[rank] += sum(work[g][rank] for g in part)
    return max(load), place(problem, whole, parts)


def _lightest(found: Sequence[tuple[float, Placement]]) -> Iterator[Placement]:
    """The placements whose busiest rank has least to do; fewer stages first among equals."""
    ordered = sorted(found, key=lambda item: (item[0], len(item[1].stages)))
    return (placement for _, placement in ordered[:KEPT])
