"""No bound is above the shortest schedule where microbatches differ: loads down to 0, and transfers that have bytes.

Tiny problems, whose best plan over all placements, replicas and routes exhaustive search finds.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mipipe.graphs.errors import PlanError
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.at_placement import placement_bound, problem_bound
from mipipe.planner.bounds.first_gradients import colocated
from mipipe.planner.bounds.load import load_bound
from mipipe.planner.bounds.over_placements import cheapest_hop, facts_of
from mipipe.planner.jobs.arrays import build
from mipipe.planner.jobs.job_shop import job_shop
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.ladder.period import period_bound
from mipipe.planner.milp.placement import shares
from mipipe.planner.milp.placement.cells import CellBound
from mipipe.planner.milp.placement.configurations import configuration_bound
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.cuts import earliest_end
from mipipe.planner.placements.shapes import resident_fits
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import optimum

LOADS = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0)


def loaded_problem(seed: int) -> PlanningProblem:
    """Two or three groups on two devices: a chain or a fork, some colocated, on either stream, little memory."""
    rng = random.Random(seed)
    count, microbatches = rng.choice([(2, 2), (2, 2), (3, 2)])
    scale, same = rng.choice([1, 1, 10]), rng.random() < 0.4
    rows = [tuple(rng.choice(LOADS) for _ in range(microbatches)) for _ in range(count)]
    groups = []
    for n in range(count):
        times = PhaseTimes(*(scale * rng.randint(1, 9) for _ in range(2)),
                            None if count > 2 else rng.choice([None, scale * rng.randint(1, 9)]))
        groups.append(Group(
            f"g{n}", {"device": times}, saved_fi_bytes=rng.randint(0, 3), saved_fw_bytes=rng.randint(0, 3),
            saved_iw_bytes=rng.randint(0, 1), resident_bytes=rng.choice([0, 1, 1, 2]), single=rng.random() < 0.2,
            stream=Stream.COLLECTIVE if n == 1 and count > 2 and rng.random() < 0.3 else Stream.COMPUTE,
            loads=rows[0] if same else rows[n] if rng.random() < 0.7 else ()))
    size = rng.choice([0, 3, 40])
    edges = ((GroupEdge(0, (1, 2), size, size, "v"),) if count > 2 and rng.random() < 0.3 else
             tuple(GroupEdge(n, (n + 1,), rng.randint(0, size), rng.randint(0, size), f"v{n}")
                   for n in range(count - 1)))
    saved = sum(group.saved_fi_bytes + group.saved_fw_bytes + group.saved_iw_bytes for group in groups)
    limits = Limits(resident_bytes=rng.choice([None, max(1, sum(group.resident_bytes for group in groups) * 2 // 3)]),
                    activation_bytes=rng.choice([None, max(1, 2 * saved // 3), 2 * saved]))
    topology = Topology.uniform(2, latency_ns=rng.choice([0, 1, 7]), bytes_per_s=rng.choice([None, 10**9, 3 * 10**8]))
    together = ((0, 1),) if rng.random() < 0.3 else ()
    return PlanningProblem(f"loads {seed}", tuple(groups), edges, topology, microbatches, limits=limits,
                           colocate=together)


def all_routes(problem: PlanningProblem) -> Iterator[Placement]:
    """Every route of every unit up to the names of the devices: groups apart, and neighbours on equal routes joined."""
    units, count = colocated(problem), problem.num_microbatches
    routes = list(itertools.product(range(problem.num_ranks), repeat=count))
    for chosen in itertools.product(routes, repeat=len(units)):
        if chosen[0][0] or any(len(set(route)) > 1 and any(problem.groups[g].single for g in unit)
               for route, unit in zip(chosen, units, strict=True)):
            continue
        of = {g: route for route, unit in zip(chosen, units, strict=True) for g in unit}
        for joined in (False, True):
            parts: list[list[int]] = []
            for g in range(len(problem.groups)):
                last = parts[-1][-1] if parts else None
                if joined and last is not None and of[last] == of[g] and (
                        problem.groups[last].stream is problem.groups[g].stream):
                    parts[-1].append(g)
                else:
                    parts.append([g])
            if joined and len(parts) == len(problem.groups):
                continue
            yield Placement(tuple(Stage(tuple(part), tuple(sorted(set(of[part[0]])))) for part in parts),
                            tuple(of[part[0]] for part in parts))


def shortest(problem: PlanningProblem) -> tuple[int, list[tuple[StageView, int]]]:
    """The least makespan over all placements, and of placements whose own was searched to the end."""
    best, own = 1 << 60, []
    rng = random.Random(0)
    for placement in all_routes(problem):
        if not resident_fits(problem, placement):
            continue
        stages = view(problem, placement)
        try:
            job_shop(stages)
        except PlanError:  # an action alone does not fit
            continue
        if rng.random() < 0.1:
            own.append((stages, optimum(stages)))
            best = min(best, own[-1][1])
        else:
            best = min(best, optimum(stages, best))
    return best, own


def test_the_cheapest_transfer_is_the_lightest_microbatch_s() -> None:
    """An image encoder, and a text microbatch that brings it none: 1,000 bytes at 10 bytes/ns need not move."""
    times = {"device": PhaseTimes(10, 10, 10)}
    groups = (Group("vision", times, loads=(0.0, 1.0)), Group("text", times))
    problem = PlanningProblem("light", groups, (GroupEdge(0, (1,), 1000, 1000, "v"),),
                              Topology.uniform(2, latency_ns=3, bytes_per_s=10**10), 2)
    assert cheapest_hop(problem) == 3


def test_bounds_of_groups_without_any_load() -> None:
    """Every load 0: the group does nothing, for any number of microbatches."""
    groups = tuple(Group(f"g{n}", {"device": PhaseTimes(9, 9, 9)}, resident_bytes=1, saved_fw_bytes=1,
                         loads=(0.0,) * 4 if n == 0 else ()) for n in range(5))
    problem = PlanningProblem("none", groups, tuple(GroupEdge(n, (n + 1,), 4, 4, f"v{n}") for n in range(4)),
                              Topology.uniform(2, latency_ns=1, bytes_per_s=10**9), 4, limits=Limits(resident_bytes=3))
    found = plan(problem, PlanOptions(time_limit_s=0.7, threads=1))
    assert found.makespan_ns is not None and found.bound_ns is not None
    assert problem_bound(problem).ns <= found.bound_ns <= found.makespan_ns
    cells = CellBound(problem).improve(problem_bound(problem).ns, 0.5, 0)
    assert cells is None or cells.ns <= found.makespan_ns


def test_bounds_without_a_solver() -> None:
    met = 0
    for seed in range(120):
        problem = loaded_problem(seed)
        best, own = shortest(problem)
        if best == 1 << 60:
            continue
        bound = problem_bound(problem).ns
        assert bound <= best, seed
        assert period_bound(problem).ns <= best, seed
        met += bound == best
        heads = facts_of(problem).head
        for stages, least in own:
            if least == 1 << 60:
                continue
            assert earliest_end(problem, stages.placement, heads) <= least, seed
            try:
                assert placement_bound(stages).ns <= least, seed
                assert load_bound(build(stages)).ns <= least, seed
            except PlanError:  # an action of no time holds its bytes for none, and the bound counts them all the same
                assert any(0.0 in group.loads or 0.1 in group.loads for group in problem.groups), seed
    assert met > 5  # the bounds say something


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mips() -> None:
    for seed in range(1000, 1080):
        problem = loaded_problem(seed)
        best, _ = shortest(problem)
        if best == 1 << 60:
            continue
        known = problem_bound(problem).ns
        cells = CellBound(problem).improve(max(1, known), 0.5, 0)
        bounds = {"shares": shares.free_bound(problem, time_limit_s=2.0, seed=0)[0] or 0,
                  "configurations": configuration_bound(problem, time_limit_s=0.5)[0].ns,
                  "cells": 0 if cells is None else cells.ns}
        assert max(bounds.values()) <= best, (seed, best, bounds)
