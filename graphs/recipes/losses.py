"""The losses as functions of tensors: every one a sum over responses or tokens, divided later by one number.

The terms take log probabilities of response tokens ``log_probs`` [B,T] (0 outside responses), their ``mask`` [B,T] and
numbers of the responses [B]; ``scales`` [B] are the weights of responses in the sum (`mipipe.graphs.recipes.rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lengths(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens of each response [B], at least 1."""
    return mask.sum(-1).clamp(min=1).to(dtype)


def rift(log_probs: Tensor, mask: Tensor, rewards: Tensor, scales: Tensor, *, length_norm: bool, negatives: str,
         **rest: Any) -> Tensor:
    """- r log pi(y|x) for positive rewards, - r pi(y|x) for negative ones (RIFT, arXiv 2601.09253)."""
    total = log_probs.sum(-1)
    if length_norm:
        total = total / lengths(mask, total.dtype)
    bounded = total if negatives == "linear" else total.exp()
    return -(scales * rewards * torch.where(rewards > 0, total, bounded)).sum()


def mean_token_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """l_i = - (1/|y_i|) sum_t log pi(y_it) [B]."""
    return -log_probs.sum(-1) / lengths(mask, log_probs.dtype)


def asympo(log_probs: Tensor, mask: Tensor, advantages: Tensor, scales: Tensor, *, floor: float, **rest: Any) -> Tensor:
    """A_i l_i / stop(l_i) (ASymPO, arXiv 2606.03070); where l_i is below ``floor`` it is divided by that."""
    loss = mean_token_loss(log_probs, mask)
    return (scales * advantages * loss / loss.detach().clamp(min=floor)).sum()


def spo(log_probs: Tensor, mask: Tensor, advantages: Tensor, scales: Tensor, *, negative_scale: float,
        **rest: Any) -> Tensor:
    """c_i A_i l_i with c_i = ``negative_scale`` where A_i < 0, else 1 (SPO, arXiv 2606.03070)."""
    scaled = torch.where(advantages < 0, negative_scale * advantages, advantages)
    return (scales * scaled * mean_token_loss(log_probs, mask)).sum()


def grpo(log_probs: Tensor, mask: Tensor, advantages: Tensor, scales: Tensor, old: Tensor, reference: Tensor | None,
         teacher: Tensor | None, foreign: Tensor | None, *, low: float, high: float, average: str, kl: float,
         distill: float, bound: float, **rest: Any) -> Tensor:
    """- min(q A, clip(q, 1 - low, 1 + high) A) per token, q = pi / pi_old, with what is added to A and to the loss.

    ``old``, ``reference`` and ``teacher`` are log probabilities [B,T]. Towards a teacher, responses marked ``foreign``
    [B] get the token advantage distill (log pi_teacher - stop(log pi)), the logarithm within +- ``bound`` (CoPD, arXiv
    2604.27083). The KL estimate is e^d - d - 1 with d = log pi_ref - log pi.
    """
    ratio = (log_probs - old).exp()
    advantage = advantages[:, None].expand_as(log_probs)
    if teacher is not None and foreign is not None:
        advantage = advantage + foreign[:, None] * distill_advantage(log_probs, teacher, distill, bound)
    terms = -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)
    if reference is not None and kl:
        apart = reference - log_probs
        terms = terms + kl * (apart.exp() - apart - 1.0)
    terms = torch.where(mask, terms, 0.0)
    if average == "token":
        return terms.sum()
    return (scales * terms.sum(-1) / lengths(mask, terms.dtype)).sum()


def distill_advantage(log_probs: Tensor, teacher: Tensor, strength: float, bound: float) -> Tensor:
    """strength (log pi_teacher - stop(log pi)), the difference within +- ``bound``."""
    return strength * (teacher - log_probs.detach()).clamp(-bound, bound)


def fuse(log_probs: Tensor, chosen: Tensor, probs: Tensor, mask: Tensor, *, labels: float, **rest: Any) -> Tensor:
    """- labels log pi(label) - (1 - labels) sum_k p_k log pi(k), summed over response tokens (FuseChat, arXiv
    2408.07990).

    ``chosen``: log probabilities of the fused distribution's entries [B,T,K], ``probs`` their shares in it.
    """
    return torch.where(mask, -labels * log_probs - (1.0 - labels) * (probs * chosen).sum(-1), 0.0).sum()


def dpo(log_probs: Tensor, reference: Tensor, *, beta: float, **rest: Any) -> Tensor:
    """- log sigmoid(beta (difference of the pair's log ratios)); rows 2k chosen, 2k + 1 rejected (arXiv 2305.18290).

    ``reference``: log probabilities of whole responses [B].
    """
    apart = log_probs.sum(-1) - reference
    return -torch.nn.functional.logsigmoid(beta * (apart[0::2] - apart[1::2])).sum()


def distill(distances: Tensor, log_probs: Tensor | None, mask: Tensor, *, temperature: float, labels: float,
            **rest: Any) -> Tensor:
    """(1 - labels) T^2 KL(teacher || student) - labels log pi(label), summed over response tokens [B,T]."""
    terms = (1.0 - labels) * temperature**2 * distances
    if log_probs is not None:
        terms = terms - labels * log_probs
    return torch.where(mask, terms, 0.0).sum()
