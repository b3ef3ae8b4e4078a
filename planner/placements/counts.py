"""A chain in counts: runs of equal blocks, positions that hold so many of each, devices of positions. No solver.

What the master MIP (`mipipe.planner.milp.placement.master`) decides over, and the way from a placement to counts and
back. Light ends (an embedding, a head: `mipipe.planner.placements.shapes.light_ends`) may be left out of the chain:
they are dealt to all devices by microbatch, so that devices with less of the rest take more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mipipe.planner.actions import Stream
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.placements.cuts import deal_ends, units
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, PlanningProblem


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Equal blocks in a row: how many, their groups, and per block and microbatch durations (ns) and bytes."""

    blocks: tuple[tuple[int, ...], ...]
    f: float
    i: float
    w: float
    resident: int
    saved: float

    @property
    def count(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain on equal devices: its runs, the devices and microbatches of one copy, transfers (ns), bytes.

    ``ends``: groups left out that are dealt to all devices, ``spread_ns`` of one microbatch's work in all; the forwards
    of the first and of the last take ``spread_f_ns``.
    """

    runs: tuple[BlockRun, ...]
    devices: int
    microbatches: float
    hop_ns: int
    room: int
    capacity: int
    ends: tuple[int, ...] = ()
    spread_ns: float = 0.0
    spread_f_ns: tuple[float, float] = (0.0, 0.0)

    @property
    def work_ns(self) -> float:
        """Work of one microbatch."""
        return sum(run.count * (run.f + run.i + run.w) for run in self.runs) + self.spread_ns


@dataclass(frozen=True, slots=True)
class Cut:
    """A placement in the master's terms: the device of every position, its counts [run][position]."""

    devices: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]


def chain_of(problem: PlanningProblem, copies: int = 1, ends: Sequence[int] = ()) -> Chain | None:
    """The problem as a chain for so many copies side by side, without some ends; None where it is none, or devices or
    links differ."""
    devices = problem.topology.devices
    alike = len({(device.kind, device.memory_bytes, device.host) for device in devices}) == 1
    linked = {(edge.source, target) for edge in problem.edges for target in edge.targets}
    chained = linked == set(pairwise(range(len(problem.groups))))
    if (not alike or problem.topology.overrides or not chained or problem.num_ranks % copies
            or any(group.stream is not Stream.COMPUTE for group in problem.groups) or pair_gain(problem).ratio < 1):
        return None
    kind = devices[0].kind
    runs: list[BlockRun] = []
    for block in units(problem, [g for g in range(len(problem.groups)) if g not in ends]):
        made = _run(tuple(block), [problem.groups[g] for g in block], kind)
        if runs and replace(runs[-1], blocks=made.blocks) == made:
            runs[-1] = replace(made, blocks=(*runs[-1].blocks, tuple(block)))
        else:
            runs.append(made)
    limit = problem.limits.activation_bytes
    capacity = devices[0].memory_bytes if limit is None else min(limit, devices[0].memory_bytes)
    hop = max((problem.topology.transfer_ns(0, 1, size) for edge in problem.edges
               for size in (edge.num_bytes, edge.grad_bytes or 0)), default=0) if len(devices) > 1 else 0
    dealt = {g: _run((g,), [problem.groups[g]], kind) for g in ends}
    forwards = [dealt[g].f if g in dealt else 0.0 for g in (0, len(problem.groups) - 1)]
    return Chain(tuple(runs), problem.num_ranks // copies, problem.num_microbatches / copies, hop,
                 resident_room(problem, 0) - sum(run.resident for run in dealt.values()), capacity, tuple(ends),
                 sum(run.f + run.i + run.w for run in dealt.values()), (forwards[0], forwards[1]))


def _run(block: tuple[int, ...], groups: Sequence[Group], kind: str) -> BlockRun:
    """One block as a run, with mean loads."""
    def mean(values: Sequence[float | None]) -> float:
        return sum((value or 0) * (sum(group.loads) / len(group.loads) if group.loads else 1.0)
                   for group, value in zip(groups, values, strict=True))

    times = [group.times[kind] for group in groups]
    return BlockRun((block,), mean([time.f_ns for time in times]), mean([time.i_ns for time in times]),
               mean([time.w_ns for time in times]), sum(group.resident_bytes for group in groups),
               mean([group.saved_fi_bytes + group.saved_fw_bytes for group in groups]))


