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
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import Function, _HookMixin
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

from mipipe.graphs.capture.refused_hooks import refuse_hooks
from mipipe.graphs.capture.user_calls import (
    APPLY,
    TENSOR,
    Reads,
    UserCall,
    UserHook,
    calling_line,
    copy_between,
    drawn_by_torch,
    line_of,
    line_of_hook,
    plain_apply,
    sort_nodes,
)
from mipipe.graphs.errors import GraphError
from mipipe.graphs.tracing.storages import origin, storage_of, written

_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype)
CALL, HOOK = "mipipe.user_call.default", "mipipe.user_hook.default"


@dataclass(eq=False)
class UserCode:
    """What a model's forward was seen to do while it was exported: its Functions and hooks, by number."""

    module: nn.Module
    model: str
    prefix: str
    calls: list[UserCall] = field(default_factory=list)
    hooks: list[UserHook] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)
    blocked: dict[str, None] = field(default_factory=dict)
    seeded: dict[str, None] = field(default_factory=dict)

    def call(self, kind: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A Function's results, recorded as one operator; equal calls get one number, so that equal layers are alike.
        """
        if kind is CheckpointFunction:
            run, _, *inputs = args
            trains = any(isinstance(item, Tensor) and item.requires_grad for item in inputs)
            if not trains and torch.is_grad_enabled():
                self.blocked[calling_line()] = None
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                return run(*inputs)
        flat, spec = tree_flatten((args, kwargs))
        tensors = [item for item in flat if isinstance(item, Tensor)]
        if not tensors:
            return plain_apply(kind, *args, **kwargs)
        rest = [TENSOR if isinstance(item, Tensor) else item for item in flat]
        number = len(self.calls)
        if all(item is TENSOR or isinstance(item, _SIMPLE) for item in rest):
            text = [None if item is TENSOR else repr(item) for item in rest]
            number = self.known.setdefault(f"{id(kind)} {text} {spec}", number)
        if number == len(self.calls):
            self.calls.append(UserCall(kind, rest, spec, number))
        made = iter(torch.ops.mipipe.user_call(tensors, number))
        results = self.calls[number].results
        assert results is not None
        return tree_unflatten([next(made) if item is TENSOR else item for item in results[0]], results[1])

    def hook(self, tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> UserHook:
        """A hook on a tensor of the forward, recorded as one operator."""
        if isinstance(tensor, nn.Parameter) or tensor.is_leaf:
            raise GraphError(f"model {self.model}: its forward registers a hook ({line_of(hook)}) on a parameter or"
                             " input, one more in every call; register it once, outside the forward")
        with disable_proxy_modes_tracing():
            closed = [item for item in self._closed(hook, torch.empty_like(tensor, requires_grad=False))
                      if isinstance(item, FakeTensor)]
        known = {id(item): name for item, name in self.named()}
        names = {id(item): known[id(item)] for item in closed if id(item) in known}
        made = UserHook(hook, len(self.hooks), [(item,) for item in closed], names)
        self.hooks.append(made)
        torch.ops.mipipe.user_hook(tensor, closed, made.number)
        return made

    def named(self) -> list[tuple[Tensor, str]]:
        """The model's parameters and buffers as they are at this moment (fake ones in an export), with their FQNs."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return [(tensor, name.removeprefix(self.prefix)) for name, tensor in named]

    def _closed(self, hook: Callable[[Tensor], Tensor | None], grad: Tensor) -> list[Tensor]:
        """The tensors that a hook reads beside the gradient: of the forward, or the model's; it is run once for it."""
        try:
            with torch.no_grad(), Reads([grad]) as reads:
                hook(grad)
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            raise GraphError(f"model {self.model}: the gradient hook at {line_of_hook(hook)} cannot be traced:"
                             f" {type(error).__name__}: {line[:200]}; write it with tensor operations only") from error
        return list(reads.others.values())

    def warnings(self) -> list[str]:
        """What a person might not expect: checkpoints through which no gradient passes, hooks for something else."""
        found = [f"the reentrant checkpoint at {line} is given nothing that requires a gradient, so that nothing inside"
                 " it trains, here as in PyTorch; pass use_reentrant=False" for line in self.blocked]
        return found + [f"the hook at {line_of(made.hook)} returns nothing: gradients stay as they are, and what else"
                        " it does is not done in training" for made in self.hooks if made.ignored and not made.removed]

    def settle(self, graph: fx.Graph, nodes: Mapping[str, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Make calls of the recorded operators, and put every hook between its tensor and all that reads it.

        Args:
            graph: flat; changed in place.
            nodes: placeholders of parameters and buffers by FQN.

        Returns:
            Which node stands for a hooked one from now on.
        """
        now = {name: tensor for tensor, name in self.named()}
        for made in self.hooks:
            made.closed = [(*items, now[made.names[id(items[0])]]) if id(items[0]) in made.names else items
                           for items in made.closed]
        pairs: list[tuple[fx.Node, tuple[Any, ...], UserHook]] = []
        for node in graph.nodes:
            if str(node.target) == CALL:
                node.target, node.args = self.calls[node.args[1]], node.args[:1]
            elif str(node.target) == HOOK:
                pairs.append((node.args[0], (node.args[1],), self.hooks[node.args[2]]))
        for node in [node for node in graph.nodes if str(node.target) == HOOK]:
            graph.erase_node(node)
        for name, parameter in self.module.named_parameters():
            place = nodes.get(name.removeprefix(self.prefix))
            if place is not None:
                pairs += [(place, *self._parameter_hook(hook, parameter, nodes))
                          for hook in (parameter._backward_hooks or {}).values()]
        instead: dict[fx.Node, fx.Node] = {}
        for tensor, closed, made in pairs:
            if made.removed or (tensor.op == "placeholder" and not tensor.users):
                continue
            home = min(tensor.users) if tensor.op == "placeholder" else tensor
            node = graph.call_function(made, ())
            self._settle_changes(graph, tensor, made)
            value = tensor.meta["val"] if made.value is None else made.value
            node.meta.update(val=value, stack=home.meta.get("stack", ()))
            own = copy_between(graph, closed[0], tensor)
            copies = set(own.values())
            for reader in [item for item in tensor.users if item not in copies]:
                reader.replace_input_with(tensor, node)
            node.args = (tensor, [own.get(item, item) for item in closed[0]])
            instead.setdefault(tensor, node)
        sort_nodes(graph)
        return instead

    def _settle_changes(self, graph: fx.Graph, tensor: fx.Node, made: UserHook) -> None:
        """Have a hook see the gradient of its tensor before it is changed in place, as autograd does: of a copy."""
        storage = storage_of(tensor)
        changed = any(tensor < node and storage_of(item) == storage for node in graph.nodes for item in written(node))
        if not changed or tensor.op == "placeholder":
            return
        if origin(tensor) is not tensor:
            raise GraphError(f"model {self.model}: a gradient hook ({line_of(made.hook)}) is on a view of a tensor that"
                             " is changed in place later, which an operator graph cannot say; compute a new tensor"
                             " instead")
        value: Any = tensor.meta["val"]
        made.value = value
        with value.fake_mode:
            tensor.meta["val"] = value.detach().clone()

    def _parameter_hook(self, hook: Callable[[Tensor], Tensor | None], parameter: Tensor,
                        nodes: Mapping[str, fx.Node]) -> tuple[tuple[Any, ...], UserHook]:
        """A parameter's hook, with the nodes of the model's own tensors that it reads."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            read = self._closed(hook, grad)
        names = {id(tensor): name for tensor, name in self.named()}
        closed = [item for item in read if names.get(id(item)) in nodes]
        self.hooks.append(UserHook(hook, len(self.hooks), [(item,) for item in closed]))
        return ([nodes[names[id(item)]] for item in closed],), self.hooks[-1]


_ACTIVE: list[UserCode] = []


def _intercepted(kind: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``kind.apply(*args, **kwargs)`` while some model is exported: recorded if it is the model that calls."""
    return _ACTIVE[-1].call(kind, args, kwargs) if _tracing() else plain_apply(kind, *args, **kwargs)


def _tracing() -> bool:
    """Whether it is an exported model's own code that runs, in this thread, and no operator's."""
    proxy = torch._C._TorchDispatchModeKey.PROXY
    return bool(_ACTIVE) and torch._ops._get_dispatch_mode_pre_dispatch(proxy) is not None


class _Template:
    """Holds the code that `Function.apply` has during an export."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        from mipipe.graphs.capture.user_autograd import _intercepted

        assert __class__ is not None  # type: ignore[name-defined]
        return _intercepted(cls, args, kwargs)  # type: ignore[arg-type]


@contextlib.contextmanager
def watched(module: nn.Module, name: str, prefix: str) -> Iterator[UserCode]:
    """Inside, an export of ``module`` records custom Functions and tensor hooks.

    The code of ``Function.apply`` is exchanged, not the attribute: models keep ``apply = MyFunction.apply``.

    Raises:
        GraphError: something in the model acts on gradients in a way that is not supported.
    """
    refuse_hooks(module, name, prefix)
    code, register, before = UserCode(module, name, prefix), Tensor.register_hook, APPLY.__code__
    exchange = [(Tensor, "register_hook", lambda tensor, hook: (
                     code.hook(tensor, hook) if tensor.requires_grad else register(tensor, hook))),
                *((owner, attribute, _refusing(name, text, owner.__dict__[attribute], flag))
                  for owner, attribute, text, flag in _REFUSED),
                *((owner, attribute, _noting(code, owner.__dict__[attribute]))
                  for owner in (torch, torch.random) for attribute in ("manual_seed", "set_rng_state"))]
    kept = [(owner, attribute, owner.__dict__[attribute]) for owner, attribute, _ in exchange]
    _ACTIVE.append(code)
    try:
        APPLY.__code__ = _Template.__dict__["apply"].__func__.__code__
        for owner, attribute, made in exchange:
            setattr(owner, attribute, made)
        yield code
    finally:
        APPLY.__code__ = before
        for owner, attribute, original in kept:
            setattr(owner, attribute, original)
        _ACTIVE.remove(code)
    refuse_hooks(module, name, prefix)


_REFUSED: tuple[tuple[Any, str, str, str], ...] = (
    (Tensor, "register_post_accumulate_grad_hook", "registers a hook after accumulation; use tensor.register_hook", ""),
    (_HookMixin, "_register_hook", "registers a hook on an autograd node; use tensor.register_hook", ""),
    (torch.autograd, "_engine_run_backward", "computes gradients itself (autograd.grad or backward), and gradients of"
     " gradients have no form in an operator graph; write the derivative out", ""),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "changes what is kept for the backward"
     " (saved_tensors_hooks); leave that to mipipe, which plans it", ""),
    (torch.amp.autocast, "__enter__", "computes under autocast, which an operator graph cannot say; cast explicitly, or"
     " capture the model in the dtype you train in (--dtype)", "_enabled"),
    (torch.inference_mode, "__enter__", "switches to inference mode, which an export does not see; use torch.no_grad",
     "mode"),
    *((owner, attribute, "draws from the system's random numbers, and a graph keeps what was drawn at the capture; draw"
       " with torch", "") for owner, attribute in ((os, "urandom"), (random, "_urandom"))))
"""What a forward must not do: where it ends up in torch, what is said, the attribute that says if it does (or none)."""


def _refusing(name: str, text: str, original: Any, flag: str) -> Any:
    """A function that refuses when the model's forward calls it, and else does what ``original`` does."""
    plain = original.__func__ if isinstance(original, staticmethod) else original

    def refuse(*args: Any, **kwargs: Any) -> Any:
        ours = type(args[0]).__module__ if args else ""
        if not _tracing() or ours.startswith("torch.utils.checkpoint") or (flag and not getattr(args[0], flag)) \
                or ((not args or type(args[0]) is int) and drawn_by_torch()):
            return plain(*args, **kwargs)
        raise GraphError(f"model {name}: its forward, at {calling_line(_ACTIVE[-1].module)}, {text}")

    return staticmethod(refuse) if isinstance(original, staticmethod) else refuse


def _noting(code: UserCode, original: Any) -> Any:
    """A function that sets the state of torch's generator, and notes the model's line that calls it."""
    def note(*args: Any, **kwargs: Any) -> Any:
        if _tracing() and not drawn_by_torch():
            code.seeded[calling_line()] = None
        return original(*args, **kwargs)

    return note


def _call(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
    """New tensors like a Function's results (which may be its inputs, where an operator's may not)."""
    code = _ACTIVE[-1]
    with torch.no_grad(), Reads(tensors) as reads:
        made = [item.clone() for item in code.calls[number](tensors)]
    for item in reads.others.values():
        if isinstance(item, (FakeTensor, nn.Parameter)):
            kind = code.calls[number].kind
            name = next((f"{fqn} " for tensor, fqn in code.named() if tensor is item), "")
            raise GraphError(f"model {code.model}: autograd Function {kind.__qualname__} ({line_of(kind.forward)})"
                             f" reads a tensor {name}of shape {tuple(item.shape)} that it is not given; pass it to"
                             " apply")
    return made


def _define() -> None:
    """Register the operators that stand for a call and a hook during an export; only on fake tensors."""
    call = torch.library.custom_op("mipipe::user_call", _call, mutates_args=(),
                                   schema="(Tensor[] tensors, int number) -> Tensor[]")
    call.register_fake(_call)
    call.register_autograd(lambda ctx, grads: (None, None))
    hook = torch.library.custom_op("mipipe::user_hook", lambda x, closed, number: x.clone(), mutates_args=(),
                                   schema="(Tensor x, Tensor[] closed, int number) -> Tensor")
    hook.register_fake(lambda x, closed, number: torch.empty_like(x))
    hook.register_autograd(lambda ctx, grad: (None, None, None))
    fx.node.has_side_effect(torch.ops.mipipe.user_hook.default)


_define()
