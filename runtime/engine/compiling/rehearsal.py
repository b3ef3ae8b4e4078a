"""Phase functions run once before the first step, on zeros: what a first run costs is paid where no peer waits.

On CUDA a kernel is loaded, a library's handle is made and memory is asked of the driver at first use, and each of these
may wait for the whole device; a receive that occupies it then waits for a peer that waits as well (NVIDIA, NCCL
documentation, "Using multiple NCCL communicators concurrently"). torch.compile compiles at the first call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mipipe.graphs.operator_graph import Phase, SegmentTrace
from mipipe.graphs.tracing.trace import phase_signature

PhaseFunction = Callable[..., tuple[Tensor, ...]]


class Rehearsal:
    """Runs the phases of traces in the order F, I, W: what F saves is what I and W get, strides included. It holds what
    one microbatch of a segment does, until W was there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[str, dict[str, Tensor]] = {}

    def run(self, function: PhaseFunction, trace: SegmentTrace, phase: Phase,
            handing: bool = False) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The arguments of a phase, and what its function makes of them; with ``handing`` as `build_phase` has it.
        Random generators stay as they were."""
        values = self._values.setdefault(trace.digest, {})
        arguments, names = phase_signature(trace, phase)
        for name in arguments:
            if name not in values:
                spec = trace.specs[name]
                values[name] = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
        given = [values[name] for name in arguments]
        made: dict[int, Tensor] = {}
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(cuda):
            results = function(made.__setitem__, *given) if handing else function(*given)
        results = tuple(made[place] for place in sorted(made)) if handing else results
        values.update(zip(names, results, strict=True))
        return given, results

    def forget(self, trace: SegmentTrace) -> None:
        """All phases of a trace have run."""
        self._values.pop(trace.digest, None)
