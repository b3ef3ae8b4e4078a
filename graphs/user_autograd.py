"""What a model does to its own gradients in Python, kept through an export that sees only the forward.

A custom ``torch.autograd.Function`` and a hook on a tensor or parameter are calls of one operator each while the model
is exported; in the flat graph they become callables that run the user's own code. The segment's joint trace runs them
under autograd, so that its F, I and W hold the operators of the user's forward and backward, whatever they say.
Reentrant checkpointing (a Function of torch's own) is run plainly: where none of its inputs requires a gradient,
nothing inside it gets one, as in PyTorch.

Refused, with the class and the line: Functions that change their inputs or read parameters they are not given, hooks on
modules and autograd nodes, hooks after accumulation, hooks that a forward puts on a parameter anew each time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import Function
from torch.nn.modules import module as module_globals
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

from mipipe.graphs.errors import GraphError

CALL, HOOK = "mipipe.user_call.default", "mipipe.user_hook.default"
_APPLY: types.FunctionType = Function.__dict__["apply"].__func__
_PLAIN = types.FunctionType(_APPLY.__code__, _APPLY.__globals__, "apply", None, _APPLY.__closure__)
_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype)
_TENSOR = object()
"""Stands for the next tensor among a call's other arguments, or results."""


def line_of(thing: Any) -> str:
    """Where Python code is written, ``file.py:12``; its type's name where it has no source."""
    thing = inspect.unwrap(thing.func if isinstance(thing, functools.partial) else thing)
    code = getattr(thing, "__code__", None) or getattr(getattr(type(thing), "__call__", None), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else type(thing).__name__


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
        args, kwargs = tree_unflatten([next(given) if item is _TENSOR else item for item in self.arguments], self.spec)
        flat, spec = tree_flatten(_PLAIN(self.kind, *args, **kwargs))
        if [tensor._version for tensor in tensors] != versions:
            raise GraphError(f"autograd Function {self.kind.__qualname__} ({line_of(self.kind.forward)}) changes its"
                             " input in place, which an operator graph cannot say; return a new tensor")
        self.results = [_TENSOR if isinstance(item, Tensor) else item for item in flat], spec
        return [item for item in flat if isinstance(item, Tensor)]


@dataclass(eq=False)
class UserHook:
    """A tensor hook as a callable of its tensor: the identity, whose gradient goes through the hook."""

    hook: Callable[[Tensor], Tensor | None]
    number: int
    removed: bool = False
    ignored: bool = False
    __name__ = "user_hook"

    def __str__(self) -> str:
        return f"mipipe.user_hook.{self.number}"

    def remove(self) -> None:
        self.removed = True

    def __enter__(self) -> UserHook:
        return self

    def __exit__(self, *args: object) -> None:
        self.remove()

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.ops.aten.alias.default(x)
        if y.requires_grad:
            y.register_hook(self._run)
        return y

    def _run(self, grad: Tensor) -> Tensor | None:
        result = self.hook(grad)
        self.ignored = result is None
        return result


@dataclass(eq=False)
class UserCode:
    """What a model's forward was seen to do while it was exported: its Functions and hooks, by number."""

    model: str
    calls: list[UserCall] = field(default_factory=list)
    hooks: list[UserHook] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    def call(self, kind: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A Function's results, recorded as one operator; equal calls get one number, so that equal layers are alike.
        """
        if kind is CheckpointFunction:
            run, _, *inputs = args
            trains = any(isinstance(item, Tensor) and item.requires_grad for item in inputs)
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                return run(*inputs)
        flat, spec = tree_flatten((args, kwargs))
        tensors = [item for item in flat if isinstance(item, Tensor)]
        if not tensors:
            return _PLAIN(kind, *args, **kwargs)
        rest = [_TENSOR if isinstance(item, Tensor) else item for item in flat]
        number = len(self.calls)
        if all(item is _TENSOR or isinstance(item, _SIMPLE) for item in rest):
            text = [None if item is _TENSOR else repr(item) for item in rest]
            number = self.known.setdefault(f"{id(kind)} {text} {spec}", number)
        if number == len(self.calls):
            self.calls.append(UserCall(kind, rest, spec, number))
        made = iter(torch.ops.mipipe.user_call(tensors, number))
        results = self.calls[number].results
        assert results is not None
        return tree_unflatten([next(made) if item is _TENSOR else item for item in results[0]], results[1])

    def hook(self, tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> UserHook:
        """A hook on a tensor of the forward, recorded as one operator."""
        if isinstance(tensor, nn.Parameter) or tensor.is_leaf:
            raise GraphError(f"model {self.model}: its forward registers a hook ({line_of(hook)}) on a parameter or"
                             " input, one more in every call; register it once, outside the forward")
        made = UserHook(hook, len(self.hooks))
        self.hooks.append(made)
        torch.ops.mipipe.user_hook(tensor, made.number)
        return made

    def warnings(self) -> list[str]:
        """What hooks do beside the gradient, which a run will not do."""
        return [f"the hook at {line_of(made.hook)} returns nothing: gradients stay as they are, and what else it does"
                " does not happen in training" for made in self.hooks if made.ignored and not made.removed]

    def settle(self, graph: fx.Graph, parameters: dict[fx.Node, Sequence[Any]]) -> dict[fx.Node, fx.Node]:
        """Put every hook between its tensor and all readers of it; which node stands for which from now on.

        Args:
            graph: flat, with hooks recorded in the forward as nodes.
            parameters: hooks of parameters, by placeholder.
        """
        for node in graph.nodes:
            if str(node.target) in (CALL, HOOK):
                node.target = (self.calls if str(node.target) == CALL else self.hooks)[node.args[1]]
                node.args = node.args[:1]
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        instead: dict[fx.Node, fx.Node] = {}
        pairs = [(node, node.args[0], node.target) for node in graph.nodes if isinstance(node.target, UserHook)]
        for place, hooks in parameters.items():
            for hook in hooks:
                self.hooks.append(UserHook(hook, len(self.hooks)))
                pairs.append((None, place, self.hooks[-1]))
        for node, tensor, hook in pairs:
            if node is not None:
                graph.erase_node(node)
            if hook.removed or not tensor.users:
                continue
            reader = min(tensor.users)
            with graph.inserting_after(last if tensor.op == "placeholder" else tensor):
                made = graph.call_function(hook, ())
            made.meta.update(val=tensor.meta["val"], stack=(reader if tensor.op == "placeholder" else tensor)
                             .meta.get("stack", ()))
            tensor.replace_all_uses_with(made)
            made.args = (tensor,)
            instead.setdefault(tensor, made)
        return instead


_ACTIVE: list[UserCode] = []


def _intercepted(kind: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``kind.apply(*args, **kwargs)`` while some model is exported: recorded if it is the model that calls."""
    tracing = torch._ops._get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY) is not None
    return _ACTIVE[-1].call(kind, args, kwargs) if tracing and _ACTIVE else _PLAIN(kind, *args, **kwargs)


class _Template:
    """Holds the code that `Function.apply` has during an export."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        from mipipe.graphs.user_autograd import _intercepted

        assert __class__ is not None  # type: ignore[name-defined]  # noqa: F821  (the cell that the original has)
        return _intercepted(cls, args, kwargs)  # type: ignore[arg-type]


@contextlib.contextmanager
def watched(module: nn.Module, name: str) -> Iterator[UserCode]:
    """Inside, an export of ``module`` records custom Functions and tensor hooks.

    The code of ``Function.apply`` is exchanged, not the attribute: models keep ``apply = MyFunction.apply``.

    Raises:
        GraphError: something in the model acts on gradients in a way that is not supported.
    """
    refuse_hooks(module, name)
    code, register, node_hook = UserCode(name), Tensor.register_hook, Function._register_hook
    before = _APPLY.__code__

    def refuse(*args: Any) -> Any:
        raise GraphError(f"model {name}: its forward registers a hook ({line_of(args[-1])}) on an autograd node or"
                         " after accumulation, which an operator graph cannot say; use tensor.register_hook")

    accumulated = Tensor.register_post_accumulate_grad_hook
    _ACTIVE.append(code)
    try:
        _APPLY.__code__ = _Template.__dict__["apply"].__func__.__code__
        Tensor.register_hook = lambda tensor, hook: (  # type: ignore[method-assign,assignment]
            code.hook(tensor, hook) if tensor.requires_grad else register(tensor, hook))
        Tensor.register_post_accumulate_grad_hook = refuse  # type: ignore[method-assign,assignment]
        Function._register_hook = staticmethod(refuse)  # type: ignore[method-assign]
        yield code
    finally:
        _APPLY.__code__ = before
        Tensor.register_hook = register  # type: ignore[method-assign]
        Tensor.register_post_accumulate_grad_hook = accumulated  # type: ignore[method-assign]
        Function._register_hook = staticmethod(node_hook)  # type: ignore[method-assign]
        _ACTIVE.remove(code)
    refuse_hooks(module, name)


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raise `GraphError` for hooks that act on gradients and have no form in an operator graph."""
    for path, part in module.named_modules():
        for hook in (*part._backward_hooks.values(), *part._backward_pre_hooks.values()):
            raise GraphError(f"model {name}: module {path or 'itself'} ({type(part).__name__}) has a backward hook"
                             f" ({line_of(hook)}), which an operator graph cannot say; use tensor.register_hook in its"
                             " forward")
    for hook in (*module_globals._global_backward_hooks.values(), *module_globals._global_backward_pre_hooks.values()):
        raise GraphError(f"model {name}: a backward hook on all modules is registered ({line_of(hook)}); remove it")
    for path, parameter in module.named_parameters():
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            raise GraphError(f"model {name}: parameter {path} has a hook after accumulation ({line_of(hook)}), which an"
                             " operator graph cannot say; do this after the step, or use parameter.register_hook")


def _call(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
    """New tensors like a Function's results (which may be its inputs, where an operator's may not)."""
    with torch.no_grad():
        return [item.clone() for item in _ACTIVE[-1].calls[number](tensors)]


def _define() -> None:
    """Register the operators that stand for a call and a hook during an export; only on fake tensors."""
    call = torch.library.custom_op("mipipe::user_call", _call, mutates_args=(),
                                   schema="(Tensor[] tensors, int number) -> Tensor[]")
    call.register_fake(_call)
    call.register_autograd(lambda ctx, grads: (None, None))
    hook = torch.library.custom_op("mipipe::user_hook", lambda x, number: x.clone(), mutates_args=(),
                                   schema="(Tensor x, int number) -> Tensor")
    hook.register_fake(lambda x, number: torch.empty_like(x))
    hook.register_autograd(lambda ctx, grad: (None, None))
    fx.node.has_side_effect(torch.ops.mipipe.user_hook.default)


_define()
