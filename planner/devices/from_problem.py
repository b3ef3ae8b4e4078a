"""A captured model as a placement instance: the groups of a `PlanningProblem` on its equal devices.

A group takes F, I and W of one microbatch, so the largest load is the time between two microbatches in a steady
pipeline without regard to order or activations in flight: a quick look at how well a model divides, and where. A value
takes its transfer and its gradient's, at the producer and at every reading device. A group occupies its resident bytes
and what one microbatch saves.
"""

from __future__ import annotations

from mipipe.graphs.errors import ProblemError
from mipipe.planner.devices.instances.instance import PlaceInstance, WorkloadNode, contract_classes
from mipipe.planner.problem import PlanningProblem


def instance_of(problem: PlanningProblem) -> PlaceInstance:
    """The instance of a problem, times in milliseconds; node ids are the groups' names.

    Raises:
        ProblemError: devices that differ in kind or memory.
    """
    devices = problem.topology.devices
    kinds = sorted({f"{device.kind} of {device.memory_bytes:,} bytes" for device in devices})
    if len(kinds) > 1:
        raise ProblemError(f"{problem.name}: found devices {', '.join(kinds)}; `mipipe place` needs equal ones, use"
                           " `mipipe plan`")
    leader = list(range(len(problem.groups)))
    for members in problem.colocate:
        together = {leader[g] for g in members}
        leader = [min(together) if name in together else name for name in leader]
    kind = devices[0].kind
    nodes = []
    for g, group in enumerate(problem.groups):
        size = group.resident_bytes + group.saved_fi_bytes + group.saved_fw_bytes
        nodes.append(WorkloadNode(group.name, group.times[kind].total_ns / 1e6, 0.0, float(size), leader[g]))
    far = len(devices) - 1
    values = [(edge.source, edge.targets, (problem.topology.transfer_ns(0, far, edge.num_bytes) + (
        0 if edge.grad_bytes is None else problem.topology.transfer_ns(far, 0, edge.grad_bytes))) / 1e6)
        for edge in problem.edges]
    return contract_classes(problem.name, (len(devices), 0, float(devices[0].memory_bytes)), nodes, values)
