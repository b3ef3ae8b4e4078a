"""Hooks of a model that act on gradients and have no form in an operator graph."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as module_globals

from mipipe.graphs.capture.user_calls import line_of
from mipipe.graphs.errors import GraphError


def refuse_hooks(module: nn.Module, name: str, prefix: str) -> None:
    """Raise `GraphError` for hooks that act on gradients and have no form in an operator graph."""
    for path, part in module.named_modules():
        for hook in (*part._backward_hooks.values(), *part._backward_pre_hooks.values()):
            where = f"{path}.".removeprefix(prefix).rstrip(".")
            raise GraphError(f"model {name}: module {where} ({type(part).__name__}) has a backward hook"
                             f" ({line_of(hook)}), which an operator graph cannot say; use tensor.register_hook in its"
                             " forward")
    for hook in (*module_globals._global_backward_hooks.values(), *module_globals._global_backward_pre_hooks.values()):
        raise GraphError(f"model {name}: a backward hook on all modules is registered ({line_of(hook)}); remove it")
    for path, parameter in module.named_parameters():
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            raise GraphError(f"model {name}: parameter {path.removeprefix(prefix)} has a hook after accumulation"
                             f" ({line_of(hook)}), which an operator graph cannot say; do this after the step, or use"
                             " parameter.register_hook")
