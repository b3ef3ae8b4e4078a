"""Phase functions through torch.compile, compiled before the first step so that no rank keeps its peers waiting."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mipipe.graphs.errors import RunError
from mipipe.graphs.operator_graph import Phase, SegmentTrace
from mipipe.graphs.tracing.trace import uses_random
from mipipe.runtime.engine.compiling.rehearsal import PhaseFunction, Rehearsal

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
    """Compiles the phases of traces by running them in a rehearsal."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        check_compiler()
        self._rehearsal = rehearsal

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
        try:
            given, results = self._rehearsal.run(compiled, trace, phase)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"compile: {phase} of trace {trace.digest} ({', '.join(trace.parameters[:1])}...):"
                           f" torch.compile failed: {first}; train without `compile`") from error
        return compiled, _owned(results, given)


def _owned(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple[bool, ...]:
    pointers = [item.untyped_storage().data_ptr() for item in (*results, *arguments)]
    return tuple(pointers.count(pointer) == 1 and item.untyped_storage().nbytes() == item.nbytes
                 for item, pointer in zip(results, pointers, strict=False))
