"""A plan of plans: branches of a policy that train side by side, each planned on its share of a cluster (CoPD).

Branches do the same work, so shares are equal blocks of consecutive devices. Each branch's first device keeps a copy of
the whole policy, which samples its rollouts and answers as a teacher: that much of its memory is not the plan's. In a
taught step the student's first process sends token ids and labels of its foreign rows, and the teacher's sends back
their log probabilities: `exchange_ns`.

Left out: the time of sampling, which is the user's function's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.graphs.operator_graph import DTYPE_BYTES
from mipipe.graphs.serialize import STRICT, Amount, load, load_data
from mipipe.graphs.topology import Topology
from mipipe.graphs.units import format_bytes
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem

BYTES_OF_TOKEN = 2 * DTYPE_BYTES["int64"] + DTYPE_BYTES["float64"]
"""Of a foreign row: token id and label go to the teacher, a log probability in double comes back."""


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """Plans of the branches, and the cluster's devices that each has; bytes of the copy of the policy."""

    FORMAT: ClassVar = "mipipe.branches"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    plans: tuple[Plan, ...]
    devices: tuple[tuple[Amount, ...], ...]
    policy_bytes: Amount
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = [plan.problem.num_ranks for plan in self.plans]
        if not ranks or len(set(ranks)) > 1 or [len(item) for item in self.devices] != ranks:
            raise InputError(f"plan of branches: has plans of {ranks} ranks for {list(map(len, self.devices))} devices;"
                             " expected as many in each branch")
        if len({plan.problem.graph_digest for plan in self.plans}) > 1 \
                or len({plan.problem.num_microbatches for plan in self.plans}) > 1:
            raise InputError("plan of branches: its plans are for different graphs or numbers of microbatches; expected"
                             " the same in each branch")


def shares(num_devices: int, branches: int) -> tuple[tuple[int, ...], ...]:
    """Equal blocks of consecutive devices.

    Raises:
        InputError: the devices cannot be divided so.
    """
    each, left = divmod(num_devices, branches)
    if left or not each:
        raise InputError(f"--branches {branches}: {num_devices} devices cannot be divided into so many equal shares;"
                         " plan for a multiple")
    return tuple(tuple(range(number * each, (number + 1) * each)) for number in range(branches))


def branch_problems(problem: PlanningProblem, branches: int, policy_bytes: int) -> list[PlanningProblem]:
    """The problem of each branch, on its share of the devices, the first of which keeps a copy of the policy.

    Raises:
        InfeasibleError: a first device has no room for the copy.
    """
    topology, found = problem.topology, []
    for own in shares(topology.num_devices, branches):
        part = topology.without(set(range(topology.num_devices)) - set(own))
        first, *others = part.devices
        if first.memory_bytes < policy_bytes:
            raise InfeasibleError(f"device {first.name}: has {format_bytes(first.memory_bytes)}, but the branch's copy"
                                  f" of the policy takes {format_bytes(policy_bytes)}")
        less = dataclasses.replace(first, memory_bytes=first.memory_bytes - policy_bytes)
        found.append(problem.replace(topology=dataclasses.replace(part, devices=(less, *others))))
    return found


def plan_branches(problem: PlanningProblem, branches: int, policy_bytes: int,
                  solve: Callable[[PlanningProblem], Plan]) -> BranchPlan:
    """A plan for every share of the devices; shares that are alike are solved once.

    Raises:
        InputError, InfeasibleError: as `branch_problems`, or as ``solve`` raises.
    """
    found: list[Plan] = []
    problems = branch_problems(problem, branches, policy_bytes)
    for own in problems:
        like = next((plan for plan in found if _alike(plan.problem, own)), None)
        made = solve(own) if like is None else like
        found.append(made if like is None else dataclasses.replace(made, problem=own))
    return BranchPlan(tuple(found), shares(problem.topology.num_devices, branches), policy_bytes)


def _alike(one: PlanningProblem, other: PlanningProblem) -> bool:
    """Whether a plan of one problem is as good for the other: devices differ in name and place alone."""
    def bare(problem: PlanningProblem) -> Any:
        topology, count = problem.topology, problem.num_ranks
        hosts = list(dict.fromkeys(device.host for device in topology.devices))
        return ([(device.kind, device.memory_bytes, hosts.index(device.host)) for device in topology.devices],
                [topology.link(a, b) for a in range(count) for b in range(count) if a != b])

    return bare(one) == bare(other)


def exchange_bytes(tokens_of_step: int) -> int:
    """What a student and its teacher exchange in a taught step, half of whose rows are foreign."""
    return tokens_of_step // 2 * BYTES_OF_TOKEN


def exchange_ns(topology: Topology, devices: tuple[tuple[int, ...], ...], tokens_of_step: int) -> int:
    """The longest exchange between the first device of the hub and that of another branch, there and back."""
    sent = tokens_of_step // 2 * 16, tokens_of_step // 2 * 8
    hub = devices[0][0]
    return max((topology.transfer_ns(other[0], hub, sent[0]) + topology.transfer_ns(hub, other[0], sent[1])
                for other in devices[1:]), default=0)


def load_plans(path: Any) -> tuple[Plan, ...]:
    """The plans of a file: those of its branches, or the one that it holds.

    Raises:
        InputError: it holds neither.
    """
    if load_data(path).get("format") == BranchPlan.FORMAT:
        return load(path, BranchPlan).plans
    return (load(path, Plan),)
