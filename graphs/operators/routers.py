"""What is changed in a model's routers and loops over experts before it is captured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import GraphError


class _Expert(list[int]):
    """The number of an expert, in the form of a row of ``nonzero()``."""


class _every_expert(torch.overrides.TorchFunctionMode):
    """Inside, ``for expert in hit.nonzero()`` runs over all experts: one without tokens adds no rows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.nonzero, torch.nonzero) and args[0].dim() == 1 and not kwargs:
            return [_Expert([number]) for number in range(self.count)]
        if func == Tensor.__getitem__ and isinstance(args[1], _Expert):
            return args[0][args[1][0]:args[1][0] + 1]
        return func(*args, **(kwargs or {}))


def visit_every_expert(model: nn.Module) -> None:
    """Let transformers' own loops over the experts that got tokens run over all experts.

    Those of the classes that do not know `experts_interface` (Switch Transformers, NLLB-MoE, DBRX): which experts to
    visit would depend on data, and the loop's body does nothing for an expert without tokens.
    """
    for part in model.modules():
        kind = type(part)
        if kind.__module__.startswith("transformers.") and kind.__name__.endswith("Experts"):
            code = getattr(kind.forward, "__code__", None)
            if code is not None and "expert_hit" in code.co_varnames:
                part.forward = _with_every_expert(part.forward, part.num_experts)  # type: ignore


def settle_routers(model: nn.Module) -> None:
    """Cast routers to the dtype to which they cast themselves in their first forward (Switch, NLLB-MoE)."""
    for part in model.modules():
        classifier, dtype = getattr(part, "classifier", None), getattr(part, "dtype", None)
        if type(part).__name__.endswith("Router") and isinstance(classifier, nn.Module) and isinstance(
                dtype, torch.dtype):
            part.classifier = settled = classifier.to(dtype)
            settled.to = lambda *unused, settled=settled: settled  # type: ignore


def sharpen_routers(model: nn.Module) -> None:
    """Let a model's outputs have a ``router_loss``: minus the divergence of routing from uniform, Elastic MoE's
    hierarchical router loss (arXiv 2509.21892): the mean over layers and tokens of -sum_e p_e ln(E p_e).

    Its gradient reaches the routers' weights alone: their logits are computed once more from hidden states cut off.

    Raises:
        GraphError: the model has no routers whose weights [experts, hidden] give logits.
    """
    terms: list[Tensor] = []
    routers = [part for part in model.modules() if type(part).__name__.endswith("Router")
               and isinstance(getattr(part, "weight", None), nn.Parameter)]
    if not routers:
        raise GraphError(f"{type(model).__name__}: a router loss needs routers with weights [experts, hidden], which it"
                         " does not have")
    for part in routers:
        part.forward = _with_sharpness(part, part.forward, terms)
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        terms.clear()
        output = forward(*args, **kwargs)
        output.router_loss = torch.stack(terms).mean()
        terms.clear()
        return output

    model.forward = run


def _with_sharpness(part: Any, forward: Callable[..., Any], terms: list[Tensor]) -> Callable[..., Any]:
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = torch.nn.functional.linear(hidden.detach().reshape(-1, hidden.shape[-1]), part.weight)
        shares = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        terms.append(-(shares.exp() * (shares + math.log(logits.shape[-1]))).sum(-1).mean())
        return forward(hidden, *args, **kwargs)

    return run


def _with_every_expert(forward: Callable[..., Any], count: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _every_expert(count):
            return forward(*args, **kwargs)

    return run
