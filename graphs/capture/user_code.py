"""A model's own autograd Functions and gradient hooks, recorded while it is exported and put into its flat graph.

A custom ``torch.autograd.Function`` and a hook on a tensor or parameter are calls of one operator each while the model
is exported; in the flat graph they become callables that run the user's own code. The segment's joint trace runs them
under autograd, so that its F, I and W hold the operators of the user's forward and backward, whatever they say.
Reentrant checkpointing (a Function of torch's own) is run plainly: where none of its inputs requires a gradient,
nothing inside it gets one, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import Function
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointFunction

from mipipe.graphs.capture.user_calls import (
    TENSOR,
    Reads,
    UserCall,
    UserHook,
    calling_line,
    copy_between,
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
