"""What the numeric checks of merge methods share: tensors in double, comparisons, merges in memory."""

import torch

from mipipe.runtime.merge.methods.method import merge_tensors
from mipipe.runtime.merge.methods.registry import BY_METHOD


def tensor(*rows):
    return torch.tensor(rows[0] if len(rows) == 1 else list(rows), dtype=torch.float64)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64),
                               torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def merged(name, base, models, **params):
    params = {key.removesuffix("_"): value for key, value in params.items()}
    return merge_tensors(BY_METHOD[name], base, models, params)


def deltas(name, *taus, **params):
    """The merged delta over a zero base."""
    return merged(name, torch.zeros_like(taus[0]), list(taus), **params)


def lore_objective(models, base, found, mu):
    """What LoRE minimises: ``sum_i (0.5 ||base + delta_i - model_i||^2 + mu ||delta_i||_*)``."""
    return sum(0.5 * float((base + delta - model).square().sum()) + mu * float(torch.linalg.svdvals(delta).sum())
               for model, delta in zip(models, found, strict=True))


def optmerge_loss(value, targets, maps):
    """What OptMerge minimises: ``sum_i ||(X - target_i) L_i^T||^2`` (the norms of task vectors are inside the maps)."""
    return sum(float(((value - target) @ part.T).square().sum()) for target, part in zip(targets, maps, strict=True))
