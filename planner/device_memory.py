"""What of a device's memory tensors cannot fill: the one place that says so, for plans, for teams and for runs.

An allocator of cached blocks reserves more than tensors hold. Beside it lie the driver's context with its kernels,
libraries' workspaces and the buffers of communicators. A device's nominal memory (80 GB) is smaller than its real one
(80 GiB and what is not sold) by more than these are, so of a nominal memory only the allocator's share is taken off.
"""

from __future__ import annotations

import dataclasses
import math

from mipipe.graphs.cluster import Cluster
from mipipe.graphs.topology import Device, Topology
from mipipe.graphs.units import GIGABYTE

ALLOCATOR_SLACK = 0.07
"""Of what tensors hold, how much more an allocator of cached blocks has reserved at its peak."""
RUNTIME_BYTES = 4 * GIGABYTE
"""What the driver's context, libraries and communicators hold of a device beside torch's allocator, where it is in a
tensor group, a pipeline and a group of copies; a device's nominal memory is smaller than its real one by as much."""
CHANNEL_BLOCKS, GROUP_BLOCKS = 4, 16
"""Blocks of a GPU that one NCCL communicator may occupy, of a channel and of a group: a waiting receive holds them, and
the rest computes."""


def room_for_tensors(memory_bytes: int) -> int:
    """Of a device's nominal memory what tensors can fill."""
    return round(memory_bytes / (1 + ALLOCATOR_SLACK))


def tensors_fit(cluster: Cluster) -> Topology:
    """The cluster's devices with what tensors can fill: of GPUs without the allocator's share, of CPUs all."""
    return dataclasses.replace(cluster.topology, devices=tuple(
        _with_nominal(device, device.memory_bytes) if cluster.kinds[device.kind].has_peaks else device
        for device in cluster.topology.devices))


def with_memory(topology: Topology, memory_bytes: int | None) -> Topology:
    """The devices with this memory in place of what a cluster file says of them, unchanged for None; of those whose
    nominal memory tensors cannot fill, they fill as much as they can."""
    if memory_bytes is None:
        return topology
    return dataclasses.replace(topology, devices=tuple(
        dataclasses.replace(device, memory_bytes=memory_bytes) if device.nominal_bytes is None
        else _with_nominal(device, memory_bytes) for device in topology.devices))


def memory_for(device: Device, tensor_bytes: int) -> int:
    """The memory, as a cluster file says it, with which tensors of so many bytes fit on a device."""
    return tensor_bytes if device.nominal_bytes is None else math.ceil(tensor_bytes * (1 + ALLOCATOR_SLACK))


def _with_nominal(device: Device, memory_bytes: int) -> Device:
    return dataclasses.replace(device, memory_bytes=room_for_tensors(memory_bytes), nominal_bytes=memory_bytes)
