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


def routers_of(model: nn.Module, what: str) -> list[Any]:
    """The routers of a MoE model: modules beside experts, with weights [experts, hidden] that give logits. ``what``
    needs them.

    Raises:
        GraphError: it has none.
    """
    found = [part for part in model.modules() if type(part).__name__.endswith("Router")
             and isinstance(getattr(part, "weight", None), nn.Parameter)]
    if not found:
        raise GraphError(f"{what}: {type(model).__name__} has no routers with weights [experts, hidden]")
    return found


def with_router_loss(model: nn.Module, name: str, term: Callable[[Tensor], Tensor], alone: bool = False) -> None:
    """Let a model's outputs have ``name``: the mean over layers and tokens of ``term`` of the routers' logits
    [T, experts] -> [T]. The logits are computed once more; ``alone``: the gradient reaches the routers' weights only.

    Raises:
        GraphError: as `routers_of`.
    """
    terms: list[Tensor] = []
    for part in routers_of(model, name):
        part.forward = _recording(part, part.forward, terms, term, alone)
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        terms.clear()
        output = forward(*args, **kwargs)
        setattr(output, name, torch.stack(terms).mean())
        terms.clear()
        return output

    model.forward = run


def _recording(part: Any, forward: Callable[..., Any], terms: list[Tensor], term: Callable[[Tensor], Tensor],
               alone: bool) -> Callable[..., Any]:
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = (hidden.detach() if alone else hidden).reshape(-1, hidden.shape[-1])
        logits = nn.functional.linear(given, part.weight)
        terms.append(term(logits.to(torch.promote_types(logits.dtype, torch.float32))).mean())
        return forward(hidden, *args, **kwargs)

    return run


def sharpen_routers(model: nn.Module) -> None:
    """Let a model's outputs have a ``router_loss``: minus the divergence of routing from uniform, Elastic MoE's
    hierarchical router loss (arXiv 2509.21892): the mean over layers and tokens of -sum_e p_e ln(E p_e).

    Its gradient reaches the routers' weights alone.

    Raises:
        GraphError: as `routers_of`.
    """
    with_router_loss(model, "router_loss", _sharpness, alone=True)


def _sharpness(logits: Tensor) -> Tensor:
    shares = logits.log_softmax(-1)
    return -(shares.exp() * (shares + math.log(logits.shape[-1]))).sum(-1)


def _with_every_expert(forward: Callable[..., Any], count: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _every_expert(count):
            return forward(*args, **kwargs)

    return run
