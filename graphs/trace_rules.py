"""What a graph from a file must be before any of it becomes code: names are names, arguments are literals.

The runtime writes each phase of a trace as Python text (`mipipe.graphs.tracing.trace`). A file is data, so everything
that flows into that text is checked here, whenever a trace is made: names are plain identifiers that shadow nothing,
each is defined before it is read, operators are named ``namespace.name.overload``, arguments are of the documented
forms.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Collection
from typing import Any

from mipipe.graphs.errors import GraphError, shown

LAYOUTS = frozenset({"strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "_mkldnn",
                     "jagged"})
MEMORY_FORMATS = frozenset({"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"})
CONSTANT = "mipipe.constant"
"""An operator without inputs: a small tensor written in the model's code. args: nested list, dtype."""

GETITEM = "getitem"
"""An operator that picks one result of an operator with several."""

_KIND = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)
_RESERVED = re.compile(r"_(call|make|const)_.*|_give|phase|__.*", re.ASCII)
"""Names that the generated code gives to other things."""
_DEPTH = 32


def is_name(text: object) -> bool:
    """Whether a name may stand in generated code."""
    return (isinstance(text, str) and text.isascii() and text.isidentifier() and not keyword.iskeyword(text)
            and _RESERVED.fullmatch(text) is None)


def is_kind(text: str) -> bool:
    """Whether text has the form of an operator kind: ``aten.add.Tensor``, or one of the two that are not torch's."""
    return text in (CONSTANT, GETITEM) or _KIND.fullmatch(text) is not None


def check_trace(trace: Any, dtypes: Collection[str]) -> None:
    """Raise `GraphError` unless all parts of a trace are of the documented forms and fit together.

    Args:
        dtypes: the names of torch's types that there are.
    """
    where = f"trace {shown(trace.digest, quoted=False)}"
    grads = [name for name in trace.output_grads if name is not None]
    given = [*trace.inputs, *trace.parameters, *trace.buffers, *grads]
    defined = set()
    for name in [*given, *(item.name for item in trace.operators)]:
        if not is_name(name):
            raise GraphError(f"{where}: found the name {shown(name)}, expected an identifier such as 'add_1'")
        if name in defined:
            raise GraphError(f"{where}: the name {shown(name)} is given twice")
        defined.add(name)
    _check_operators(where, trace.operators, set(given), dtypes)
    named = [*trace.outputs, *trace.buffer_updates, *trace.buffer_updates.values(), *trace.input_grads,
             *trace.parameter_grads, *(item.name for item in trace.saved)]
    missing = next((name for name in named if name is not None and name not in defined), None)
    if missing is not None:
        raise GraphError(f"{where}: names {shown(missing)}, which is no argument and no operator of it")
    for kind, arguments, results in (("input", trace.inputs, trace.input_grads), ("output", trace.outputs,
                                     trace.output_grads), ("parameter", trace.parameters, trace.parameter_grads)):
        if len(arguments) != len(results):
            raise GraphError(f"{where}: has {len(arguments)} {kind}s, but {len(results)} gradients of {kind}s")
    for spec in trace.specs.values():
        _check_spec(where, spec, dtypes)
    _check_phases(where, trace, set(grads))


def _check_phases(where: str, trace: Any, grads: Collection[str]) -> None:
    """Raise `GraphError` where a phase reads or returns what it does not have: its function would not run."""
    order = {"F": 0, "I": 1, "W": 2}
    made = {item.name: order[item.phase] for item in trace.operators}
    kept = {item.name for item in trace.saved if order[item.source] == made.get(item.name, 0)}
    results = ((0, (*trace.outputs, *trace.buffer_updates.values())), (1, trace.input_grads),
               (2, trace.parameter_grads))
    reads = [(made[item.name], item.inputs) for item in trace.operators]
    for phase, names in (*results, *reads):
        for name in names:
            first = made.get(name, phase if name not in grads else max(phase, 1))
            if name is not None and (first > phase or (first < phase and name not in kept)):
                raise GraphError(f"{where}: phase {'FIW'[phase]} reads {name!r}, which no earlier phase saves for it")


def _check_operators(where: str, operators: Collection[Any], known: set[str], dtypes: Collection[str]) -> None:
    for item in operators:
        place = f"{where}: operator {shown(item.name, quoted=False)}"
        if not is_kind(item.kind):
            raise GraphError(f"{place}: found the kind {shown(item.kind)}, expected one such as 'aten.add.Tensor'")
        for value in (*item.args, *item.kwargs.values()):
            _check_argument(place, value, known, dtypes)
        wrong = next((key for key in item.kwargs if not is_name(key)), None)
        if wrong is not None:
            raise GraphError(f"{place}: found the argument name {shown(wrong)}, expected an identifier")
        for spec in item.outputs:
            _check_spec(place, spec, dtypes)
        if item.kind in (CONSTANT, GETITEM) and (len(item.args) != 2 or item.kwargs):
            raise GraphError(f"{place}: {item.kind} has {len(item.args)} arguments, expected 2")
        if item.kind == GETITEM and not (_is_ref(item.args[0]) and type(item.args[1]) is int):
            raise GraphError(f"{place}: {GETITEM} of {shown(item.args)}, expected a result and a number")
        if item.kind == CONSTANT and not (isinstance(item.args[1], dict) and set(item.args[1]) == {"dtype"}
                                          and _is_numbers(item.args[0])):
            raise GraphError(f"{place}: {CONSTANT} of {shown(item.args)}, expected numbers and a dtype")
        known.add(item.name)


