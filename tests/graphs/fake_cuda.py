"""Traces on fake CUDA tensors, which need no GPU: where each operator's results lie, and of what shape and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mipipe.graphs.operator_graph import Operator, OperatorGraph, Phase, SegmentTrace
from mipipe.graphs.operators.kernels import ANY_LAYOUT
from mipipe.graphs.tracing.operator_kinds import resolve_operator
from mipipe.graphs.tracing.trace import CONSTANT, GETITEM, Ref, decode, spec_of

CUDA = torch.device("cuda", 0)
ON_HOST = {"mipipe.all_to_all_route.default": 3}
"""Results that are for the host on every device: the numbers of rows that ranks exchange."""
NEEDS_CUDA = "not linked with support for cuda"
"""What torch without CUDA says of some operators on fake CUDA tensors (convolutions, ``contiguous``): their results
are taken as traced, and what comes of them is judged again."""
UNJUDGED = 0.25
"""The largest share of a trace's operators that may be so."""


def assert_on_fake_cuda(graph: OperatorGraph) -> None:
    """Every operator of every trace runs on CUDA tensors and gives what it gave at capture, on CUDA."""
    for trace in graph.traces:
        with FakeTensorMode():
            _run(trace)


def _run(trace: SegmentTrace) -> None:
    values: dict[str, Any] = {name: _empty(trace, name)
                              for name in (*trace.inputs, *trace.parameters, *trace.buffers,
                                           *(name for name in trace.output_grads if name is not None))}
    unjudged = 0
    for phase in Phase:
        for item in trace.phase_operators(phase):
            args = _filled(decode(item.args, CUDA), values)
            kwargs = {key: _filled(decode(value, CUDA), values) for key, value in item.kwargs.items()}
            where = f"{trace.digest} {item.fqn} {item.name} = {item.kind}"
            if item.kind == CONSTANT:
                found = torch.empty(torch.tensor(item.args[0]).shape, dtype=args[1], device=CUDA)
            elif item.kind == GETITEM:
                found = args[0][args[1]]
            else:
                function = ANY_LAYOUT.get(item.kind) or resolve_operator(item.kind)
                try:
                    found = function(*args, **kwargs)
                except RuntimeError as error:
                    assert NEEDS_CUDA in str(error), where
                    found = _as_traced(item, args)
                    unjudged += 1
            values[item.name] = found
            made = [result for result in tree_leaves(found) if isinstance(result, Tensor)]
            host = ON_HOST.get(item.kind)
            if item.kind != GETITEM:
                assert all(result.device == CUDA or place == host for place, result in enumerate(made)), where
            assert tuple(spec_of(result) for result in made) == item.outputs, where
    assert unjudged <= UNJUDGED * len(trace.operators) + 2, trace.digest


def _as_traced(item: Operator, args: list[Any]) -> Any:
    """An operator's results of the traced shapes, once its arguments are seen to be on CUDA."""
    assert all(given.device == CUDA for given in tree_leaves(args) if isinstance(given, Tensor)), item.kind
    made = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=CUDA) for spec in item.outputs]
    if item.kind == "aten.convolution_backward.default":
        left = iter(made)
        return [next(left) if wanted else None for wanted in args[-1]]
    return made[0] if len(made) == 1 else made


def _empty(trace: SegmentTrace, name: str) -> Tensor:
    spec = trace.specs[name]
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=CUDA)


def _filled(tree: Any, values: dict[str, Any]) -> Any:
    """The tree with tensors for names."""
    if isinstance(tree, Ref):
        return values[tree]
    if isinstance(tree, list):
        return [_filled(item, values) for item in tree]
    return tree
