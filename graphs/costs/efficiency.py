"""How far kernels of a device kind stay below its peaks, by their kind and shape.

A product reaches ``share * n / (n + half)`` of the peak of its dtype, n its narrowest side: small local matrices are
slow, and half the best is reached at ``half``. Attention and grouped products have a share of their own. Elementwise
kernels reach ``memory`` of the memory's bandwidth, links ``link`` of theirs. Every pipeline action costs
``action_ns`` beside its kernels. ``origin`` says where the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mipipe.graphs.modes import PhaseWork
from mipipe.graphs.serialize import STRICT

Origin = Literal["assumed", "fitted", "measured", "given"]


@dataclass(frozen=True, slots=True)
class Achieved:
    """Shares of the peaks (module docstring); ``product_fp8`` is that of products in 8 bits, of their own peak."""

    __pydantic_config__: ClassVar = STRICT
    product: float = 1.0
    product_fp8: float = 1.0
    half: float = 0.0
    attention: float = 1.0
    attention_backward: float = 1.0
    grouped: float = 1.0
    memory: float = 1.0
    link: float = 1.0
    action_ns: int = 0
    origin: Origin = "given"
    source: str = ""

    def share(self, kind: str, narrow: int, fp8: bool = False) -> float:
        """The share of the peak that an operator of ``kind`` reaches whose narrowest side is ``narrow``."""
        if kind.startswith("mipipe.attention"):
            return self.attention_backward if "backward" in kind else self.attention
        best = self.product_fp8 if fp8 else self.product
        if "grouped" in kind:
            best *= self.grouped
        return best * narrow / (narrow + self.half)

    def but(self, **changes: float | int | str) -> Achieved:
        """The same with some numbers changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def phase_seconds(work: PhaseWork, achieved: Achieved, *, flops: float, fp8_flops: float | None, bytes_per_s: float,
                  launch_ns: int, count: float = 1) -> float:
    """Seconds of one phase of a segment on one member, without its collectives.

    A product takes the longest of its flops at the share it reaches, its bytes and a launch (a roofline); the other
    kernels their bytes together, or their launches.

    Args:
        work: the phase, of a microbatch as captured.
        achieved: shares of the peaks.
        flops, fp8_flops: the peaks of the graph's dtype and, if products run in 8 bits, of these; attention keeps
            the graph's.
        bytes_per_s: the memory's bandwidth.
        launch_ns: the least a kernel takes.
        count: sequences per microbatch, by which rows and bytes grow.
    """
    launch = launch_ns * 1e-9
    total, moved, kernels = 0.0, work.bytes_moved, work.kernels
    for item in work.products:
        attention = item.kind.startswith("mipipe.attention")
        eight = fp8_flops is not None and not attention
        peak = fp8_flops if eight and fp8_flops is not None else flops
        busy = item.flops * count / (peak * achieved.share(item.kind, item.narrow, eight))
        total += item.count * max(busy, item.bytes_moved * count / bytes_per_s, launch)
        moved -= item.bytes_moved * item.count
        kernels -= item.count
    return total + max(max(0, moved) * count / (bytes_per_s * achieved.memory), max(0, kernels) * launch)
