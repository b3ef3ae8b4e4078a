"""Process groups of a run: one for each directed channel, one for each set of ranks that reduces together.

Every process makes all groups in one global order, so that their names agree, and uses each of its own once before the
first step: backends make a communicator at its first use and keep the host there until all members have come, and a
program may send first on two ranks (`mipipe.planner.check.contact` proves that none waits for ever after that). A
directed channel has a group of its own, so the two directions never wait for each other and NCCL may launch them in any
order.

Tensors travel on these groups, on the device's own backend (gloo, NCCL). What processes tell one another, counts,
losses, files, clocks, goes as CPU tensors on the default group, whose backend therefore is gloo on every machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import RunError
from mipipe.graphs.topology import Topology
from mipipe.planner.execution.opening import opening_order
from mipipe.planner.program import Program
from mipipe.runtime.engine import comm
from mipipe.runtime.train.launching.processes import gather

CHANNEL_CTAS, GROUP_CTAS = 4, 16
"""Blocks of a GPU that one NCCL communicator may occupy: a waiting receive holds them, and the rest computes."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place and its groups. All ranks here are the plan's; ``world`` maps them to global ranks.

    ``copy`` counts the data-parallel copies of the plan. ``channels[(source, target)]`` hold the groups of this copy,
    ``reductions[ranks]`` those plan ranks in all copies; ``plan_group`` all ranks of this copy, ``copy_group`` this
    plan rank in every copy, and ``exchange_group`` the same for what experts exchange beside the gradients' sums.
    ``copy_control`` is ``copy_group`` for CPU tensors.
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
    copy_control: Any = None

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
        RunError: the world is not a multiple of the plan's ranks, the default group cannot carry CPU tensors, or a peer
            does not come to the opening of a group.
    """
    num_ranks, world_size = len(program.ranks), dist.get_world_size()
    if world_size % num_ranks:
        raise RunError(f"{world_size} processes were started, but the plan has {num_ranks} ranks; start {num_ranks}"
                       f" (torchrun --nproc-per-node {num_ranks}), or a multiple for data-parallel copies")
    check_control()
    order = _process_order(topology, world_size)
    copy, rank = divmod(order.index(dist.get_rank()), num_ranks)
    mesh = Mesh(rank, num_ranks, copy, world_size // num_ranks, device or torch.device("cpu"), tuple(order))
    timeout = timedelta(seconds=timeout_s)
    for spec in group_specs(program, shared, order, exchange, mesh.device.type != "cpu"):
        group = _create(spec, mesh.device, timeout)
        if dist.get_rank() not in spec.members:
            continue
        if spec.use is Use.CHANNEL:
            mesh.channels[spec.key[0], spec.key[1]] = group
        elif spec.use is Use.REDUCTION:
            mesh.reductions[spec.key] = group
        else:
            object.__setattr__(mesh, spec.use.value, group)
        if not spec.control:
            _open(spec, group, mesh, timeout)
    if mesh.copy_control is None:
        object.__setattr__(mesh, "copy_control", mesh.copy_group)
    return mesh


class Use(Enum):
    """What a group is for; the values of single ones are `Mesh`'s names."""

    CHANNEL = "channels"
    PLAN = "plan_group"
    REDUCTION = "reductions"
    COPY = "copy_group"
    COPY_CONTROL = "copy_control"
    EXCHANGE = "exchange_group"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group to be made: ``members`` as global ranks, for a channel the source first; ``key`` as plan ranks."""

    use: Use
    key: tuple[int, ...]
    members: tuple[int, ...]

    @property
    def control(self) -> bool:
        """Whether it carries CPU tensors only."""
        return self.use is Use.COPY_CONTROL


def group_specs(program: Program, shared: Iterable[tuple[int, ...]], order: Sequence[int], exchange: bool,
                apart: bool) -> list[GroupSpec]:
    """All groups of all copies in the one order in which every process makes and opens its own.

    ``order``: the global ranks, copy by copy; ``apart``: control traffic has another backend than tensors.
    """
    num_ranks = len(program.ranks)
    num_copies = len(order) // num_ranks
    communicators = opening_order(program, shared)
    specs = []
    for number in range(num_copies):
        ranks = order[number * num_ranks:(number + 1) * num_ranks]
        specs += [GroupSpec(Use.CHANNEL, item.members, tuple(ranks[member] for member in item.members))
                  for item in communicators if not item.together]
        specs += [GroupSpec(Use.PLAN, (), tuple(ranks))] if num_ranks > 1 else []
    for item in communicators:
        if item.together:
            specs.append(GroupSpec(Use.REDUCTION, item.members, tuple(
                order[number * num_ranks + member] for number in range(num_copies) for member in item.members)))
    uses = (Use.COPY, *((Use.COPY_CONTROL,) if apart else ()), *((Use.EXCHANGE,) if exchange else ()))
    for number in range(num_ranks if num_copies > 1 else 0):
        specs += [GroupSpec(use, (number,), tuple(order[number::num_ranks])) for use in uses]
    return specs


def check_control() -> None:
    """Raise `RunError` where the default process group does not carry CPU tensors."""
    backend = str(dist.get_backend_config())
    if "cpu" not in backend:
        raise RunError(f"the default process group has the backend {backend}, on which no counts and losses can travel;"
                       " use init_process_group(\"gloo\"): the engine makes the groups for tensors itself")


def _create(spec: GroupSpec, device: torch.device, timeout: timedelta) -> Any:
    """The group; all processes call, and only its members wait for one another.

    Not torch's ``use_local_synchronization``: it names a group by how many its caller is in, on which members with
    other neighbours do not agree.
    """
    if device.type == "cpu" or spec.control:
        return dist.new_group(sorted(spec.members), timeout, "gloo")
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = CHANNEL_CTAS if spec.use is Use.CHANNEL else GROUP_CTAS  # the rest computes
    patience = 2 * timeout  # its watchdog ends the process without a word, so `comm.Waits` comes first
    return dist.new_group(sorted(spec.members), patience, "nccl", options, device_id=device)


def _open(spec: GroupSpec, group: Any, mesh: Mesh, timeout: timedelta) -> None:
    """Use a new group once, one element each way that it is for, and return when that is done."""
    here, one = dist.get_rank(), torch.zeros(1, device=mesh.device)
    if spec.use is Use.CHANNEL:
        source, target = spec.members
        place = sorted(spec.members).index(target if here == source else source)
        works = comm.start_send(group, [one], place) if here == source else comm.start_receive(group, [one], place)
        what = f"opening the channel to rank {spec.key[1]}" if here == source else \
            f"opening the channel from rank {spec.key[0]}"
    elif spec.use is Use.EXCHANGE:
        both = torch.zeros(len(spec.members), device=mesh.device)
        works, what = [comm.start_all_to_all(group, torch.empty_like(both), both)], "opening the experts' all-to-all"
    else:
        works = [comm.start_all_reduce(group, one)]
        what = f"opening the sum over processes {', '.join(map(str, sorted(spec.members)))}"
    comm.wait(works, timeout, lambda: f"rank {mesh.rank}: {what}", mesh.device.type == "cpu")
    if mesh.device.type != "cpu":
        torch.cuda.synchronize(mesh.device)


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
