"""Whether a captured graph is its model: loss and all gradients on one microbatch, beside the model's own autograd.

The guard behind the rules for what an export cannot see: both run in eager mode on the same weights, inputs and random
numbers, and what differs is named. The model is called twice, so that state kept in Python shows. Random operators are
seeded by the shape that they fill, so that the order in which the graph runs them does not matter.

Left out: what only later steps would show, and models too large to run here (`asked`).
"""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves_with_path, tree_map_only

from mipipe.graphs.capture.python_state import changed_containers, containers
from mipipe.graphs.capture.seen import attributes_kept
from mipipe.graphs.coarse.graph_index import GraphIndex, index_graph
from mipipe.graphs.coarse.totals import argument_spec
from mipipe.graphs.errors import GraphError, MipipeError
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.profiling.rehearse import model_input
from mipipe.graphs.tracing.compose import parameter_tensors, run_step
from mipipe.graphs.tracing.parameter_slices import parse_slice

MAX_PARAMETERS, MAX_FLOPS = 20_000_000, 10 ** 10
"""What is verified unasked: some seconds of one CPU core for three forwards and backwards."""

_TOLERANCE = {"float64": (1e-5, 1e-4), "float32": (1e-3, 1e-2), "bfloat16": (0.1, 0.1), "float16": (0.1, 0.1)}
"""By the narrowest dtype: relative errors allowed, and the share of the largest gradient that counts as rounding."""


Progress = Callable[[str], None]


@dataclass(frozen=True)
class LossAndGradients:
    """A loss and gradients by parameter FQN, only those that are there."""

    loss: float
    gradients: dict[str, Tensor]


def asked(graph: OperatorGraph, wish: bool | None) -> bool:
    """Whether to verify: as wished, or where running the model here is a matter of seconds."""
    if wish is not None:
        return wish
    index = index_graph(graph)
    flops = sum(trace.flops(Phase.F) for trace in index.traces)
    size = sum(math.prod(item.spec.shape) for item in graph.parameters if item.tied_to is None)
    return size <= MAX_PARAMETERS and flops <= MAX_FLOPS


def noted(graph: OperatorGraph, module: nn.Module, inputs: Mapping[str, Any] | None, wish: bool | None,
          say: Progress, places: Sequence[int] = ()) -> OperatorGraph:
    """The graph, verified, or with the reason why it could not be among its warnings.

    Raises:
        GraphError: it differs from the module; or it could not be run, and that was wished for.
    """
    say("verifying against eager autograd")
    if any(item.is_meta for item in (*module.parameters(), *module.buffers())):
        reason = "the module has no values (meta device)"
    else:
        try:
            verify(graph, module, inputs, places)
            return graph
        except MipipeError:
            raise
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            reason = f"the model does not run on {'made-up' if inputs is None else 'the example'} inputs:" \
                     f" {type(error).__name__}: {line[:200]}"
    if wish:
        raise GraphError(f"model {graph.model}: cannot be verified: {reason}; leave --verify out")
    notes = [*graph.source.get("warnings", ()), f"not verified against eager autograd: {reason}"]
    return replace(graph, source={**graph.source, "warnings": notes})


