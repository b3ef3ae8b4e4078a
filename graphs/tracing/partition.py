"""A segment as three functions of explicit tensors: F (forward), I (input gradient) and W (weight gradient).

Of the joint graph, F gets the ancestors of outputs and buffer updates; I what is left and some input gradient needs; W
the rest: the products that make weight gradients (vectors such as a norm's gradient are made in I, where W would have
to keep whole activations for them). Operators that need no gradient and serve only the backward (powers, casts, copies)
go where they are needed, unless computing them in F keeps fewer bytes: an exact minimum cut decides. What crosses from
one phase to a later one is saved; views of one storage count once, and views of parameters are made again instead.

Left out: recomputing cheap parts of F in I (the planner recomputes whole groups instead).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from mipipe.graphs.operator_graph import Operator, Phase, SavedTensor, SegmentTrace, TensorSpec
from mipipe.graphs.operators.flops import count_flops, inside_bytes, num_bytes
from mipipe.graphs.operators.row_sizes import restore_sizes
from mipipe.graphs.serialize import digest
from mipipe.graphs.tracing import dynamic_rows
from mipipe.graphs.tracing import joint as joint_graph
from mipipe.graphs.tracing.joint import Joint, JointFunction, trace_joint
from mipipe.graphs.tracing.module_paths import module_paths
from mipipe.graphs.tracing.phase_split import assign_phases, closure, is_view
from mipipe.graphs.tracing.storages import storage_bytes, storage_of
from mipipe.graphs.tracing.trace import CONSTANT, GETITEM, encode, identifier, spec_of

ORDER = {Phase.F: 0, Phase.I: 1, Phase.W: 2}


def trace_segment(function: JointFunction, inputs: Mapping[str, TensorSpec],
                  parameters: Mapping[str, TensorSpec] | None = None,
                  buffers: Mapping[str, TensorSpec] | None = None, *, differentiable: Sequence[bool] | None = None,
                  trainable: Sequence[bool] | None = None, wanted: Sequence[bool] | None = None) -> SegmentTrace:
    """The trace of ``function(*inputs, *parameters, *buffers) -> tensors``, split into F, I and W.

    Args:
        function: pure but for parameters and buffers, which it may change in place; called on fake tensors only.
        inputs, parameters, buffers: argument names (distinct Python identifiers) to specs, in the order of the call.
        differentiable: for each input, whether its gradient is wanted; by default all of floating dtype.
        trainable: for each parameter, whether it trains; by default all.
        wanted: for each output, whether a gradient arrives; by default for all that require one.

    Raises:
        GraphError: an operation has no stored form, or a large tensor is closed over.
    """
    parameters, buffers = parameters or {}, buffers or {}
    if differentiable is None:
        differentiable = [spec.dtype.startswith(("float", "bfloat", "complex")) for spec in inputs.values()]
    if trainable is None:
        trainable = [True] * len(parameters)
    flags = [*differentiable, *trainable, *([False] * len(buffers))]
    specs = [*inputs.values(), *parameters.values(), *buffers.values()]
    made = trace_joint(function, specs, flags, wanted, len(inputs))
    if dynamic_rows.picks_rows(made.graph):
        with dynamic_rows.second_stand_ins():
            other = trace_joint(function, specs, flags, wanted, len(inputs))
        restore_sizes(made.graph, other.graph)
    _freeze_updated(made)
    phases = assign_phases(made, len(inputs))
    _repeat_parameter_views(made, phases, len(inputs))
    return to_trace(made, phases, (tuple(inputs), tuple(parameters), tuple(buffers)))


def trace_module(module: nn.Module, inputs: Mapping[str, Tensor], *, differentiable: Sequence[bool] | None = None,
                 wanted: Sequence[bool] | None = None) -> SegmentTrace:
    """The trace of a whole module as one segment: ``module(*inputs)`` gives a tensor or a sequence of tensors.

    Parameters and buffers are bound in the order of ``named_parameters()`` and ``named_buffers()`` (ties once); their
    names in the trace are `identifier` of the FQNs. What has ``requires_grad`` trains.
    """
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def function(*tensors: Tensor) -> Sequence[Tensor]:
        given, state = tensors[:len(inputs)], dict(zip([*params, *buffers], tensors[len(inputs):], strict=True))
        result = torch.func.functional_call(module, state, given)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def named(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
        return {identifier(name): spec_of(tensor) for name, tensor in tensors.items()}

    return trace_segment(function, named(inputs), named(params), named(buffers), differentiable=differentiable,
                         trainable=[param.requires_grad for param in params.values()], wanted=wanted)


def _freeze_updated(made: Joint) -> None:
    """Copy arguments which F changes and the backward reads: by then the runtime holds the new value."""
    after = closure([node for node in made.tangents if node is not None], lambda node: node.users)
    for index in made.updates:
        argument = made.arguments[index]
        late = [user for user in argument.users if user in after]
        if late:
            with made.graph.inserting_after(made.arguments[-1]):
                copy = made.graph.call_function(torch.ops.aten.clone.default, (argument,))
            with made.mode:
                copy.meta["val"] = argument.meta["val"].clone()
            for user in late:
                user.replace_input_with(argument, copy)


def _moves_nothing(node: fx.Node) -> bool:
    """Whether all that a node returns are views of its inputs: one tensor, or a list of them (split, unbind)."""
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return is_view(node)
    storages = {storage_of(source) for source in node.all_input_nodes}
    return all(isinstance(item, Tensor) and item.untyped_storage()._cdata in storages for item in value)


def _repeat_parameter_views(made: Joint, phases: dict[fx.Node, Phase], num_inputs: int) -> None:
    """Make views of parameters and buffers again in each phase that reads them, rather than saving them."""
    resident = {storage_of(node) for node in made.arguments[num_inputs:]}
    copies: dict[tuple[fx.Node, Phase], fx.Node] = {}

    def is_resident(value: object) -> bool:
        if isinstance(value, (tuple, list)):  # of a split or unbind: no phase hands a list to another
            return bool(value) and all(is_resident(item) for item in value)
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in resident

    def again(node: fx.Node, phase: Phase, before: fx.Node) -> fx.Node:
        if node not in phases or phases[node] is phase or not is_resident(node.meta["val"]):
            return node
        if (node, phase) not in copies:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: again(item, phase, before))
            with made.graph.inserting_before(before):
                copy = made.graph.create_node("call_function", node.target, args, kwargs)
            copy.meta.update(node.meta)
            phases[copy], copies[node, phase] = phase, copy
        return copies[node, phase]

    for node in [node for node in made.graph.nodes if node in phases and phases[node] is not Phase.F]:
        for source in node.all_input_nodes:
            node.replace_input_with(source, again(source, phases[node], node))


def _name(made: Joint, names: Sequence[str]) -> None:
    """Name placeholders after the arguments, gradients ``grad_i`` after their outputs, the rest apart from these."""
    wanted = dict(zip(made.arguments, names, strict=True))
    wanted.update({node: f"grad_{i}" for i, node in enumerate(made.tangents) if node is not None})
    taken = set(wanted.values())
    for node in made.graph.nodes:
        name, count = wanted.get(node, node.name), 0
        while node not in wanted and name in taken:
            name, count = f"{node.name}_{count}", count + 1
        node.name = name
        taken.add(name)


def _saved(made: Joint, phases: Mapping[fx.Node, Phase], num_inputs: int) -> list[SavedTensor]:
    """What crosses phases; each storage is counted once, at the tensor that keeps it longest."""
    inputs, has_input_grads = made.arguments[:num_inputs], any(made.grads[:num_inputs])
    born = {**phases, **dict.fromkeys(inputs, Phase.F)}
    if has_input_grads:
        born |= {node: Phase.I for node in made.tangents if node is not None}
    last: dict[fx.Node, Phase] = {}
    reads = [(source, phase) for node, phase in phases.items() for source in node.all_input_nodes]
    reads += [(node, Phase.W) for node in made.grads[num_inputs:] if node is not None]
    for source, phase in reads:
        if source in born and ORDER[born[source]] < ORDER[phase]:
            last[source] = max(last.get(source, phase), phase, key=ORDER.__getitem__)
    aliases = {storage_of(node): node.name for node in (*inputs, *made.tangents) if node is not None}
    crossing = [node for node in made.graph.nodes if node in last]
    counted: set[int | None] = set()
    found: dict[fx.Node, SavedTensor] = {}
    for node in sorted(crossing, key=lambda node: -ORDER[last[node]]):
        storage = storage_of(node)
        size = 0 if storage in counted else storage_bytes(node)
        counted.add(storage)
        found[node] = SavedTensor(node.name, size, born[node], last[node], aliases.get(storage))
    return [found[node] for node in crossing]


_GATHERS = {"aten.embedding.default", "aten.index.Tensor", "aten.gather.default", "aten.index_select.default"}
"""Operators that read as much of their first argument as they return, not all of it."""


def _to_operator(node: fx.Node, phase: Phase, path: str) -> Operator:
    """A node of the joint graph, recorded in the module ``path``, as data."""
    value = node.meta["val"]
    outputs = tuple(spec_of(item) for item in (value if isinstance(value, (tuple, list)) else (value,))
                    if isinstance(item, Tensor))
    if node.target is operator.getitem:
        return Operator(node.name, GETITEM, phase, encode(node.args), {}, outputs, fqn=path)
    if node.target is joint_graph.make_constant:
        return Operator(node.name, CONSTANT, phase, encode(node.args), {}, outputs, bytes_written=num_bytes(value),
                        fqn=path)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
    encoded = {key: encode(item) for key, item in node.kwargs.items() if key != "pin_memory"}
    read = written = 0
    if not _moves_nothing(node):
        sources = node.all_input_nodes
        read, written = sum(num_bytes(source.meta["val"]) for source in sources), num_bytes(value)
        if str(node.target) in _GATHERS:
            read += written - num_bytes(sources[0].meta["val"])
        written += inside_bytes(node.target, args)[0]
    return Operator(node.name, str(node.target), phase, encode(node.args), encoded, outputs,
                    count_flops(node.target, args, kwargs, value), max(read, 0), written, path)


def to_trace(made: Joint, phases: Mapping[fx.Node, Phase], names: tuple[tuple[str, ...], ...],
             paths: Mapping[fx.Node, str] | None = None) -> SegmentTrace:
    """The partitioned graph as data, with its digest; ``paths``: the operators' modules, found out where not given."""
    inputs, parameters, buffers = names
    _name(made, (*inputs, *parameters, *buffers))
    nodes = [node for node in made.graph.nodes if node in phases]
    paths = module_paths(made, phases, len(inputs)) if paths is None else paths
    operators = tuple(_to_operator(node, phase, paths.get(node, ""))
                      for phase in Phase for node in nodes if phases[node] is phase)
    boundary = (*made.arguments, *made.tangents, *made.outputs, *made.updates.values(), *made.grads)
    saved = _saved(made, phases, len(inputs))
    crossing = {item.name for item in saved}
    specs = {node.name: spec_of(node.meta["val"]) for node in made.graph.nodes
             if node in boundary or node.name in crossing}
    grads = tuple(None if node is None else node.name for node in made.grads)
    trace = SegmentTrace(
        "", inputs, parameters, buffers, tuple(None if node is None else node.name for node in made.tangents), specs,
        operators, tuple(node.name for node in made.outputs if node is not None),
        {made.arguments[index].name: node.name for index, node in made.updates.items() if node is not None},
        grads[:len(inputs)], grads[len(inputs):len(inputs) + len(parameters)], tuple(saved))
    trace = replace(trace, workspace_bytes={phase: _workspace(nodes, phases, phase, boundary, crossing)
                                            for phase in Phase if trace.has(phase)})
    return replace(trace, digest=digest(trace))


