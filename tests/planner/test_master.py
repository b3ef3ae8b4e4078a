"""The master MIP: right on what can be enumerated, cuts that bite, placements that hold what it says."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import pytest

from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.jobs.stages import view
from mipipe.planner.milp.placement import master
from mipipe.planner.placements import counts
from mipipe.planner.placements.counts import Chain, Cut
from mipipe.planner.placements.shapes import propose_shapes, resident_fits
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem


def small(**more: object) -> PlanningProblem:
    given = {"ranks": 2, "microbatches": 6, "f": 3, "i": 4, "w": 2, "comm": 1, "layers": 5, "copies": 2}
    return uniform_problem(**{**given, "activations": 3, **more})  # type: ignore[arg-type]


def all_cuts(chain: Chain, positions: int) -> list[Cut]:
    """Every placement of a chain of one run, its devices numbered by their first position."""
    count = chain.runs[0].count
    sizes = [tuple(b - a for a, b in pairwise((0, *at, count))) for at in combinations(range(1, count), positions - 1)]
    orders = [order for order in product(range(chain.devices), repeat=positions)
              if all(device <= max(order[:k], default=-1) + 1 for k, device in enumerate(order))]
    return [Cut(order, (size,)) for order in orders for size in sizes if len(set(order)) == chain.devices]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("positions", [2, 3, 4])
def test_the_best_value_is_the_best_of_all_placements(copies: int, positions: int) -> None:
    """Each placement's own value is the master's with its counts and devices fixed; no other is better."""
    problem = small(ranks=2 * copies, copies=1.6 * copies, activations=3 * copies)
    chain = counts.chain_of(problem, copies)
    assert chain is not None and chain.devices == 2
    best, outcome = master.propose(chain, positions, time_limit_s=20, seed=0)
    known = [cut for cut in all_cuts(chain, positions)
             if resident_fits(problem, counts.placement_of(problem, chain, cut, copies))]
    if not known:
        assert outcome.infeasible
        return
    assert best is not None
    bounds = [placement_bound(view(problem, counts.placement_of(problem, chain, cut, copies))).ns for cut in known]
    assert best.value_ns <= min(bounds) + 1e-3 * min(bounds)


def test_a_value_is_no_more_than_the_bound_at_the_placement() -> None:
    """Heads, returns and the last forward are what `placement_bound` counts as well, so the master promises no less."""
    for problem in (small(), small(first="0.5", last="0.7"), small(ranks=3, layers=7, copies=1.4)):
        chain = counts.chain_of(problem)
        assert chain is not None
        cuts: list[Cut] = []
        for _ in range(4):
            found, _ = master.propose(chain, chain.devices + 1, cuts, time_limit_s=10, seed=0)
            if found is None:
                break
            placed = counts.placement_of(problem, chain, found.cut)
            assert found.value_ns <= placement_bound(view(problem, placed)).ns * (1 + 1e-6)
            assert found.bound_ns is not None and found.bound_ns <= found.value_ns + 1
            cuts.append(found.cut)
        assert len(cuts) > 1


def test_cuts_exhaust_a_family() -> None:
    """Every placement is proposed once, each different from all before, until none is left: then it is proven."""
    problem = small(copies=2, layers=4)
    chain = counts.chain_of(problem)
    assert chain is not None
    wanted = set(all_cuts(chain, 3))
    cuts: list[Cut] = []
    for _ in range(len(wanted) + 1):
        found, outcome = master.propose(chain, 3, cuts, time_limit_s=10, seed=0)
        if found is None:
            assert outcome.infeasible
            break
        cuts.append(found.cut)
    single = {cut for cut in cuts if len(set(cut.devices)) == chain.devices}
    assert len(set(cuts)) == len(cuts) and single == wanted


def test_a_cutoff_is_kept_and_neighbourhoods_stay_near() -> None:
    problem = small(ranks=4, layers=8, copies=1, activations=4)
    chain = counts.chain_of(problem)
    assert chain is not None
    start = counts.stretched(counts.cut_of(chain, next(propose_shapes(problem, "v")), 1), 8)  # type: ignore[arg-type]
    assert start is not None and start.devices == (0, 1, 2, 3, 3, 2, 1, 0)
    allowed = [(device,) for device in start.devices]
    near, _ = master.propose(chain, 8, time_limit_s=10, seed=0, allowed=allowed, start=start)
    assert near is not None and near.cut.devices == start.devices
    none, outcome = master.propose(chain, 8, time_limit_s=10, seed=0, allowed=allowed, cutoff_ns=0.99 * near.value_ns)
    assert none is None and outcome.infeasible


def test_shapes_are_placements_of_the_master() -> None:
    """From a shape to counts and back: the same groups on the same ranks, or on their images under a renumbering."""
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, layers=10, first="0.3", last="0.4", copies=2)
    for placed in propose_shapes(problem):
        copies = max(len(stage.ranks) for stage in placed.stages)
        chain = counts.chain_of(problem, copies) if copies <= 2 else None
        cut = None if chain is None else counts.cut_of(chain, placed, copies)
        if chain is None or cut is None or "spread" in placed.name:
            continue
        again = counts.placement_of(problem, chain, cut, copies)
        assert sorted(g for stage in again.stages for g in stage.groups) == list(range(len(problem.groups)))
        assert counts.cut_of(chain, again, copies) == cut
        bounds = [placement_bound(view(problem, one)).ns for one in (placed, again)]
        assert bounds[1] <= bounds[0]  # twins have no transfer in the middle of a two-way pipeline's way


def test_what_is_no_chain_of_equal_devices_has_no_counts() -> None:
    assert counts.chain_of(two_stream_problem(ranks=2, microbatches=2)) is None
    assert counts.chain_of(small(), copies=3) is None


def test_a_device_may_have_no_position_that_is_allowed() -> None:
    chain = counts.chain_of(small())
    assert chain is not None and chain.devices == 2
    found, _ = master.propose(chain, 2, time_limit_s=5, seed=0, allowed=[(0,), (0,)])
    assert found is None or set(found.cut.devices) == {0}