def verify(graph: OperatorGraph, module: nn.Module, inputs: Mapping[str, Any] | None = None,
           places: Sequence[int] = ()) -> None:
    """Raise `GraphError` unless ``graph`` computes ``module``'s loss and gradients.

    Args:
        graph: captured from the module.
        module: with weights (no meta tensors); takes the graph's inputs by name and returns a mapping with the loss
            under ``graph.loss``. It is left as it was.
        inputs: one microbatch; None: made up (`mipipe.graphs.profiling.rehearse`).
        places: token ids that stand for images and the like in what is made up; the first stands for all there are.
    """
    index = index_graph(graph)
    differences: list[str] = []
    for attempt in range(2):  # routing decisions may fall apart over rounding: then not twice
        generator = torch.Generator().manual_seed(attempt)
        batch: Mapping[str, Any] = _made_up(index, generator, places) if inputs is None else inputs
        with _restored(module), torch.random.fork_rng(), seeded_by_shape(attempt):
            _unlike_a_fresh_one(module, graph, attempt)
            named = [*module.named_parameters(), *module.named_buffers()]
            start = {name.removeprefix("wrapped."): item.detach().clone() for name, item in named}
            held = containers(module)
            first = eager_step(module, _copied(batch), graph.loss)
            moved = changed_containers(module, held)
            now = [*module.named_parameters(), *module.named_buffers()]  # a forward may assign other tensors
            changed = {name.removeprefix("wrapped."): item.detach().clone() for name, item in now}
            with torch.no_grad():
                for name, item in now:
                    _set(item, start[name.removeprefix("wrapped.")])
            second = eager_step(module, _copied(batch), graph.loss)
            made = run_step(graph, parameter_tensors(graph, start), _by_name(_copied(batch)))
        _same_twice(graph, first, second, moved)
        differences = compare(graph, LossAndGradients(float(made.outputs[graph.loss]), made.gradients), first)
        differences += [f"{name} is changed by the forward, and the graph does not change it" for name in start
                        if name not in made.buffers and not _same_values(start[name], changed[name])]
        if not differences:
            return
    shown = [*differences[:6], *([f"and {len(differences) - 6} more"] if len(differences) > 6 else [])]
    raise GraphError(f"model {graph.model}: on one microbatch the captured graph differs from eager autograd:"
                     f" {'; '.join(shown)}; something in the model acts on values or gradients where an export does not"
                     " see it")


def _copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch for one call, which may change its inputs in place."""
    return tree_map_only(Tensor, lambda item: item.detach().clone(), dict(batch))


def _by_name(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as a graph takes it: tensors in lists and dicts by the names that an export gives them (``xs_0``)."""
    return {"_".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path): item
            for path, item in tree_leaves_with_path(dict(batch))}


def _set(item: Tensor, value: Tensor) -> None:
    """Give a tensor a value; one that has it already may be expanded, and then cannot be written."""
    if not torch.equal(item, value):
        item.copy_(value)


def _distance(one: Tensor, other: Tensor) -> float:
    """The norm of the difference; what is not finite in both alike is none."""
    alike = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).masked_fill(alike, 0).norm())


def _size(gradient: Tensor) -> float:
    return float(torch.where(gradient.isfinite(), gradient, 0).norm())


def _same_values(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))


