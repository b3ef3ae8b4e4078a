"""Methods whose changes running the models (`mipipe.runtime.calibration`) directs: coefficients learned for parts of
tensors, rotations, votes on entries.

Tensors that no statistic was taken of (token tables, experts in banks, parts outside the decoder) are merged by each
method's plain rule: unturned, or as the first model has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.method import Tile


def expert_merging(tile: Tile, _stats: Any, *, coefficients: Sequence[Sequence[float]], **_params: Any) -> Tensor:
    """``theta_0 + sum_k alpha_k tau_k`` with the coefficients that `mipipe.runtime.merge.expert_merging`
    learned, ``[models][parts]``: each holds for its contiguous part of the tensor."""
    shares = torch.tensor(coefficients, dtype=tile.origin.dtype, device=tile.origin.device)
    return merged_tensor(tile.origin, tile.deltas(), shares)


def merged_tensor(base: Tensor, deltas: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """``base + sum_k alpha_k delta_k`` with ``alphas`` ``[models, parts]``, each for its part of the flattened
    tensor."""
    count = alphas.shape[1]
    if count == 1:
        return base + sum(alphas[number, 0] * delta for number, delta in enumerate(deltas))
    sizes = torch.tensor([late - early for early, late in itertools.pairwise(chunk_bounds(base.numel(), count))])
    spread = [torch.repeat_interleave(row, sizes.to(row.device)).reshape(base.shape) for row in alphas]
    return base + sum(share * delta for share, delta in zip(spread, deltas, strict=True))


def chunk_bounds(size: int, count: int) -> list[int]:
    """Where ``count`` contiguous parts of a flattened tensor begin and end: ``round(c size / count)``."""
    return [round(part * size / count) for part in range(count + 1)]


def arm(tile: Tile, _stats: Any, *, eta: float, energy: float) -> Tensor:
    """A step of streaming merging by activation-guided rotations (arXiv 2602.03237): ``theta + eta tau R``.

    ``theta`` (the base) is the model merged so far, the last model the next checkpoint; ``tau`` its change from the
    checkpoint before (the first of two models), or from ``theta``. ``R`` turns the checkpoint's inputs onto the merged
    model's (orthogonal Procrustes) and is the identity where neither has any. Reconstructed from the abstract.
    """
    before = tile.models[0] if len(tile.models) == 2 else tile.origin
    delta = tile.models[-1] - before
    fields = tile.measured.fields("cross", len(tile.models) - 1) if tile.measured is not None else {}
    if "ba" in fields and delta.dim() == 2:
        delta = (delta.double() @ rotation(fields["ba"].to(delta.device).double(), energy)).to(delta)
    return tile.origin + eta * delta


def rotation(cross: Tensor, energy: float) -> Tensor:
    """The orthogonal ``R`` nearest to ``||X_phi R - X_theta||``'s minimum, of ``cross = X_phi^T X_theta`` ``[n, n]``.

    Of the singular triplets the leading ones that hold a share ``energy`` of the squares are turned; what is left goes
    through as it is, as far as that is orthogonal (polar factor of both together).
    """
    left, values, right = torch.linalg.svd(cross)
    total = (values ** 2).cumsum(0)
    if float(total[-1]) == 0:
        return torch.eye(len(cross), dtype=cross.dtype, device=cross.device)
    keep = int((total < energy * total[-1]).sum()) + 1
    keep = min(keep, int((values > 1e-10 * values[0]).sum()))
    one, two = left[:, :keep], right[:keep].T
    identity = torch.eye(len(cross), dtype=cross.dtype, device=cross.device)
    joined = one @ two.T + (identity - one @ one.T) @ (identity - two @ two.T)
    first, _, second = torch.linalg.svd(joined)
    found: Tensor = first @ second
    return found


def rcp(tile: Tile, _stats: Any, *, strength: float) -> Tensor:
    """RCP-Merging (arXiv 2508.03140): ``theta_R + 1[V > 0] (theta_D - theta_0)``; the models are reasoning, domain.

    ``V`` are votes of the domain's samples, ``c_s = S_s + strength F (theta_R - theta_D)^2 <= 0``. Tensors without
    gradients of their own (a tied token table) stay the reasoning model's.
    """
    reasoning, domain = tile.models
    fields = tile.measured.fields(f"votes:{strength!r}", 1) if tile.measured is not None else {}
    if "sum" not in fields:
        return reasoning.clone()
    votes = fields["sum"].to(reasoning).reshape(reasoning.shape)
    return reasoning + torch.where(votes > 0, domain - tile.origin, 0.0)
