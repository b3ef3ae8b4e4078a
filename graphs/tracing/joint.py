"""The joint function of a segment as one fx graph: forward, input gradients and parameter gradients, without mutation.

`trace_joint` runs the segment under autograd on fake tensors (nothing is computed, no statistic moves), records what
is dispatched, removes in-place operations, and makes every tensor that leaves the segment contiguous and owner of its
storage. `mipipe.graphs.tracing.partition` then cuts it into F, I and W.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mipipe.graphs.operators.expert_kernels
import mipipe.graphs.operators.kernels  # noqa: F401  (both register mipipe's operators)
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import TensorSpec
from mipipe.graphs.operators.plain_attention import plain_attention, trains
from mipipe.graphs.tracing.simplify import simplify, split_convolutions
from mipipe.graphs.tracing.storages import mutates, own_storages

JointFunction = Callable[..., Sequence[Tensor]]
aten = torch.ops.aten

_ALIASES = {"aten.detach.default", "aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default"}
_EFFECTLESS = {"aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten._assert_scalar.default"}


@dataclass(frozen=True)
class Joint:
    """The traced graph and where its boundary tensors are: nodes, None where there is none.

    ``arguments`` are the placeholders of inputs, parameters and buffers, ``tangents[i]`` that of output i's gradient.
    """

    graph: fx.Graph
    arguments: tuple[fx.Node, ...]
    tangents: tuple[fx.Node | None, ...]
    outputs: tuple[fx.Node | None, ...]
    updates: dict[int, fx.Node | None]
    grads: tuple[fx.Node | None, ...]
    mode: FakeTensorMode


@contextlib.contextmanager
def no_stack_traces() -> Iterator[None]:
    """Inside, tracers record no stack trace for every node, which nothing here reads: a tenth of the time."""
    before = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = before


PORTABLE = {operator: formula for operator, formula in get_decompositions(
    [torch.ops.aten.log_sigmoid_forward, torch.ops.aten.log_sigmoid_backward]).items()
    if isinstance(operator, torch._ops.OpOverload)}
"""Operators whose results have other shapes on other devices (what a CPU keeps for the backward), as their formulas."""


def empty_tensor(spec: TensorSpec) -> Tensor:
    """An uninitialised tensor on the CPU (fake inside a FakeTensorMode)."""
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="cpu")


def output_mask(function: JointFunction, specs: Sequence[TensorSpec], differentiable: Sequence[bool]) -> tuple[bool,
                                                                                                               ...]:
    """Which outputs of a function require gradients when the given arguments do; runs it on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), attention_mode():
        arguments = [empty_tensor(spec).requires_grad_(flag) for spec, flag in zip(specs, differentiable, strict=True)]
        outputs = function(*[x.clone() if x.requires_grad else x for x in arguments])  # leaves may not change in place
        return tuple(output.requires_grad for output in outputs)


def trace_joint(function: JointFunction, specs: Sequence[TensorSpec], differentiable: Sequence[bool],
                wanted: Sequence[bool] | None, first_state: int) -> Joint:
    """The joint graph of ``function(*arguments) -> outputs``.

    Args:
        function: tensors to a sequence of tensors; may change its arguments in place (buffers, clamped parameters).
        specs: of all arguments; those from ``first_state`` on are parameters and buffers, whose new values are results.
        differentiable: for each argument, whether its gradient is asked for.
        wanted: for each output, whether a gradient arrives for it; None: wherever one can.
    """
    masks: list[list[bool]] = []
    changed: list[list[int]] = []

    def joint(arguments: list[Tensor], tangents: list[Tensor]) -> list[Tensor | None]:
        leaves = [x.detach().requires_grad_() if flag else x for x, flag in zip(arguments, differentiable, strict=True)]
        with torch.enable_grad(), attention_mode():  # the clones may be changed in place, leaves may not
            given = [x.clone() if x.requires_grad else x for x in leaves]
            outputs = list(function(*given))
        able = [output.requires_grad for output in outputs]
        masks.append([a and (wanted is None or wanted[i]) for i, a in enumerate(able)])
        changed.append([i for i, x in enumerate(given) if i >= first_state and x is not leaves[i] and x._version])
        roots = [(output, tangents[i]) for i, output in enumerate(outputs) if masks[-1][i]]
        asked = [leaf for leaf, flag in zip(leaves, differentiable, strict=True) if flag]
        grads: tuple[Tensor | None, ...] = (None,) * len(asked)
        if roots and asked:
            ends, seeds = zip(*roots, strict=True)
            grads = torch.autograd.grad(ends, asked, seeds, allow_unused=True)
            if any(grad is not None and grad.layout is not torch.strided for grad in grads):
                raise GraphError("a parameter's gradient is sparse, which an operator graph cannot say; make the"
                                 " embedding without sparse=True")
        return [*outputs, *[given[i].detach() for i in changed[-1]], *grads]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = [empty_tensor(spec) for spec in specs]
        with torch.no_grad():
            shapes = [(tuple(output.shape), output.dtype) for output in function(*[x.clone() for x in arguments])]
        tangents = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    with mode, no_stack_traces():
        with fx.traceback.preserve_node_meta():
            module = make_fx(joint, tracing_mode="fake", decomposition_table=PORTABLE)(arguments, tangents)
        _declare_batch_norm(module)
        if any(map(mutates, module.graph.nodes)):
            flat = arguments + tangents
            with fx.traceback.preserve_node_meta():
                module = make_fx(torch.func.functionalize(module_on_lists(module, len(arguments)), remove="mutations"),
                                 tracing_mode="fake")(*flat)
    _check_portable(module.graph)
    return _tidy(module, (first_state, changed[-1]), arguments, tangents, mode, masks[-1], differentiable)


