"""Traces as data and as functions: the JSON form of operator arguments, and phases compiled to Python.

`build_phase` turns the operators of one phase into a plain Python function over explicit tensors: one line for each
operator, intermediates deleted after their last use, no autograd, no interpreter. Random operators draw from torch's
default generator: seed it (by step, microbatch and segment) before F of a trace for which `uses_random` holds, and
again before its recomputation.

Argument encoding: numbers, strings, booleans, None and lists stand for themselves; ``{"ref": name}`` a result;
``{"float": "inf" | "-inf" | "nan"}``; ``{"complex": [re, im]}``; ``{"dtype": "float32"}``; ``{"layout": "strided"}``;
``{"memory_format": "contiguous_format"}``; ``{"device": "run"}`` the device the phase is built for, whatever the model
was captured on; ``{"slice": [start, stop, step]}``. A file is data: `mipipe.graphs.trace_rules` has checked that names
are identifiers and arguments of these forms before any of it becomes text here.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import DTYPE_BYTES, Operator, Phase, SegmentTrace, TensorSpec
from mipipe.graphs.operators import ctc, expert_kernels, kernels, owned_experts, recurrent, vocabulary
from mipipe.graphs.trace_rules import CONSTANT as CONSTANT
from mipipe.graphs.trace_rules import GETITEM as GETITEM
from mipipe.graphs.trace_rules import check_trace
from mipipe.graphs.tracing import dynamic_rows
from mipipe.graphs.tracing.operator_kinds import resolve_operator

PhaseFunction = Callable[..., tuple[Tensor, ...]]

Signature = tuple[tuple[str, ...], tuple[str, ...]]

_SIGNATURES: dict[tuple[str, Phase], Signature] = {}
_BUILT: dict[tuple[str, Phase, str, bool], PhaseFunction] = {}


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> 'float32'."""
    return str(dtype).removeprefix("torch.")


def spec_of(tensor: Tensor) -> TensorSpec:
    """The shape and dtype of a tensor."""
    return TensorSpec(tuple(int(size) for size in tensor.shape), dtype_name(tensor.dtype))


def identifier(name: str) -> str:
    """A Python identifier for an FQN: ``layers.0.weight`` -> ``layers_0_weight``, ``0.weight`` -> ``x0_weight``."""
    text = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
    return text if text.isidentifier() and not keyword.iskeyword(text) else f"x{text}"


def encode(value: Any) -> Any:
    """The JSON form of an operator argument of an fx.Node.

    Raises:
        GraphError: the argument has no JSON form (a size that depends on data, a Python object).
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, torch.fx.Node):
        return {"ref": value.name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": "run"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    raise GraphError(f"operator argument {value!r} ({type(value).__name__}) cannot be stored: expected a number, a"
                     " tensor, a dtype or a list; a size that depends on data must be made fixed in the model")


def decode(value: Any, device: torch.device) -> Any:
    """The Python value of an encoded argument; ``{"ref": name}`` gives a `Ref`."""
    if isinstance(value, list):
        return [decode(item, device) for item in value]
    if not isinstance(value, dict):
        return value
    (key, item), = value.items()
    if key == "ref":
        return Ref(item)
    if key == "float":
        return float(item)
    if key == "complex":
        return complex(*item)
    if key == "device":
        return device
    if key in ("dtype", "layout", "memory_format"):
        return getattr(torch, item)
    if key == "slice":
        return slice(*item)
    raise GraphError(f"operator argument {value!r}: unknown encoding {key!r}; the file was written by another mipipe")


class Ref(str):
    """The name of a tensor inside decoded arguments; its repr is the bare name, as generated code needs it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def phase_signature(trace: SegmentTrace, phase: Phase) -> Signature:
    """Argument names and result names of a phase's function.

    Arguments: those of ``inputs + parameters + buffers`` which the phase reads (unused ones are dropped), then, in I
    and W, the output gradients it reads, then the tensors saved by an earlier phase which it reads. Results: F gives
    ``outputs``, ``buffer_updates`` and what it saves; I the input gradients that exist and what it saves; W the
    parameter gradients that exist. Names are distinct within a signature; a saved input, parameter or output
    gradient goes by its own name and is an argument only (the caller has it).
    """
    key = (trace.digest, phase)
    if key not in _SIGNATURES:
        _SIGNATURES[key] = _signature(trace, phase)
    return _SIGNATURES[key]


def _signature(trace: SegmentTrace, phase: Phase) -> Signature:
    read: set[str] = {name for item in trace.phase_operators(phase) for name in item.inputs}
    if phase is Phase.F:
        results = [*trace.outputs, *trace.buffer_updates.values()]
    elif phase is Phase.I:
        results = [name for name in trace.input_grads if name is not None]
    else:
        results = [name for name in trace.parameter_grads if name is not None]
    read.update(results)
    grads = tuple(name for name in trace.output_grads if name is not None)
    given = (*trace.inputs, *trace.parameters, *trace.buffers, *(() if phase is Phase.F else grads))
    known = set(given)
    results += [item.name for item in trace.saved if item.source is phase and item.name not in known]
    earlier = [item.name for item in trace.saved if _before(item.source, phase) and item.name not in known]
    return (tuple(name for name in (*given, *earlier) if name in read), tuple(dict.fromkeys(results)))