def _made_up(index: GraphIndex, generator: torch.Generator, places: Sequence[int]) -> dict[str, Tensor]:
    """A microbatch of random inputs, in whose texts images have as many places as the model fills."""
    batch = {name: model_input(index, name, generator) for name in index.graph.inputs}
    ids = batch.get("input_ids")
    filled = [math.prod(argument_spec(trace, item.args[2]["ref"]).shape) // item.outputs[0].shape[-1]
              for trace in index.traces for item in trace.phase_operators(Phase.F)
              if item.kind.startswith("aten.masked_scatter")]
    if ids is not None and places:
        ids[torch.isin(ids, torch.tensor(places))] = 0
        ids[:, 1:1 + (filled or [0])[0] // len(ids)] = places[0]
    return batch


def _same_twice(graph: OperatorGraph, first: LossAndGradients, second: LossAndGradients, moved: str) -> None:
    differences = compare(graph, second, first, "the first call's")
    if differences:
        raise GraphError(f"model {graph.model}: two calls with the same weights, inputs and random numbers differ:"
                         f" {'; '.join(differences[:3])}; its forward depends on state in Python"
                         f" ({moved or 'a counter, a clock, other random numbers than those of torch'}), and a graph"
                         " keeps one value of it; make it a buffer")


def compare(graph: OperatorGraph, found: LossAndGradients, expected: LossAndGradients,
            whose: str = "eager") -> list[str]:
    """What differs beyond rounding, each with its name: the loss, then gradients from the largest error down."""
    kinds = {item.spec.dtype for item in graph.parameters if not item.buffer}
    kinds |= {value.spec.dtype for value in graph.values}
    allowed, share = next(_TOLERANCE[kind] for kind in reversed(_TOLERANCE) if kind in kinds or kind == "float64")
    differences = []
    alike = found.loss == expected.loss or (math.isnan(found.loss) and math.isnan(expected.loss))
    if not alike and not abs(found.loss - expected.loss) <= allowed * max(abs(expected.loss), 1e-3):
        differences.append(f"loss {found.loss:.6g}, {whose} {expected.loss:.6g}")
    largest = max((_size(grad) for grad in expected.gradients.values()), default=0.0)
    parts: dict[str, Tensor] = {}
    for name, gradient in found.gradients.items():  # slices of expert banks
        base, rows = parse_slice(name)
        if rows is None or base not in expected.gradients:
            parts[name] = gradient
        else:
            parts.setdefault(base, torch.zeros_like(expected.gradients[base]))[rows[0]:rows[1]] = gradient
    errors = []
    for name in {*parts, *expected.gradients}:
        one, other = parts.get(name), expected.gradients.get(name)
        size = 0.0 if other is None else _size(other)
        if one is None or other is None:
            error = float((other if one is None else one).norm())  # type: ignore[union-attr]
        else:
            error = _distance(one, other)
        relative = error / max(size, share * largest, 1e-30)
        if not relative <= allowed:
            errors.append((relative, name, "has no gradient" if one is None else f"is off by {relative:.2g}"
                           if other is not None else f"has a gradient that {whose} has not"))
    return differences + [f"{name} {text}" for _, name, text in sorted(errors, key=lambda item: -item[0])]


def eager_step(module: nn.Module, batch: Mapping[str, Any], loss: str) -> LossAndGradients:
    """The model's own loss and gradients."""
    module.zero_grad()
    with torch.enable_grad():
        value = module(**batch)[loss]
        if value.requires_grad:
            value.backward()
    return LossAndGradients(float(value.detach()), {name.removeprefix("wrapped."): item.grad.clone()
                                        for name, item in module.named_parameters() if item.grad is not None})


def _unlike_a_fresh_one(module: nn.Module, graph: OperatorGraph, seed: int) -> None:
    """Move weights a little where they are all zero: zeros (a residual's scale, LoRA's B) hide what is behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in module.parameters():
            if item.is_floating_point() and item.numel() and not item.any():
                item.add_(0.02 * torch.randn(item.shape, generator=generator).to(item))


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Afterwards, the module's tensors, gradients and attributes are what they were."""
    tensors = {item: item.detach().clone() for item in (*module.parameters(), *module.buffers())}
    gradients = {item: item.grad for item in module.parameters()}
    try:
        with attributes_kept(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        with torch.no_grad():
            for item, value in tensors.items():
                _set(item, value)
        for item, gradient in gradients.items():
            item.grad = gradient


class seeded_by_shape(TorchDispatchMode):
    """Inside, every random operator starts from a seed of its own, the shape of what it fills, and numbers go to the
    same places whatever the layout: a graph makes contiguous what leaves a segment, and kernels fill as memory lies."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            first = args[0] if args else None
            shape = list(first.shape) if isinstance(first, Tensor) else first
            torch.manual_seed(zlib.crc32(repr((self.seed, shape)).encode()))
            if isinstance(first, Tensor) and not first.is_contiguous():
                whole = first.contiguous()
                result = func(whole, *args[1:], **(kwargs or {}))
                if func._schema.is_mutable:
                    return first.copy_(whole)
                return tree_map_only(Tensor, lambda item: torch.empty_like(first, dtype=item.dtype).copy_(item)
                                     if item.shape == first.shape else item, result)
        return func(*args, **(kwargs or {}))


