"""Groups apart bound groups joined only where no transfer gets shorter by joining: against exhaustive search."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from mipipe.graphs.errors import PlanError
from mipipe.graphs.topology import Topology
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.bounds.joined import without_joint_bytes
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.proposals import finest
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import optimum


def fork(size: int, rng: random.Random | None = None) -> PlanningProblem:
    """One group whose value two others read, and chains with a skip: one microbatch, two devices."""
    rng = rng or random.Random(0)
    groups = tuple(Group(f"g{n}", {"device": PhaseTimes(rng.randint(1, 9), rng.randint(1, 9), None)}) for n in range(3))
    edges: tuple[GroupEdge, ...] = (GroupEdge(0, (1, 2), size, size, "v"),)
    if rng.random() < 0.5:
        edges = (GroupEdge(0, (2,), size, size, "v"), GroupEdge(1, (2,), size, size, "w"))
    topology = Topology.uniform(2, latency_ns=rng.choice([0, 3]), bytes_per_s=rng.choice([10**9, 3 * 10**8]))
    return PlanningProblem("fork", groups, edges, topology, 2)


def at(ranks: tuple[int, ...], parts: tuple[tuple[int, ...], ...]) -> Placement:
    return Placement(tuple(Stage(part, (ranks[part[0]],)) for part in parts), tuple((ranks[part[0]],) * 2
                                                                                   for part in parts))


def test_bounds_of_groups_apart_hold_for_joined_ones() -> None:
    changed = 0
    for seed in range(40):
        rng = random.Random(seed)
        problem = fork(rng.choice([0, 1, 20, 400]), rng)
        light = without_joint_bytes(problem)
        changed += light is not problem
        for ranks, parts in (((0, 1, 1), ((0,), (1, 2))), ((0, 0, 1), ((0, 1), (2,)))):
            joined = at(ranks, parts)
            try:
                least = optimum(view(problem, joined))
            except PlanError:
                continue
            assert placement_bound(view(light, finest(light, joined))).ns <= least, seed
    assert changed > 10


def test_the_exact_model_s_bound_is_not_one_where_a_stage_receives_once_what_its_groups_read() -> None:
    groups = tuple(Group(f"g{n}", {"device": PhaseTimes(10, 10, 10)}, resident_bytes=8 if n == 0 else 6)
                   for n in range(3))
    problem = PlanningProblem("shared", groups, (GroupEdge(0, (1, 2), 1000, 1000, "v"),), Topology.uniform(
        2, bytes_per_s=10**9, memory_bytes=13), 1)
    joined = at((0, 1, 1), ((0,), (1, 2)))
    joined = Placement(joined.stages, tuple(route[:1] for route in joined.routes))
    result = plan(problem, PlanOptions(time_limit_s=5, exact=True))
    assert result.bound_ns is not None and result.bound_ns <= optimum(view(problem, joined))


def test_a_chain_loses_nothing() -> None:
    problem = fork(7)
    chain = problem.replace(edges=(GroupEdge(0, (1,), 7, 7, "v"), GroupEdge(1, (2,), 7, 7, "w")))
    assert without_joint_bytes(chain) is chain
    assert without_joint_bytes(fork(0)) == fork(0)
