"""Random problems with bytes of every kind, for promises that must hold on any."""

from __future__ import annotations

import dataclasses
from random import Random

from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.placements.shapes import all_placements
from mipipe.planner.placements.shortages import shortage
from mipipe.planner.plan import Placement
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem


def random_problem(random: Random) -> tuple[PlanningProblem, int]:
    """A problem of `ample`, and the least memory that its saved tensors fit."""
    problem = ample(random)
    return problem, min(_least_memory(problem, placement) for placement in all_placements(problem))


def ample(random: Random) -> PlanningProblem:
    """A chain, sometimes with a branch, of uneven groups with bytes of every kind on devices of ample memory."""
    ranks, microbatches = random.choice([2, 3, 4, 8]), random.choice([4, 9, 16, 32, 64])
    count = random.choice([ranks, 2 * ranks + 1, 34])
    heavy = random.choice([1, 10, 1000])
    groups = []
    for number in range(count):
        edge = number in (0, count - 1)
        saved = [random.randrange(1, 50) * heavy for _ in range(3)]
        groups.append(Group(
            f"g{number}", {"d": PhaseTimes(*(random.randrange(1, 1000) for _ in range(3)))},
            resident_bytes=random.randrange(1, 100) * 100 * (9 if edge else 1), saved_fi_bytes=saved[0],
            saved_fw_bytes=saved[1], saved_iw_bytes=saved[2] // 3, workspace_bytes=random.choice([0, 5 * heavy]),
            recompute_bytes=random.choice([None, 2]),
            forward_workspace_bytes=Random(f"{number} {saved}").choice([None, 0, 7 * heavy])))
    size = random.choice([0, 1, 40]) * heavy
    edges = [GroupEdge(n, (n + 1,), size, size, f"v{n}") for n in range(count - 1)]
    if random.random() < 0.3 and count > 6:
        edges.append(GroupEdge(1, (count // 2,), size, size, "skip"))
    link = Link(random.choice([0, 7]), random.choice([None, 10**9]))
    topology = Topology(tuple(Device(f"d{r}", "d", 1 << 50, local_rank=r) for r in range(ranks)), link, link)
    return PlanningProblem("random", tuple(groups), tuple(edges), topology, microbatches)


def _least_memory(problem: PlanningProblem, placement: Placement) -> int:
    lack = shortage(with_memory(problem, 0), placement)
    assert lack is not None
    return lack.lacking_bytes


def with_memory(problem: PlanningProblem, size: int) -> PlanningProblem:
    devices = tuple(dataclasses.replace(device, memory_bytes=size) for device in problem.topology.devices)
    return problem.replace(topology=dataclasses.replace(problem.topology, devices=devices))
