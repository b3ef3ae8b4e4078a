"""A model's forward pass as one flat fx graph: every node an ATen call with its module path, nothing executed.

`export_model` runs torch.export without strict mode (the model's Python runs once on fake tensors), inlines the regions
that switch gradients off, and removes what only concerns the exporter. Sizes are those of the example inputs.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mipipe.graphs.capture import user_autograd
from mipipe.graphs.capture.cleaning import clean
from mipipe.graphs.capture.python_state import refuse_changes
from mipipe.graphs.capture.seen import keep_assigned, seen_mode
from mipipe.graphs.capture.unsayable import (
    Unsayable,
    draws,
    explain_export,
    fits_no_graph,
    line_in_model,
)
from mipipe.graphs.capture.user_code import UserCode
from mipipe.graphs.errors import GraphError, MipipeError
from mipipe.graphs.models.silence import silence
from mipipe.graphs.tracing.dynamic_rows import pick_rows
from mipipe.graphs.tracing.joint import make_constant, no_stack_traces
from mipipe.graphs.tracing.storages import argument, mutates, written

aten = torch.ops.aten


@dataclass(frozen=True)
class Exported:
    """A flat graph whose placeholders are the model's inputs, parameters and buffers.

    ``inputs``: input name to placeholder; ``parameters`` and ``buffers``: FQN to placeholder, tied ones sharing it;
    ``outputs``: result name to node. Nodes carry ``meta["val"]`` (a fake tensor) and ``meta["stack"]``: the modules
    they were recorded in, outermost first, as (path, class name, how often that path had been entered before).
    """

    graph: fx.Graph
    inputs: dict[str, fx.Node]
    parameters: dict[str, fx.Node]
    buffers: dict[str, fx.Node]
    outputs: dict[str, fx.Node]
    code: UserCode | None = None


def export_model(module: nn.Module, inputs: Mapping[str, Any], *, prefix: str = "") -> Exported:
    """The flat forward graph of ``module(**inputs)``.

    Args:
        module: on any device, meta included; its parameters are not read.
        inputs: example tensors by argument name; other values are fixed into the graph.
        prefix: module path of the user's model inside ``module``; removed from FQNs.

    Raises:
        GraphError: the model cannot be exported; names the model's line that stopped it.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    storages = {id(value): name for name, value in tensors.items()}
    if len(storages) < len(tensors):
        raise GraphError("example inputs: one tensor is given under two names; pass a copy, or they become one input")
    name = type(getattr(module, "wrapped", module)).__name__
    try:
        with silence(), no_stack_traces(), seen_mode(name), keep_assigned(module, name, prefix), user_autograd.watched(
                module, name, prefix) as code:
            program = refuse_changes(
                module, name, lambda: torch.export.export(module, (), dict(inputs), strict=False))
    except MipipeError:
        raise
    except Exception as error:
        raise GraphError(explain_export(module, error)) from error
    try:
        return flatten_program(program, prefix, aliases_of(module), code)
    except Unsayable as error:
        line = line_in_model(module, inputs, error.kind)
        raise GraphError(f"model {name}: {error.text}{line}; {error.advice}") from None


def aliases_of(module: nn.Module) -> dict[str, str]:
    """FQN to the first FQN of the same parameter or buffer, for all of them."""
    first: dict[int, str] = {}
    everything = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in everything}