def _inside(node: fx.Node) -> int:
    """Bytes that an operator holds in itself while it runs."""
    if node.op != "call_function" or node.target is operator.getitem:
        return 0
    return inside_bytes(node.target, fx.map_arg(node.args, lambda item: item.meta["val"]))[1]


def _workspace(nodes: Sequence[fx.Node], phases: Mapping[fx.Node, Phase], phase: Phase,
               boundary: Sequence[fx.Node | None], crossing: set[str]) -> int:
    """The most bytes of a phase's intermediates alive at once, without what it is given and what it keeps."""
    own = [node for node in nodes if phases[node] is phase]
    made_here = {storage_of(node) for node in own if not is_view(node)} - {None}
    kept = {storage_of(node) for node in own if node in boundary or node.name in crossing}
    last: dict[int | None, int] = {}
    for index, node in enumerate(own):
        last.update({storage_of(item): index for item in (node, *node.all_input_nodes)})
    live = peak = 0
    sizes: dict[int | None, int] = {}
    for index, node in enumerate(own):
        storage = storage_of(node)
        if storage in made_here and storage not in kept and storage not in sizes:
            sizes[storage] = storage_bytes(node)
            live += sizes[storage]
        peak = max(peak, live + _inside(node))
        for storage in {storage_of(item) for item in (node, *node.all_input_nodes)}:
            if last[storage] == index and storage in sizes:
                live -= sizes[storage]
                sizes[storage] = 0
    return peak