def _is_ref(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"ref"}


def _is_numbers(value: Any, depth: int = 0) -> bool:
    """Whether a value is a number (in its encoded form) or nested lists of them."""
    if isinstance(value, list):
        return depth < _DEPTH and all(_is_numbers(item, depth + 1) for item in value)
    return isinstance(value, (bool, int, float)) or (isinstance(value, dict) and set(value) <= {"float", "complex"})


def _check_argument(place: str, value: Any, known: Collection[str], dtypes: Collection[str], depth: int = 0) -> None:
    """Raise `GraphError` unless an argument is of a form of `mipipe.graphs.tracing.trace`, and reads what is known."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return
    if isinstance(value, list) and depth < _DEPTH:
        for item in value:
            _check_argument(place, item, known, dtypes, depth + 1)
        return
    if not isinstance(value, dict) or len(value) != 1:
        raise GraphError(f"{place}: found the argument {shown(value)}, expected a number, text, a list or one of the"
                         " encoded forms")
    (key, item), = value.items()
    choices = {"ref": known, "dtype": dtypes, "layout": LAYOUTS, "memory_format": MEMORY_FORMATS, "device": ("run",),
               "float": ("inf", "-inf", "nan")}
    if key in choices:
        good = isinstance(item, str) and item in choices[key]
    elif key == "complex":
        good = isinstance(item, list) and len(item) == 2 and all(type(part) in (int, float) for part in item)
    else:
        good = key == "slice" and isinstance(item, list) and len(item) == 3 and \
            all(part is None or type(part) is int for part in item)
    if not good:
        raise GraphError(f"{place}: found the argument {{{shown(key)}: {shown(item)}}}, expected an encoded form, and"
                         " of results only earlier ones")


def _check_spec(place: str, spec: Any, dtypes: Collection[str]) -> None:
    if spec.dtype not in dtypes:
        raise GraphError(f"{place}: found the dtype {shown(spec.dtype)}, expected one such as 'float32'")
    if math.prod(spec.shape) > 2**58:
        raise GraphError(f"{place}: found a shape of {math.prod(spec.shape):.3g} elements; no memory holds it")


def check_graph(graph: Any, dtypes: Collection[str]) -> None:
    """Raise `GraphError` unless every name of a graph leads to something, once, and segments fit their traces."""
    where = f"operator graph of {shown(graph.model, quoted=False)}"
    traces = {trace.digest: trace for trace in graph.traces}
    values = {value.name: value for value in graph.values}
    parameters = {item.fqn: item for item in graph.parameters}
    for kind, names in (("traces have the digest", [trace.digest for trace in graph.traces]),
                        ("values are named", [value.name for value in graph.values]),
                        ("parameters are named", [item.fqn for item in graph.parameters])):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise GraphError(f"{where}: two {kind} {shown(twice)}")
    for spec in (*(value.spec for value in graph.values), *(item.spec for item in graph.parameters)):
        _check_spec(where, spec, dtypes)
    for item in graph.parameters:
        if item.tied_to is not None and item.tied_to not in parameters:
            raise GraphError(f"{where}: {shown(item.fqn)} is tied to {shown(item.tied_to)}, which is not there")
    for name in (*graph.inputs, *graph.outputs, graph.loss):
        if name not in values:
            raise GraphError(f"{where}: its input or output {shown(name)} is no value of it")
    _check_source(where, graph.source)
    for trace in graph.traces:
        arguments = (*trace.inputs, *trace.parameters, *trace.buffers, *trace.output_grads)
        bare = next((name for name in arguments if name is not None and name not in trace.specs), None)
        if bare is not None:
            raise GraphError(f"{where}: trace {shown(trace.digest, quoted=False)} has no shape of {shown(bare)}")
    made = {value: segment.name for segment in graph.segments for value in segment.outputs}
    for value in graph.values:
        if value.source != made.get(value.name):
            raise GraphError(f"{where}: value {shown(value.name)} has the source {shown(value.source)}, but segment"
                             f" {shown(made.get(value.name))} makes it")
    for segment in graph.segments:
        trace, place = traces[segment.trace], f"segment {shown(segment.name, quoted=False)}"
        for kind, used, has in (("inputs", segment.inputs, trace.inputs), ("outputs", segment.outputs, trace.outputs),
                                ("parameters", segment.parameters, trace.parameters),
                                ("buffers", segment.buffers, trace.buffers)):
            if len(used) != len(has):
                raise GraphError(f"{place}: has {len(used)} {kind}, but its trace has {len(has)}")
            missing = next((name for name in used if name not in (values if kind in ("inputs", "outputs")
                                                                  else parameters)), None)
            if missing is not None:
                raise GraphError(f"{place}: names {shown(missing)} among its {kind}, which the graph does not have")


_SOURCE = {"source": str, "dtype": str, "overrides": dict, "freeze": list, "seq": int, "batch": int, "images": int,
           "image": int, "frames": int, "expert_groups": int, "expert_parallel": int}
"""What a graph records of its model is given to `mipipe.graphs.models.sources.open_source` again."""


def _check_source(where: str, source: dict[str, Any]) -> None:
    for key, kind in _SOURCE.items():
        value = source.get(key)
        if value is not None and (type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**31)):
            raise GraphError(f"{where}: source.{key}: found {shown(value)}, expected a {kind.__name__}")
    if not all(isinstance(pattern, str) for pattern in source.get("freeze") or ()):
        raise GraphError(f"{where}: source.freeze: expected regular expressions")