def _before(source: Phase, phase: Phase) -> bool:
    order = list(Phase)
    return order.index(source) < order.index(phase)


def uses_random(trace: SegmentTrace) -> bool:
    """Whether F draws random numbers (dropout and the like), so that the generator must be seeded before it."""
    return any(_is_random(item.kind) for item in trace.operators)


def _is_random(kind: str) -> bool:
    target = None if kind in (CONSTANT, GETITEM) else resolve_operator(kind)
    return target is not None and torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def build_phase(trace: SegmentTrace, phase: Phase, device: str | torch.device = "cpu",
                given: Mapping[str, Callable[..., Any]] | None = None, handing: bool = False) -> PhaseFunction:
    """The function of a phase: tensors in the order of `phase_signature`'s arguments -> tuple in its results' order.

    It runs without autograd, so parameters may require gradients. Built once for each trace, phase and device, but for
    each call where operators are ``given`` by kind (those that talk to other ranks). With ``handing`` its first
    argument is a callable that gets (position, result) as soon as nothing more reads a result, so that only few are
    alive at a time; the function then returns an empty tuple.
    """
    device = torch.device(device)
    if given:
        return _compile(trace, phase, device, given, handing)
    key = (trace.digest, phase, str(device), handing)
    if key not in _BUILT:
        _BUILT[key] = _compile(trace, phase, device, handing=handing)
    return _BUILT[key]


def phase_source(trace: SegmentTrace, phase: Phase, device: torch.device,
                 given: Mapping[str, Callable[..., Any]] | None = None,
                 handing: bool = False) -> tuple[str, dict[str, Any]]:
    """The Python text of a phase's function, named ``phase``, and the globals it needs."""
    check_trace(trace, DTYPE_BYTES)
    direct = {**kernels.DIRECT, **kernels.ANY_LAYOUT, **recurrent.DIRECT, **dynamic_rows.DIRECT, **ctc.DIRECT,
              **owned_experts.DIRECT, **vocabulary.DIRECT, **expert_kernels.ALONE, **(given or {})}
    arguments, results = phase_signature(trace, phase)
    operators = list(trace.phase_operators(phase))
    last_use = {name: index for index, item in enumerate(operators) for name in (item.name, *item.inputs)}
    space: dict[str, Any] = {}
    lines = [f"def phase({', '.join((*(['_give'] if handing else []), *arguments))}):"]
    leaving = {*trace.outputs, *trace.buffer_updates.values(), *trace.input_grads, *trace.parameter_grads}

    def result(name: str) -> str:
        """What leaves a segment is contiguous, whatever layout the kernel that made it chose."""
        return f"{name}.contiguous()" if name in leaving else name

    def hand(names: Iterable[str]) -> str:
        return "".join(f"_give({results.index(name)}, {result(name)}); " for name in names if name in results)

    for index, item in enumerate(operators):
        dead = sorted({name for name in (item.name, *item.inputs)
                       if last_use[name] == index and (handing or name not in results)})
        end = f"; {hand(dead) if handing else ''}del {', '.join(dead)}" if dead else ""
        lines.append(f"    {item.name} = {_call(item, device, space, direct)}{end}")
    left = [name for name in results if not handing or name not in last_use]
    lines.append(f"    {hand(left)}return ()" if handing
                 else f"    return ({''.join(result(name) + ', ' for name in left)})")
    return "\n".join(lines) + "\n", space


def _call(item: Operator, device: torch.device, space: dict[str, Any], direct: Mapping[str, Any]) -> str:
    """The expression that computes an operator; what has no literal form is put into ``space``."""
    args, kwargs = decode(item.args, device), {key: decode(value, device) for key, value in item.kwargs.items()}
    if item.kind == GETITEM:
        return f"{args[0]!r}[{args[1]!r}]"
    if item.kind == CONSTANT:
        space[f"_make_{item.name}"] = torch.tensor(args[0], dtype=args[1], device=device).clone
        return f"_make_{item.name}()"
    name = "_call_" + item.kind.replace(".", "_")
    space.setdefault(name, direct.get(item.kind) or resolve_operator(item.kind))
    texts = [_literal(value, space) for value in args]
    texts += [f"{key}={_literal(value, space)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(texts)})"


def _literal(value: Any, space: dict[str, Any]) -> str:
    """Source text of a decoded argument."""
    if isinstance(value, list):
        return f"[{', '.join(_literal(item, space) for item in value)}]"
    finite = not isinstance(value, (float, complex)) or (value == value and abs(value) != math.inf)
    if finite and (value is None or isinstance(value, (bool, int, float, complex, str))):
        return repr(value)
    name = "_const_" + "".join(letter if letter.isalnum() else "_" for letter in str(value))
    space[name] = value
    return name


def _compile(trace: SegmentTrace, phase: Phase, device: torch.device,
             given: Mapping[str, Callable[..., Any]] | None = None, handing: bool = False) -> PhaseFunction:
    source, space = phase_source(trace, phase, device, given, handing)
    # Why a file cannot run code here: `phase_source` has checked the trace (`check_trace`), so that every name in the
    # text is an identifier and every argument a literal or an object in `space`; and what is called is an operator that
    # `resolve_operator` took from torch's dispatcher, never an attribute or a module that the file names.
    exec(compile(source, f"<{phase} of trace {trace.digest}>", "exec"), space)
    return torch.no_grad()(space["phase"])
