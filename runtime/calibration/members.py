"""The models that a calibration stream runs side by side: their samples, and what the modules of a layer see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.runtime.calibration.decoder import Decoder
from mipipe.runtime.calibration.statistics import Capture

ROUTER = re.compile(r"(^|\.)(gate|router|wg|router\.layer)$")
"""Paths inside a layer of what sends tokens to experts (a dense MLP's gate is called gate_proj)."""


@dataclass
class RunningModel:
    """A model of the running stream with its samples ``[first, stop)``."""

    decoder: Decoder
    ids: Tensor
    lengths: Tensor
    first: int
    stop: int

    def rows(self, batch: int) -> Iterator[tuple[int, int]]:
        """Batches as rows relative to the first."""
        count = self.stop - self.first
        yield from ((start, min(start + batch, count)) for start in range(0, count, batch))

    def mask(self, start: int, stop: int) -> Tensor:
        """Which tokens of rows are real."""
        lengths = self.lengths[self.first + start:self.first + stop]
        return torch.arange(self.ids.shape[1])[None] < lengths[:, None]

    def tokens(self, start: int, stop: int) -> Tensor:
        return self.ids[self.first + start:self.first + stop]


@contextmanager
def watching(decoder: Decoder, layer: int, mask: Tensor, seen: dict[str, Capture]) -> Iterator[None]:
    """Note what modules with a weight of their own see while a layer runs, in the order in which they run."""
    hooks = []
    inputs: dict[int, str] = {}
    kept: list[Any] = []  # inputs stay alive, so that no two have the same id

    def note(name: str, linear: bool, router: bool) -> Any:
        def hook(_module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            if not given or not isinstance(given[0], Tensor):
                return
            if router and given[0].dim() == 2 and len(given[0]) == mask.numel():  # routers see tokens, not samples
                rows = given[0][mask.flatten()]
                seen[name] = Capture(name, rows, rows @ _module.weight.T, True, name, "", True)  # type: ignore[operator]
            elif given[0].shape[:2] == mask.shape and isinstance(out, Tensor):
                kept.append(given[0])
                shared = inputs.setdefault(id(given[0]), name) if linear else name
                seen[name] = Capture(name, given[0][mask], out[mask], linear, shared, "", router)
        return hook

    prefix = decoder.prefix(layer)
    for path, module in decoder.model.get_submodule(prefix[:-1]).named_modules():
        name = decoder.stored(f"{prefix}{path}.weight") if path and "weight" in module._parameters else None
        if name is not None:
            linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            router = ROUTER.search(path) is not None and module._parameters["weight"].dim() == 2
            hooks.append(module.register_forward_hook(note(name, linear, router)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linked(seen: dict[str, Capture]) -> dict[str, Capture]:
    """The captures with, for each module that is no linear map, the next one that is."""
    found: dict[str, Capture] = {}
    after = ""
    for name, capture in reversed(list(seen.items())):
        after = name if capture.linear else after
        found[name] = Capture(name, capture.inputs, capture.outputs, capture.linear, capture.shared,
                              "" if capture.linear else after, capture.router)
    return dict(reversed(list(found.items())))