def flatten_program(program: torch.export.ExportedProgram, prefix: str, aliases: Mapping[str, str],
                    code: UserCode | None = None) -> Exported:
    """The flat graph of an exported program; ``aliases`` maps FQNs of tied tensors to the first one.

    ``code``: the custom Functions and hooks recorded in the export.
    """
    graph, signature = fx.Graph(), program.graph_signature
    of_parameters, of_buffers, of_constants = (signature.inputs_to_parameters, signature.inputs_to_buffers,
                                               signature.inputs_to_lifted_tensor_constants)  # each makes a dict anew
    env: dict[fx.Node, Any] = {}
    inputs: dict[str, fx.Node] = {}
    parameters: dict[str, fx.Node] = {}
    buffers: dict[str, fx.Node] = {}
    shared: dict[str, fx.Node] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        name = node.name
        target = of_parameters.get(name) or of_buffers.get(name) or of_constants.get(name)
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        if name in of_constants:
            made = _constant(graph, program.constants[target], str(target))
        elif target is None:
            made = inputs[_input_name(node)] = graph.placeholder(name)
        else:
            fqn = target.removeprefix(prefix)
            first = aliases.get(target, target)
            made = shared[first] if first in shared else graph.placeholder(name)
            shared[first] = made
            (parameters if name in of_parameters else buffers)[fqn] = made
        made.meta.update(val=node.meta["val"], stack=(), given=name not in of_parameters)
        env[node] = made
    results = _copy_nodes(program.graph_module, graph, env, prefix)
    specs = signature.output_specs
    user = [item for item, spec in zip(results, specs, strict=True) if spec.kind.name in ("USER_OUTPUT", "LOSS_OUTPUT")]
    outputs = {name: node for name, node in zip(_output_names(program), user, strict=True) if isinstance(node, fx.Node)}
    if code is not None:
        if code.seeded and any(map(draws, graph.nodes)):
            raise GraphError(f"model {code.model}: its forward, at {next(iter(code.seeded))}, sets the state of torch's"
                             " random generator and draws, and a run keys random numbers by its seed, step, microbatch"
                             " and operator; draw without setting it, or keep fixed numbers in a buffer")
        moved = code.settle(graph, {**parameters, **buffers})
        outputs = {name: moved.get(node, node) for name, node in outputs.items()}
    outputs.update(clean(graph, outputs))
    live = needed(graph, outputs.values())
    for node in [*pick_rows(graph), *filter(fits_no_graph, graph.nodes)]:
        if node in live:
            raise Unsayable(node)
    return Exported(graph, inputs, parameters, buffers, outputs, code)


