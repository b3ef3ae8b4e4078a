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

import atexit
import gc
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn

from mipipe.graphs.errors import RunError
from mipipe.graphs.sharding.gathered import CONTEXT, COPIES, EXPERT_COPIES
from mipipe.graphs.topology import Topology
from mipipe.planner.device_memory import CHANNEL_BLOCKS, GROUP_BLOCKS
from mipipe.planner.program import Program
from mipipe.planner.team import Team
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks.groups import ALONE, GroupSpec, Places, Shared, Use, group_specs, places_of
from mipipe.runtime.ranks.processes import gather


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place and its groups. All ranks here are the plan's; ``places`` maps them to global ranks.

    ``copy`` counts the data-parallel copies of the plan, ``member`` the members of this rank's team (``team``), and
    ``seat`` the devices of this plan rank, members of all copies, of which ``sharing`` neighbours share experts.
    ``channels[(source, target)]`` hold the groups of this copy and member, ``reductions[ranks, axes, apart]`` those
    plan ranks with the members along those axes, in all copies or (``apart``) in this one; ``axes`` the members along
    each axis of the team; ``plan_group`` all of this copy, ``all_group`` all of every copy, ``copy_group`` this member
    in every copy. ``exchange_group`` are the neighbouring devices of this plan rank that share experts, all or a part
    of them, apart for what these exchange beside the gradients' sums; ``expert_copies_group`` those, one of each such
    part, that hold the same experts. ``copy_control`` is ``copy_group`` for CPU tensors.
    """

    rank: int
    num_ranks: int
    copy: int
    num_copies: int
    device: torch.device
    places: Places
    member: int = 0
    team: Team = ALONE
    sharing: int = 1
    channels: dict[tuple[int, int], Any] = field(default_factory=dict)
    reductions: dict[Shared, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    plan_group: Any = None
    all_group: Any = None
    copy_group: Any = None
    exchange_group: Any = None
    expert_copies_group: Any = None
    copy_control: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the first process of the first copy."""
        return self.leads and self.copy == 0

    @property
    def leads(self) -> bool:
        """Whether this is the first process of its copy."""
        return self.rank == 0 and self.member == 0

    @property
    def text(self) -> str:
        """This process, for people."""
        return f"rank {self.rank}" + (f", member {self.member}" if self.team.members > 1 else "")

    def global_rank(self, rank: int) -> int:
        """The rank in the world of this member of a plan rank of this copy."""
        return self.places[self.copy, rank, self.member]

    def channel(self, source: int, target: int) -> Any:
        """The group of a directed channel."""
        return self.channels[source, target]

    @property
    def place(self) -> dict[str, int]:
        """Where this process is along every axis of its team, and among the devices that hold the same (`alike`)."""
        where = self.team.coordinates(self.member)
        return {**where, COPIES: self.copy * self.team.axes.get(CONTEXT, 1) + where.get(CONTEXT, 0),
                EXPERT_COPIES: self.seat // self.sharing}

    @property
    def alike(self) -> dict[str, Any]:
        """The groups of devices that hold the same, by axis: this member in every copy, with a context axis its members
        in all copies; those with the same experts."""
        groups = {COPIES: self.reductions.get(((self.rank,), (CONTEXT,), False)) if CONTEXT in self.team.axes
                  else self.copy_group, EXPERT_COPIES: self.expert_copies_group}
        return {axis: group for axis, group in groups.items() if group is not None}

    @property
    def seat(self) -> int:
        """The number of this device among those of its plan rank in all copies, neighbours first."""
        return self.copy * self.team.members + self.member

    def reduction(self, ranks: Iterable[int], axes: tuple[str, ...] = (), apart: bool = False) -> Any:
        """The group that sums what a set of ranks holds, over the members along some axes and (not ``apart``) all
        copies; None where nobody else has it."""
        members = tuple(sorted(set(ranks)))
        if len(members) < 2 and not axes:
            return None if apart else self.copy_group
        return self.reductions[members, axes, apart]


def build_mesh(program: Program, shared: Iterable[Shared] = (), *, team: Team = ALONE, sharing: int = 1,
               topology: Topology | None = None, device: torch.device | None = None, timeout_s: float = 60.0,
               across: bool = False) -> Mesh:
    """The mesh of this process for ``program``, inside the initialised default process group.

    ``shared`` lists further sets of plan ranks and axes that reduce together (tied parameters, partial sums);
    ``sharing``: so many neighbouring devices of a rank share experts; ``across``: all share parameters. The world may
    hold several copies of the plan, in the order of `places_of`, after ordering processes by host and local rank.

    Raises:
        RunError: the world is not a multiple of the plan's devices, the default group cannot carry CPU tensors, or a
            peer does not come to the opening of a group.
    """
    atexit.unregister(gc.collect)  # groups kept by cycles end here, not with the interpreter: it aborts where a thread
    atexit.register(gc.collect)  # of a group then still holds a tensor of Python's
    num_ranks, world_size = len(program.ranks), dist.get_world_size()
    check_processes(world_size, num_ranks, team)
    check_control()
    num_copies = world_size // (num_ranks * team.members)
    places = places_of(_process_order(topology, world_size), num_ranks, num_copies, team)
    copy, rank, member = next(place for place, number in places.items() if number == dist.get_rank())
    mesh = Mesh(rank, num_ranks, copy, num_copies, device or torch.device("cpu"), places, member, team, sharing)
    timeout = timedelta(seconds=timeout_s)
    for spec in group_specs(program, shared, places, sharing, mesh.device.type != "cpu", team, across):
        group = _create(spec, mesh.device, timeout)
        if dist.get_rank() not in spec.members:
            continue
        if spec.use is Use.CHANNEL:
            mesh.channels[spec.key] = group
        elif spec.use is Use.REDUCTION:
            mesh.reductions[spec.key] = group
        elif spec.use is Use.AXIS:
            mesh.axes[spec.key] = group
        else:
            object.__setattr__(mesh, spec.use.value, group)
        if not spec.control:
            _open(spec, group, mesh, timeout)
    if mesh.copy_control is None:
        object.__setattr__(mesh, "copy_control", mesh.copy_group)
    return mesh


def check_processes(processes: int, num_ranks: int, team: Team) -> None:
    """Raise `RunError` unless the number of processes is a multiple of the plan's devices."""
    devices = num_ranks * team.members
    if processes % devices:
        what = f"{num_ranks} ranks" + (f" of {team.members} devices ({team.text()})" if team.members > 1 else "")
        raise RunError(f"{processes} processes were started, but the plan has {what}; start {devices} (torchrun"
                       f" --nproc-per-node {devices}), or a multiple of it for data-parallel copies")


def check_control() -> None:
    """Raise `RunError` where the default process group does not carry CPU tensors."""
    backend = str(dist.get_backend_config())
    if "cpu" not in backend:
        raise RunError(f"the default process group has the backend {backend}, on which no counts and losses can travel;"
                       " use init_process_group(\"gloo\"): the engine makes the groups for tensors itself")


def _create(spec: GroupSpec, device: torch.device, timeout: timedelta) -> Any:
    """The group; all processes call, and only its members wait for one another: others count it and go on (torch has
    no barrier over the world here unless ``TORCH_DIST_INIT_BARRIER`` asks for one).

    Not torch's ``use_local_synchronization``: it names a group by how many its caller is in, on which members with
    other neighbours do not agree.
    """
    if device.type == "cpu" or spec.control:
        return dist.new_group(sorted(spec.members), timeout, "gloo")
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = CHANNEL_BLOCKS if spec.use is Use.CHANNEL else GROUP_BLOCKS
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
    comm.wait(works, timeout, lambda: f"{mesh.text}: {what}", mesh.device.type == "cpu")
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
