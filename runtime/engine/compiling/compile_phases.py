"""Phase functions through torch.compile, compiled before the first step so that no rank keeps its peers waiting."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from mipipe.graphs.errors import RunError
from mipipe.graphs.operator_graph import Phase, SegmentTrace
from mipipe.graphs.tracing.trace import phase_signature, uses_random

PhaseFunction = Callable[..., tuple[Tensor, ...]]

_COMPILERS = ("g++", "clang++", "c++", "icpx")


def check_compiler() -> None:
    """Raise `RunError` where torch.compile would find no C++ compiler: it writes C++ for the CPU, and launchers for
    the GPU."""
    named = os.environ.get("CXX")
    if not (shutil.which(named.split()[0]) if named else any(map(shutil.which, _COMPILERS))):
        looked = f"CXX={named}" if named else ", ".join(_COMPILERS)
        raise RunError(f"compile: torch.compile needs a C++ compiler, but none was found ({looked}); install one, or"
                       " train without `compile`")


class Compiler:
    """Compiles the phases of traces. What F saves is what I and W are compiled for, strides included."""

    def __init__(self, device: torch.device) -> None:
        check_compiler()
        self._device = device
        self._values: dict[str, dict[str, Tensor]] = {}

    def compile(self, function: PhaseFunction, trace: SegmentTrace, phase: Phase) -> tuple[PhaseFunction,
                                                                                           tuple[bool, ...]]:
        """The compiled function, and for each result whether it is fresh memory nobody else refers to.

        Phases of one trace come in the order F, I, W. Random operators keep torch's own generator, so that the draws
        are those of a run without compilation.
        """
        options: dict[str, str | int | bool | Callable[..., object]] = {}
        if uses_random(trace):
            options["fallback_random"] = True
        compiled: PhaseFunction = torch.compile(function, dynamic=False, fullgraph=True, options=options)
        values = self._values.setdefault(trace.digest, {})
        arguments, names = phase_signature(trace, phase)
        for name in arguments:
            if name not in values:
                spec = trace.specs[name]
                values[name] = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self._device)
        with torch.no_grad(), torch.random.fork_rng():
            try:
                results = compiled(*(values[name] for name in arguments))
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise RunError(f"compile: {phase} of trace {trace.digest} ({', '.join(trace.parameters[:1])}...):"
                               f" torch.compile failed: {first}; train without `compile`") from error
        owned = _owned(results, [values[name] for name in arguments])
        values.update(zip(names, results, strict=True))
        return compiled, owned


def _owned(results: tuple[Tensor, ...], arguments: list[Tensor]) -> tuple[bool, ...]:
    pointers = [item.untyped_storage().data_ptr() for item in (*results, *arguments)]
    return tuple(pointers.count(pointer) == 1 and item.untyped_storage().nbytes() == item.nbytes
                 for item, pointer in zip(results, pointers, strict=False))