def needed(graph: fx.Graph, outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that an output or a tensor changed in place depends on."""
    live: set[fx.Node] = set()
    pending = [*outputs, *filter(mutates, graph.nodes)]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)
    return live


def _constant(graph: fx.Graph, value: Tensor, name: str) -> fx.Node:
    """A node that makes a tensor written in the model's code."""
    if value.is_meta:
        raise GraphError(f"the model makes a tensor of shape {tuple(value.shape)} on the meta device ({name}), where"
                         " its values are lost: make it a buffer")
    if value.numel() > 4096:
        raise GraphError(f"the model closes over a tensor of shape {tuple(value.shape)} ({name}): make it"
                         " a buffer")
    return graph.call_function(make_constant, (value.tolist(), value.dtype))


def _input_name(node: fx.Node) -> str:
    return node.name.removeprefix("kwargs_")


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the flat results: keys of a dict (or of a model output object), else ``output_i``."""
    spec = program.call_spec.out_spec
    assert spec is not None
    names: list[str] = []
    for path, _ in torch.utils._pytree.tree_flatten_with_path(
            torch.utils._pytree.tree_unflatten(list(range(spec.num_leaves)), spec))[0]:
        parts = [str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", "")))) for part in path]
        names.append("_".join(f"output_{part}" if part.isdigit() and index == 0 else part
                              for index, part in enumerate(parts)) or "output_0")
    return names


def _copy_nodes(module: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, Any], prefix: str) -> list[Any]:
    """Append a graph module's nodes to ``graph``, inlining nested ones; its results (nodes or constants)."""
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node not in env:
                env[node] = None
        elif node.op == "get_attr":
            env[node] = getattr(module, str(node.target))
        elif node.op == "output":
            results = argument(node, 0)
            return [_look_up(item, env) for item in (results if isinstance(results, (list, tuple)) else [results])]
        elif node.target is operator.getitem and not isinstance(env[argument(node, 0)], fx.Node):
            env[node] = env[argument(node, 0)][argument(node, 1)]
        elif str(node.target) in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            env[node] = _inline(node, graph, env, prefix)
        else:
            args, kwargs = _look_up((node.args, node.kwargs), env)
            made = env[node] = graph.call_function(node.target, args, kwargs)
            made.meta.update(val=node.meta.get("val"), stack=_module_stack(node, prefix))
    return []


def _look_up(value: Any, env: Mapping[fx.Node, Any]) -> Any:
    return torch.fx.node.map_aggregate(value, lambda item: env[item] if isinstance(item, fx.Node) else item)


def _inline(node: fx.Node, graph: fx.Graph, env: dict[fx.Node, Any], prefix: str) -> list[Any]:
    """The results of a region without gradients (detached) or with autocast off."""
    if str(node.target) == "wrap_with_autocast":
        enabled, body, args = argument(node, 2), argument(node, 4), node.args[5:]
        if enabled:
            where = "".join(f" of {path}" for path, *_ in _module_stack(node, prefix)[-1:])
            raise GraphError(f"a part{where} computes under autocast, which an operator graph cannot say; cast"
                             " explicitly, or capture the model in the dtype you train in")
        stop = False
    else:
        stop, body, args = not argument(node, 0), argument(node, 1), node.args[2:]
    inner = env[body]
    places = inner.graph.find_nodes(op="placeholder")
    given, origin = _look_up(args, env), dict[fx.Node, fx.Node]()
    if stop:
        first = next((item for item in inner.graph.nodes if item.op == "call_function"), node)
        outside, given = given, [_without_gradient(item, graph, _module_stack(first, prefix)) for item in given]
        origin = {made: item for made, item in zip(given, outside, strict=True) if made is not item}
    before = next(reversed(graph.nodes), None)
    results = _copy_nodes(inner, graph, dict(zip(places, given, strict=True)), prefix)
    if not stop:
        return results
    changed = {made: origin.get(item, item) for made, item in _change_values_only(graph, before).items()}
    detached = []
    for item in results:
        if isinstance(item, fx.Node) and item in changed:  # a tensor from outside, which keeps its gradient
            detached.append(changed[item])
            continue
        if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), Tensor):
            made = graph.call_function(aten.detach.default, (item,))
            made.meta.update(item.meta)
            item = made
        detached.append(item)
    return detached


def _without_gradient(item: Any, graph: fx.Graph, stack: tuple[tuple[str, str, int], ...]) -> Any:
    """A region's input, detached where it can have a gradient: what a region does with ``out=`` or in place has none.

    Buffers and inputs of the model (``given``) have none, and stay themselves, as the region may change them.
    """
    value = item.meta.get("val") if isinstance(item, fx.Node) else None
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()) or item.meta.get("given"):
        return item
    made = graph.call_function(aten.detach.default, (item,))
    made.meta.update(item.meta, stack=stack)
    return made


def _change_values_only(graph: fx.Graph, before: fx.Node | None) -> dict[fx.Node, fx.Node]:
    """After ``before``, change tensors in place through ``detach``: without gradients, the change has none.

    Returns for each change the tensor that it changed, which it stands for.
    """
    copied = list(itertools.takewhile(lambda node: node is not before, reversed(graph.nodes)))[::-1]
    changed: dict[fx.Node, fx.Node] = {}
    for node in copied:
        for item in written(node):
            source = changed.get(item, item)
            changed.setdefault(node, source)
            with graph.inserting_before(node):
                made = graph.call_function(aten.detach.default, (source,))
            made.meta.update(source.meta, stack=node.meta.get("stack", ()))
            node.replace_input_with(item, made)
    return {node: source for node, source in changed.items() if source not in copied}


def _module_stack(node: fx.Node, prefix: str) -> tuple[tuple[str, str, int], ...]:
    """The modules a node was recorded in, outermost first: path without ``prefix``, class name, number of the call."""
    found = []
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        path = path.partition("@")[0]
        if prefix and not f"{path}.".startswith(prefix):
            continue
        call = key.rpartition("@")[2] if "@" in key else "0"
        name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
        found.append((f"{path}.".removeprefix(prefix).rstrip("."), name, int(call)))
    return tuple(found)
