"""Process groups of a run: one for each directed channel, one for each set of ranks that reduces together.

Every member of the world creates every group in one global order (sorted), because the backends require it. A directed
channel has a group of its own, so the two directions never wait for each other and NCCL may launch them in any order.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import RunError
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import ActionKind
from mipipe.planner.program import Program
from mipipe.runtime.train.processes import gather


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place and its groups. All ranks here are the plan's; ``world`` maps them to global ranks.

    ``copy`` counts the data-parallel copies of the plan. ``channels[(source, target)]`` hold the groups of this copy,
    ``reductions[ranks]`` those plan ranks in all copies; ``plan_group`` all ranks of this copy, ``copy_group`` this
    plan rank in every copy, and ``exchange_group`` the same for what experts exchange beside the gradients' sums.
    """

    rank: int
    num_ranks: int
    copy: int
    num_copies: int
    device: torch.device
    world: tuple[int, ...]
    channels: dict[tuple[int, int], Any] = field(default_factory=dict)
    reductions: dict[tuple[int, ...], Any] = field(default_factory=dict)
    plan_group: Any = None
    copy_group: Any = None
    exchange_group: Any = None

    def global_rank(self, rank: int) -> int:
        """The rank in the world of a plan rank of this copy."""
        return self.world[self.copy * self.num_ranks + rank]

    def channel(self, source: int, target: int) -> Any:
        """The group of a directed channel."""
        return self.channels[source, target]

    def reduction(self, ranks: Iterable[int]) -> Any:
        """The group that sums what a set of ranks holds, over all copies; None where nobody else has it."""
        members = tuple(sorted(set(ranks)))
        return self.copy_group if len(members) < 2 else self.reductions[members]


def build_mesh(program: Program, shared: Iterable[tuple[int, ...]] = (), *, exchange: bool = False,
               topology: Topology | None = None, device: torch.device | None = None, timeout_s: float = 60.0) -> Mesh:
    """The mesh of this process for ``program``, inside the initialised default process group.

    ``shared`` lists further sets of plan ranks that reduce together (tied parameters); ``exchange``: experts are shared
    between copies. The world may hold several
    copies of the plan: rank = copy * ranks + plan rank, after ordering processes by host and local rank.

    Raises:
        RunError: the world is not a multiple of the plan's ranks.
    """
    num_ranks, world_size = len(program.ranks), dist.get_world_size()
    if world_size % num_ranks:
        raise RunError(f"{world_size} processes were started, but the plan has {num_ranks} ranks; start {num_ranks}"
                       f" (torchrun --nproc-per-node {num_ranks}), or a multiple for data-parallel copies")
    order = _process_order(topology, world_size)
    place = order.index(dist.get_rank())
    copy, rank = divmod(place, num_ranks)
    pairs = {(transfer.source_rank, transfer.target_rank) for transfer in program.transfers}
    sets = {tuple(sorted(instruction.peers)) for instructions in program.ranks for instruction in instructions
            if instruction.kind is ActionKind.ALL_REDUCE}
    sets |= {tuple(sorted(set(ranks))) for ranks in shared}
    timeout = timedelta(seconds=timeout_s)
    mesh = Mesh(rank, num_ranks, copy, world_size // num_ranks, device or torch.device("cpu"), tuple(order))

    def create(members: Iterable[int]) -> Any:
        return dist.new_group(sorted(members), timeout=timeout)

    for number in range(mesh.num_copies):
        ranks = order[number * num_ranks:(number + 1) * num_ranks]
        for source, target in sorted(pairs):
            group = create((ranks[source], ranks[target]))
            if number == copy:
                mesh.channels[source, target] = group
        group = create(ranks) if num_ranks > 1 else None
        if number == copy:
            object.__setattr__(mesh, "plan_group", group)
    for members in sorted(sets):
        if len(members) > 1:
            mesh.reductions[members] = create(order[number * num_ranks + member] for number in range(mesh.num_copies)
                                              for member in members)
    for number in range(num_ranks if mesh.num_copies > 1 else 0):
        for name in ("copy_group", *(("exchange_group",) if exchange else ())):
            group = create(order[number::num_ranks])
            if number == rank:
                object.__setattr__(mesh, name, group)
    return mesh


def _process_order(topology: Topology | None, world_size: int) -> list[int]:
    """Global ranks in plan order: the plan's devices by host and local rank, whatever rank torchrun gave out.

    Hosts are matched by name where the plan knows them, else in the order of torchrun's node ranks.
    """
    here = (socket.gethostname(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    if world_size == 1:
        return [0]
    places = gather(here)
    hosts = list(dict.fromkeys(host for host, _ in places))
    named = list(dict.fromkeys(device.host for device in topology.devices)) if topology else []
    if set(hosts) <= set(named):
        hosts.sort(key=named.index)
    return sorted(range(world_size), key=lambda rank: (hosts.index(places[rank][0]), places[rank][1], rank))
