"""How far kernels of a device kind stay below its peaks, by their kind and shape.

A product reaches ``share * n / (n + half)`` of the peak of its dtype, n its narrowest side: small local matrices are
slow, and half the best is reached at ``half``. Attention and grouped products have a share of their own. Elementwise
kernels reach ``memory`` of the memory's bandwidth, links ``link`` of theirs. Every pipeline action costs
``action_ns`` beside its kernels, every layer of experts ``expert_ns`` in each of its phases: tokens are counted,
sorted and sent by many small kernels that the host waits for. ``hidden`` is the share of the tensor axis's collectives
that goes on behind products where a run overlaps them (user buffers, asynchronous tensor parallelism),
``hidden_experts`` that of all-to-alls of experts. ``origin`` says where the numbers come from, `Evidence` what they
were held against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mipipe.graphs.errors import InputError
from mipipe.graphs.modes import PhaseWork
from mipipe.graphs.serialize import STRICT

Origin = Literal["assumed", "fitted", "measured", "given"]
LowDtype = Literal["float8", "float4"]
"""Types of products in fewer bits than the graph's own type."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The measured runs that shares were fitted on: how many, the mean relative error of a step when the model of the
    run was held out, and how far they reach (least and most): devices, parameters, tokens of a sequence; the types of
    products, and kinds of models (``dense``, ``experts``). ``thin``: types of products that runs of one model alone
    stand for on this kind."""

    __pydantic_config__: ClassVar = STRICT
    runs: int
    error: float
    devices: tuple[int, int]
    parameters: tuple[int, int]
    tokens: tuple[int, int]
    products: tuple[str, ...]
    models: tuple[str, ...]
    thin: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Achieved:
    """Shares of the peaks (module docstring); ``product_fp8`` and ``product_fp4`` are those of products in 8 and in 4
    bits, of their own peaks."""

    __pydantic_config__: ClassVar = STRICT
    product: float = 1.0
    product_fp8: float = 1.0
    product_fp4: float = 1.0
    half: float = 0.0
    attention: float = 1.0
    attention_backward: float = 1.0
    grouped: float = 1.0
    memory: float = 1.0
    link: float = 1.0
    hidden: float = 0.7
    hidden_experts: float = 0.0
    action_ns: int = 0
    expert_ns: int = 0
    origin: Origin = "given"
    source: str = ""
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        for name in ("product", "product_fp8", "product_fp4", "attention", "attention_backward", "grouped", "memory",
                     "link"):
            if not getattr(self, name) > 0:
                raise InputError(f"achieved: {name} is {getattr(self, name):g}; expected a share above 0")
        if not (self.half >= 0 and 0 <= self.hidden <= 1 and 0 <= self.hidden_experts <= 1
                and min(self.action_ns, self.expert_ns) >= 0):
            raise InputError(f"achieved: half {self.half:g}, hidden {self.hidden:g}, hidden_experts"
                             f" {self.hidden_experts:g}, action_ns {self.action_ns}, expert_ns {self.expert_ns};"
                             " expected none below 0, and of what is hidden a share up to 1")

    def share(self, kind: str, narrow: int, low: LowDtype | None = None) -> float:
        """The share of the peak that an operator of ``kind`` reaches whose narrowest side is ``narrow``; ``low``: in
        what type products run, where not in the graph's."""
        if kind.startswith("mipipe.attention"):
            return self.attention_backward if "backward" in kind else self.attention
        best = {None: self.product, "float8": self.product_fp8, "float4": self.product_fp4}[low]
        if "grouped" in kind:
            best *= self.grouped
        return best * narrow / (narrow + self.half)

    def but(self, **changes: float | int | str) -> Achieved:
        """The same with some numbers changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def phase_seconds(work: PhaseWork, achieved: Achieved, *, flops: float, bytes_per_s: float, launch_ns: int,
                  low: LowDtype | None = None, low_flops: float = 0.0, count: float = 1) -> float:
    """Seconds of one phase of a segment on one member, without its collectives.

    A product takes the longest of its flops at the share it reaches, its bytes and a launch (a roofline); the other
    kernels their bytes together, or their launches.

    Args:
        work: the phase, of a microbatch as captured.
        achieved: shares of the peaks.
        flops: the peak of the graph's dtype.
        bytes_per_s: the memory's bandwidth.
        launch_ns: the least a kernel takes.
        low, low_flops: the type that products run in where not in the graph's, and its peak; attention keeps the
            graph's.
        count: sequences per microbatch, by which rows and bytes grow.
    """
    launch = launch_ns * 1e-9
    total, moved, kernels = 0.0, work.bytes_moved, work.kernels
    for item in work.products:
        own = None if item.kind.startswith("mipipe.attention") else low
        peak = flops if own is None else low_flops
        busy = item.flops * count / (peak * achieved.share(item.kind, item.narrow, own))
        total += item.count * max(busy, item.bytes_moved * count / bytes_per_s, launch)
        moved -= item.bytes_moved * item.count
        kernels -= item.count
    return total + max(max(0, moved) * count / (bytes_per_s * achieved.memory), max(0, kernels) * launch)
