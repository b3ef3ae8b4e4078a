"""What a model does to its own gradients in Python, kept through an export that sees only the forward.

While a model is exported, `watched` has its custom Functions and hooks recorded (`mipipe.graphs.capture.user_code`) and
refuses what an operator graph cannot say, with the class and the line: Functions that change their inputs or read
parameters they are not given, hooks on modules and autograd nodes, hooks after accumulation, hooks that a forward puts
on a parameter anew each time.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import Function, _HookMixin

from mipipe.graphs.capture.refused_hooks import refuse_hooks
from mipipe.graphs.capture.user_calls import (
    APPLY,
    Reads,
    calling_line,
    drawn_by_torch,
    line_of,
    plain_apply,
)
from mipipe.graphs.capture.user_code import UserCode
from mipipe.graphs.errors import GraphError

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
