"""The devices that a team runs on, all alike: their memory, their peaks, how they compute and talk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.costs.collectives import Fabric
from mipipe.graphs.efficiency import LowDtype
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import DTYPE_BYTES
from mipipe.graphs.serialize import STRICT, Amount
from mipipe.planner.device_memory import room_for_tensors
from mipipe.planner.problems.from_graph import STATE_BYTES, OptimizerName, usual_optimizer


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices all alike. ``low``: the type that products run in where not in ``dtype``; ``fused``: elementwise
    kernels are fused; ``flash``: attention is one kernel; ``cut``: what stays for the backward is chosen as compilers
    do, else what autograd saves (None: as ``fused``); ``overlap``: collectives of the tensor and expert axes run behind
    kernels as far as the kind's ``hidden`` and ``hidden_experts`` say; ``scatter``: a value between ranks that all
    tensor members have goes in parts, one from each, else each sends all of it; ``optimizer``: whose state is kept
    (None: `mipipe.planner.problems.from_graph.usual_optimizer` of ``dtype``)."""

    __pydantic_config__: ClassVar = STRICT
    kind: DeviceKind
    fabric: Fabric
    memory_bytes: Amount
    dtype: str = "bfloat16"
    low: LowDtype | None = None
    fused: bool = True
    flash: bool = True
    cut: bool | None = None
    overlap: bool = False
    scatter: bool = True
    optimizer: OptimizerName | None = None

    @property
    def kernels(self) -> tuple[bool, bool, bool]:
        """How kernels are made."""
        return self.fused, self.flash, self.fused if self.cut is None else self.cut

    @property
    def keeps(self) -> OptimizerName:
        """Whose state is kept."""
        return self.optimizer or usual_optimizer(self.dtype)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer for one parameter."""
        return round(STATE_BYTES[self.keeps] * DTYPE_BYTES[self.dtype])

    @property
    def gradient_bytes(self) -> int:
        """Of one parameter's gradient, which is summed over microbatches in float32 at least."""
        return max(DTYPE_BYTES["float32"], DTYPE_BYTES[self.dtype])

    @property
    def usable_bytes(self) -> int:
        """Of the memory what tensors can fill."""
        return room_for_tensors(self.memory_bytes)

    @property
    def peak(self) -> float:
        """The peak that utilisation is counted against."""
        return self.kind.peak(self.low or self.dtype)


def check_machine(machine: Machine) -> None:
    """Raise `InputError` where a device kind has no peaks to price with, or some of 0."""
    if not machine.kind.has_peaks:
        raise InputError(f"device kind {machine.kind.name}: has no peak rates to estimate teams from; give one with"
                         " peaks (device_kinds: in the cluster file)")
    if min(machine.peak, machine.kind.peak(machine.dtype), machine.kind.bytes_per_s or 0) <= 0:
        raise InputError(f"device kind {machine.kind.name}: has a peak rate or bandwidth of 0; expected rates above 0")