def placement_of(problem: PlanningProblem, chain: Chain, cut: Cut, copies: int = 1) -> Placement:
    """The placement of a proposal; with copies the second one is the first's image, and microbatches take turns."""
    blocks = [block for run in chain.runs for block in run.blocks]
    last, at = problem.num_ranks - 1, 0
    stages: list[Stage] = []
    routes: list[tuple[int, ...]] = []
    for k, device in enumerate(cut.devices):
        size = sum(row[k] for row in cut.counts)
        groups = [g for block in blocks[at:at + size] for g in block]
        at += size
        ranks = tuple(_image(device, copy, copies, chain.devices, last) for copy in range(copies))
        stages.append(Stage(tuple(groups), tuple(sorted(ranks))))
        routes.append(tuple(ranks[m % copies] for m in range(problem.num_microbatches)))
    base = Placement(tuple(stages), tuple(routes), "counted" if copies == 1 else f"counted-{copies}-copies")
    return deal_ends(problem, base, chain.ends, two_way=copies == 2) if chain.ends else base


def _image(device: int, copy: int, copies: int, size: int, last: int) -> int:
    """The rank of a copy's device: pairs of copies are mirror images, so that searches may halve them."""
    if copies == 2:
        return device if copy == 0 else last - device
    return copy * size + device


def cut_of(chain: Chain, placement: Placement, copies: int) -> Cut | None:
    """A placement as a cut: positions of its first route, ranks that are each other's image as one device; None where
    a block is split, devices are too many, or its replicas or routes are not the copies (a ring, ends dealt to all)."""
    own = [(stage, route) for stage, route in zip(placement.stages, placement.routes, strict=True)
           if not set(stage.groups) <= set(chain.ends)]
    placement = replace(placement, stages=tuple(stage for stage, _ in own), routes=tuple(route for _, route in own))
    replicas = max(len(stage.ranks) for stage in placement.stages)
    routes = {tuple(route[m] for route in placement.routes) for m in range(len(placement.routes[0]))}
    if len(routes) != replicas or replicas != copies:
        return None
    last = max(rank for stage in placement.stages for rank in stage.ranks)
    dealt = {g for stage in own for g in stage[0].groups} | set(chain.ends)
    if len(dealt) != sum(len(block) for run in chain.runs for block in run.blocks) + len(chain.ends):
        return None
    run_of = {block: r for r, run in enumerate(chain.runs) for block in run.blocks}
    new: dict[int, int] = {}
    devices: list[int] = []
    counts: list[list[int]] = [[] for _ in chain.runs]
    for stage, route in zip(placement.stages, placement.routes, strict=True):
        rank = min(route[0], last - route[0]) if replicas == 2 else route[0]
        devices.append(new.setdefault(rank, len(new)))
        for row in counts:
            row.append(0)
        left = list(stage.groups)
        while left:
            block = next((block for block in run_of if list(block) == left[:len(block)]), None)
            if block is None:
                return None
            counts[run_of[block]][-1] += 1
            del left[:len(block)]
    return Cut(tuple(devices), tuple(tuple(row) for row in counts)) if len(new) <= chain.devices else None


def stretched(cut: Cut, positions: int) -> Cut | None:
    """The same placement with so many positions: those with most blocks of one run halved; None if it has more."""
    devices, counts = list(cut.devices), [list(row) for row in cut.counts]
    while len(devices) < positions:
        size, k, r = max((row[k], k, r) for r, row in enumerate(counts) for k in range(len(devices)))
        if size < 2 or sum(row[k] > 0 for row in counts) > 1:
            return None
        devices.insert(k, devices[k])
        for other, row in enumerate(counts):
            row.insert(k, 0)
            if other == r:
                row[k], row[k + 1] = size // 2, size - size // 2
    return Cut(tuple(devices), tuple(map(tuple, counts))) if len(devices) == positions else None
