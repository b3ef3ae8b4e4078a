"""What stands for a model's own code in a flat graph: calls of custom Functions and hooks, as callables of tensors.

They are recorded by `mipipe.graphs.capture.user_autograd`, and run when a segment's joint function is traced.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import random
import secrets
import sys
import traceback
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from mipipe.graphs.errors import GraphError
from mipipe.graphs.tracing.phase_split import ancestors, closure

APPLY: types.FunctionType = Function.__dict__["apply"].__func__
plain_apply = types.FunctionType(APPLY.__code__, APPLY.__globals__, "apply", None, APPLY.__closure__)
_TORCH, _OWN = str(Path(torch.__file__).parent), str(Path(__file__).parent)
_DRAWING = (random.__file__, secrets.__file__, uuid.__file__)
"""Python's own modules that draw random numbers for those who call them."""
_PACKAGE = str(Path(__file__).parent.parent)
TENSOR = object()
"""Stands for the next tensor among a call's other arguments, or results."""


def line_of(thing: Any) -> str:
    """Where Python code is written, ``file.py:12``; its type's name where it has no source."""
    thing = inspect.unwrap(thing.func if isinstance(thing, functools.partial) else thing)
    method = vars(type(thing)).get("__call__")  # of an object that is called
    code = getattr(thing, "__code__", None) or getattr(method, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else type(thing).__name__


def calling_line(module: nn.Module | None = None) -> str:
    """The innermost line being executed that is neither torch's nor ours: ``file.py:12``; where torch alone wraps the
    forward of ``module`` (a decorator), that is where the forward is written."""
    frame: Any = sys._getframe(1)
    inside = False
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _OWN, *_DRAWING, "<")):
        inside |= frame.f_code.co_filename.startswith(_TORCH)
        if module is not None and inside and frame.f_code.co_filename.startswith(_OWN):  # the export began here
            written: Any = type(getattr(module, "wrapped", module))
            return line_of(written.forward)
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def line_of_hook(hook: Any) -> str:
    """Where a hook is written; where a forward registers it, if it is torch's that runs the model's own."""
    line = line_of(hook)
    return calling_line() if line.startswith(_TORCH) else line


def drawn_by_torch() -> bool:
    """Whether torch itself draws the random numbers that are being drawn."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OWN, *_DRAWING)):
        frame = frame.f_back
    return bool(frame.f_code.co_filename.startswith(_TORCH))


def line_of_error(chain: Sequence[BaseException]) -> str:
    """The model's own line at which an error arose, `` at file.py:12 `code` ``; empty where there is none.

    Args:
        chain: the error and what it was raised from, outermost first.
    """
    for item in reversed(chain):
        frames = [frame for frame in traceback.extract_tb(item.__traceback__)
                  if not frame.filename.startswith((_TORCH, _PACKAGE, "<"))]
        if frames:
            last = frames[-1]
            code = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
            return f" at {last.filename}:{last.lineno} `{code}`"
    return ""


@dataclass(eq=False)
class UserCall:
    """A custom Function as a callable of its tensors: the user's forward and, under autograd, the user's backward."""

    kind: type[Function]
    arguments: list[Any]
    spec: Any
    number: int
    results: tuple[list[Any], Any] | None = None
    tags: tuple[torch.Tag, ...] = (torch.Tag.nondeterministic_seeded,)  # opaque: never computed twice

    @property
    def __name__(self) -> str:
        return f"user_{self.kind.__name__.lower()}"

    def __str__(self) -> str:
        return f"mipipe.user_call.{self.kind.__module__}.{self.kind.__qualname__}.{self.number}"

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        versions, given = [tensor._version for tensor in tensors], iter(tensors)
        args, kwargs = tree_unflatten([next(given) if item is TENSOR else item for item in self.arguments], self.spec)
        flat, spec = tree_flatten(plain_apply(self.kind, *args, **kwargs))
        if [tensor._version for tensor in tensors] != versions:
            raise GraphError(f"autograd Function {self.kind.__qualname__} ({line_of(self.kind.forward)}) changes its"
                             " input in place, which an operator graph cannot say; return a new tensor")
        self.results = [TENSOR if isinstance(item, Tensor) else item for item in flat], spec
        return [item for item in flat if isinstance(item, Tensor)]


@dataclass(eq=False)
class UserHook:
    """A tensor hook as a callable of its tensor: the identity, whose gradient goes through the hook.

    ``closed`` are the tensors that the hook reads beside the gradient, which the callable is given too (each under all
    identities it has had); ``names`` are those of the model's own among them. ``value``: what stands for the result
    in an export, if it is a copy of the tensor and not the tensor itself.
    """

    hook: Callable[[Tensor], Tensor | None]
    number: int
    closed: list[tuple[Tensor, ...]]
    names: dict[int, str] = field(default_factory=dict)
    removed: bool = False
    ignored: bool = False
    value: Tensor | None = None
    tags: tuple[torch.Tag, ...] = (torch.Tag.nondeterministic_seeded,)
    __name__ = "user_hook"

    def __str__(self) -> str:
        return f"mipipe.user_hook.{self.number}"

    def remove(self) -> None:
        self.removed = True

    def __enter__(self) -> UserHook:
        return self

    def __exit__(self, *args: object) -> None:
        self.remove()

    def __call__(self, x: Tensor, closed: Sequence[Tensor]) -> Tensor:
        y = torch.ops.aten.alias.default(x) if self.value is None else x.clone()
        table = {id(item): tensor.detach() for items, tensor in zip(self.closed, closed, strict=True) for item in items}

        def run(grad: Tensor) -> Tensor | None:
            with Instead(table):
                result = self.hook(grad)
            self.ignored = result is None
            return result

        if y.requires_grad:
            y.register_hook(run)
        return y


class Instead(torch.overrides.TorchFunctionMode):
    """Inside, some tensors (by identity) are others."""

    def __init__(self, table: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda item: self.table.get(id(item), item), (args, kwargs or {}))
        return func(*args, **kwargs)


class Reads(TorchDispatchMode):
    """Collects the tensors that operators read and that neither are given nor were made inside."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.known: dict[int, Tensor] = {id(item): item for item in given}
        self.others: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for item in tree_flatten((args, kwargs))[0]:
            if isinstance(item, Tensor) and id(item) not in self.known and "lift_fresh" not in str(func):
                self.others[id(item)] = item
        result = func(*args, **kwargs)
        self.known.update((id(item), item) for item in tree_flatten(result)[0] if isinstance(item, Tensor))
        return result


def copy_between(graph: fx.Graph, wanted: Sequence[fx.Node], start: fx.Node) -> dict[fx.Node, fx.Node]:
    """Copies of all that is between ``start`` and ``wanted``: a hook cannot read what its own tensor's readers make."""
    before, after = ancestors(wanted), closure([start], lambda node: node.users)
    own: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node in before and node in after and node is not start]:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise GraphError(f"a gradient hook reads a tensor made of random numbers ({node.target}) and of the tensor"
                             " it is on; make the tensor outside of the hook's own")
        own[node] = graph.node_copy(node, lambda item: own.get(item, item))
    return own


def sort_nodes(graph: fx.Graph) -> None:
    """Put nodes into a topological order that is near to the one they have."""
    order: dict[fx.Node, None] = {}
    for first in list(graph.nodes):
        pending = [first]
        while pending:
            node = pending[-1]
            open_nodes = [item for item in node.all_input_nodes if item not in order]
            if open_nodes and node not in order:
                pending.extend(open_nodes)
            else:
                order.setdefault(pending.pop())
    nodes = list(order)
    for before, node in itertools.pairwise(nodes):
        before.append(node)