def _check_portable(graph: fx.Graph) -> None:
    """Raise `GraphError` where the graph calls a kernel that only CPUs have: it would fail on every other device."""
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_function" else ""
        if "mkldnn" in name or "_for_cpu" in name:
            raise GraphError(f"the model calls {name}, which only CPUs have, and its graph would be for these alone;"
                             " call the public operator (torch.nn.functional), or capture with another implementation"
                             " of it")


def module_on_lists(module: fx.GraphModule, count: int) -> Callable[..., Any]:
    """``module([arguments], [tangents])`` as a function of flat tensors, the first ``count`` being arguments.

    It is interpreted node by node, so that what is traced keeps its nodes' module paths.
    """
    return lambda *flat: fx.Interpreter(module).run(list(flat[:count]), list(flat[count:]))


class attention_mode(torch.overrides.TorchFunctionMode):
    """Inside: F.scaled_dot_product_attention without dropout is `kernels.attention`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return attention_call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention_call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                   is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """F.scaled_dot_product_attention, as one operator where it can be (no dropout, no mask that trains)."""
    if dropout_p > 0.0 or trains(attn_mask):
        return plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lead = query.shape[:-3]
    four = [x.reshape(-1, *x.shape[-3:]) if x.dim() >= 3 else x[None, None] for x in (query, key, value)]
    mask = attn_mask
    if mask is not None and mask.dim() > 4:
        mask = mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
    out, _ = torch.ops.mipipe.attention(*four, mask, None, is_causal, 0, float(scale), 0.0)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _is_copy_of(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Whether a node is a plain clone of an argument: pointless once nothing is changed in place."""
    return str(node.target) == "aten.clone.default" and node.args[0] in inputs and not node.kwargs


def _declare_batch_norm(module: fx.GraphModule) -> None:
    """Say that batch norm in training updates its running statistics, and that its backward does not read them.

    The schema of native_batch_norm hides the first; the second would make I wait for the old statistics.
    """
    for node in module.graph.nodes:
        if str(node.target) == "aten.native_batch_norm.default" and node.args[5] and node.args[3] is not None:
            node.target = aten._native_batch_norm_legit.default
        elif str(node.target) == "aten.native_batch_norm_backward.default" and node.args[7]:
            node.args = (*node.args[:3], None, None, *node.args[5:])
    module.recompile()


def _tidy(module: fx.GraphModule, state: tuple[int, Sequence[int]], arguments: Sequence[Tensor],
          tangents: Sequence[Tensor], mode: FakeTensorMode, mask: Sequence[bool],
          differentiable: Sequence[bool]) -> Joint:
    """A `Joint` from a traced module with flat results: outputs, new values, gradients of the differentiable arguments.

    ``state``: the first argument that is a parameter or buffer, and the trained ones whose new values are results.
    """
    graph = module.graph
    _inline_constants(module)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = placeholders[:len(arguments)]
    updates = {index: node for index, node in _take_updates(graph, inputs).items() if index >= state[0]}
    result = next(node for node in graph.nodes if node.op == "output")
    flat, ends = list(result.args[0]), len(mask) + len(state[1])
    updates.update(zip(state[1], flat[len(mask):ends], strict=True))
    result.args = ([*flat[:len(mask)], *updates.values(), *flat[ends:]],)
    for node in list(graph.nodes):
        if str(node.target) in _ALIASES or _is_copy_of(node, inputs):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif str(node.target) in _EFFECTLESS:
            graph.erase_node(node)
    split_convolutions(graph)
    simplify(graph)
    propagate(graph, [*arguments, *tangents], mode)
    owned = own_storages(graph, result, result.args[0], mode)
    result.args = ([node for node in owned if node is not None],)
    first, last = len(mask), len(mask) + len(updates)
    grads = iter(owned[last:])
    return Joint(graph, tuple(inputs),
                 tuple(node if flag else None for node, flag in zip(placeholders[len(inputs):], mask, strict=True)),
                 tuple(owned[:first]), dict(zip(updates, owned[first:last], strict=True)),
                 tuple(next(grads) if flag else None for flag in differentiable), mode)


def propagate(graph: fx.Graph, arguments: Sequence[Tensor], mode: FakeTensorMode) -> None:
    """Set ``meta["val"]`` of every node by running the graph on fake tensors: views really share storages there."""
    given = iter(arguments)
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = next(given)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def _inline_constants(module: fx.GraphModule) -> None:
    """Replace attributes of the module (tensors written in the model's code) by operators that make them."""
    graph = module.graph
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if not isinstance(value, Tensor) or value.numel() > 4096 or isinstance(value, torch.nn.Parameter):
            shape = tuple(getattr(value, "shape", ()))
            raise GraphError(f"the segment closes over {node.target} of shape {shape}: make it a buffer"
                             " (register_buffer), so that it is an input of the function")
        with graph.inserting_before(node):
            made = graph.call_function(make_constant, (value.tolist(), value.dtype))
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def make_constant(data: Any, dtype: torch.dtype) -> Tensor:
    """A small tensor from its values; stands in graphs for tensors written in the model's code."""
    return torch.tensor(data, dtype=dtype)


def _take_updates(graph: fx.Graph, arguments: Sequence[fx.Node]) -> dict[int, fx.Node]:
    """The new values of arguments that the function changed in place, by position; removes their final copies.

    A segment's inputs are values of other segments: they are never changed, the new value lives on inside.
    """
    updates: dict[int, fx.Node] = {}
    for node in [node for node in graph.nodes if str(node.target) == "aten.copy_.default"]:
        target, value = node.args[:2]
        if target in arguments:
            updates[arguments.index(target)] = value
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    return updates
