"""Attention and experts in transformers' interfaces, built on mipipe's operators.

Attention is one operator: grouped heads are not repeated, causal masks and windows are flags instead of tensors. The
experts of a layer are grouped matrix products, optionally in groups that may be placed on different devices; routing
weights are applied before the down projection where it is linear (`scales_inner`).
Legend: B batch, H heads, G key heads, S queries, T keys (or tokens), D and E head sizes, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

import mipipe.graphs.operators.expert_kernels
import mipipe.graphs.operators.kernels  # noqa: F401  (both register mipipe's operators)
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operators.plain_attention import plain_attention, trains

NAME = "mipipe"
"""The name under which both are registered with transformers."""

PACKED = "mipipe_flash"
"""The name of `packed_attention`; with "flash" in it, models hand over whole packed sequences."""


def attention_interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                        scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
                        sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
                        position_bias: Tensor | None = None, **unused: Any) -> tuple[Tensor, None]:
    """Attention in transformers' interface: [B,H,S,D], [B,G,T,D], [B,G,T,E] -> [B,S,H,E]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout > 0.0 or position_bias is not None or trains(attention_mask):
        bias = position_bias if attention_mask is None else attention_mask if position_bias is None else (
            torch.where(attention_mask, position_bias, float("-inf")) if attention_mask.dtype is torch.bool
            else position_bias + attention_mask)
        if s_aux is not None or softcap or (sliding_window and attention_mask is None):
            raise GraphError("attention with sinks, soft caps or windows, and dropout or a learned bias at once: set"
                             " attention_dropout=0")
        out = plain_attention(query, key, value, bias, dropout, causal, scale)
    else:
        window = int(sliding_window or 0) if attention_mask is None else 0
        out, _ = torch.ops.mipipe.attention(query, key, value, attention_mask, s_aux, causal, window, float(scale),
                                            float(softcap or 0.0))
    return out.transpose(1, 2).contiguous(), None


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
                     cu_seq_lens_q: Sequence[int] = (), **options: Any) -> tuple[Tensor, None]:
    """Attention within spans of one packed sequence [1,H,S,D], which begin and end at ``cu_seq_lens_q``: [1,S,H,E].

    Neighbouring spans of one length are computed together, as a batch.
    """
    parts, start = [], 0
    lengths = [end - begin for begin, end in pairwise(cu_seq_lens_q)]
    for length, alike in groupby(lengths):
        count = len(list(alike))
        spans = [x[0, :, start:start + count * length]
                 .unflatten(1, (count, length)).transpose(0, 1)  # type: ignore[no-untyped-call]
                 for x in (query, key, value)]
        parts.append(attention_interface(module, spans[0], spans[1], spans[2], None, scaling=options.get("scaling"),
                                         is_causal=False, dropout=options.get("dropout", 0.0))[0].flatten(0, 1))
        start += count * length
    return torch.cat(parts).unsqueeze(0), None


def experts_interface(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All experts of a MoE layer in transformers' interface: [T,H], chosen [T,k] and their weights [T,k] -> [T,H].

    The bank is computed in ``module.config.mipipe_expert_groups`` groups, whose partial sums are added: each sees all
    tokens, sorts those of its own experts to the front, and leaves the other rows zero. With
    ``module.config.mipipe_expert_parallel`` the rows go to their experts' ranks instead (`expert_parallel`).
    """
    if getattr(module.config, "mipipe_expert_parallel", False):
        return expert_parallel(module, hidden, index, weights)
    groups = getattr(module.config, "mipipe_expert_groups", 1)
    if module.num_experts % groups:
        raise GraphError(f"expert groups: found {groups}, expected a divisor of the {module.num_experts} experts")
    size = module.num_experts // groups
    total = expert_group(module, hidden, index, weights, 0, size)
    for group in range(1, groups):
        total = total + expert_group(module, hidden, index, weights, group * size, size)
    return total.to(hidden.dtype)


def expert_group(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, first: int, size: int) -> Tensor:
    """The partial sum [T,H] of experts ``first`` to ``first + size``."""
    top = index.shape[1]
    whole = size == module.num_experts
    chosen = index.reshape(-1)
    if not whole:
        inside = (chosen >= first) & (chosen < first + size)
        chosen = torch.where(inside, chosen - first, size)
    ordered, order = torch.sort(chosen, stable=True)
    counts = torch.ops.mipipe.histogram(ordered, size, 0, size - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    used = None if whole else ordered < size
    local = ordered if used is None else ordered.clamp(max=size - 1)
    rows = (module.expert_inputs(hidden, order // top, local, first, size) if hasattr(module, "expert_inputs")
            else hidden[order // top])

    part, scale = None if whole else slice(first, first + size), weights.reshape(-1)[order].unsqueeze(-1)
    if scales_inner(module):  # rows of other experts are zero, and stay so
        out = expert_rows(module, rows, offsets, local, part, scale)
    else:
        out = expert_rows(module, rows, offsets, local, part) * scale
        if used is not None:
            out = torch.where(used.unsqueeze(-1), out, torch.zeros((), dtype=out.dtype, device=out.device))
    return _summed(out[torch.argsort(order)], weights)


def scales_inner(module: Any) -> bool:
    """Whether routing weights may be applied before the down projection: ``w * down(h) = down(w * h)``.

    So they are, as Megatron-LM applies them: what the down projection makes need not be kept for the gradient of the
    weights. A bias or a norm after the projection, or another function of a converted expert, forbids it.
    """
    if hasattr(module, "expert_outputs"):
        return bool(getattr(module, "scales_inner", False))
    return not module.has_bias and not getattr(module, "has_post_expert_norm", False)


def _summed(rows: Tensor, weights: Tensor) -> Tensor:
    """The sum over the chosen experts, in the wider of the dtypes of rows and weights: [T*k,H] -> [T,H]."""
    return rows.view(*weights.shape, -1).sum(dim=1, dtype=torch.promote_types(rows.dtype, weights.dtype))


def expert_rows(module: Any, rows: Tensor, offsets: Tensor, local: Tensor | None = None,
                part: slice | None = None, scale: Tensor | None = None) -> Tensor:
    """What experts make of rows [N,H] that are sorted by expert and end at ``offsets``: [N,H].

    ``part``: these of the bank's experts, by default all. ``local`` [N]: each row's expert among them, for biases.
    ``scale`` [N,1]: by which the down projection's input is multiplied (`scales_inner`).
    Converted experts (`mipipe.graphs.models.mipipe_moe`) say themselves what they make of sorted rows.
    """
    if hasattr(module, "expert_outputs"):
        return module.expert_outputs(rows, offsets, local, part, _grouped, *(() if scale is None else (scale,)))

    def project(x: Tensor, name: str) -> Tensor:
        bank = getattr(module, name)
        bank = bank if part is None else bank[part]
        bank = bank if module.is_transposed else bank.transpose(-2, -1)
        out = torch.ops.mipipe.grouped_mm(x.to(bank.dtype), bank, offsets)
        if module.has_bias:
            bias = getattr(module, f"{name}_bias")
            out = out + (bias if part is None else bias[part])[local]
        return out

    if module.has_gate:
        inner = module._apply_gate(project(rows, "gate_up_proj"))
    else:
        inner = module.act_fn(project(rows, "up_proj"))
    out = project(inner if scale is None else inner * scale, "down_proj")
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _grouped(rows: Tensor, bank: Tensor, ends: Tensor) -> Tensor:
    """Grouped products as one operator, in the bank's dtype."""
    return torch.ops.mipipe.grouped_mm(rows.to(bank.dtype), bank, ends)


def expert_parallel(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All experts of a MoE layer, by all-to-all: rows to the experts' ranks, their work there, and back.

    Between `all_to_all_send` and `all_to_all_return` nothing depends on the number of rows, which differs in every
    call of a run. Routing weights travel with their rows (`scales_inner`); the sum over the chosen experts is made
    where the tokens came from.
    """
    tokens, top = index.shape
    if module.has_bias or not getattr(module, "separate", True):
        found = "experts with biases" if module.has_bias else "experts that share weights or are compressed"
        raise GraphError(f"{type(module).__name__}: {found} cannot be captured for expert parallelism yet; use"
                         " --expert-groups")
    order, arrive, offsets, splits = torch.ops.mipipe.all_to_all_route(index, module.num_experts)
    rows = hidden.unsqueeze(1).expand(tokens, top, hidden.shape[-1]).reshape(tokens * top, hidden.shape[-1])
    arrived = torch.ops.mipipe.all_to_all_send(rows, order, arrive, splits)

    scale = None
    if scales_inner(module):
        scale = torch.ops.mipipe.all_to_all_send(weights.reshape(-1, 1), order, arrive, splits)
    out = expert_rows(module, arrived, offsets, scale=scale)
    back = torch.ops.mipipe.all_to_all_return(out, order, arrive, splits)
    return _summed(back if scale is not None else back * weights.reshape(-1, 1), weights).to(hidden.dtype)


def exchange_experts(module: nn.Module) -> nn.Module:
    """The module, a transformers one, with experts that exchange rows (`expert_parallel`)."""
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        if config is not None:
            config.mipipe_expert_parallel = True
    return module


def attention_mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None,
                   allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False,
                   local_size: int | None = None, config: Any = None, **options: Any) -> Tensor | None:
    """The mask [B,1,S,T] of `attention_interface` for transformers; None where its flags (causal, window) say it all.

    Padding, chunks, packed sequences, image tokens that see each other and windows to both sides are tensors.
    """
    from transformers.masking_utils import sdpa_mask

    window = allow_is_causal_skip and local_size == getattr(config, "sliding_window", None)
    plain = attention_mask is None and (local_size is None or kv_length <= local_size or window)
    if plain and (allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == kv_length)):
        return None
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": False}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, local_size=local_size,
                     config=config, **options)


_positions_given = False
"""Whether the model that runs was given its positions, which may be those of several sequences in one."""


def watch_positions(model: nn.Module) -> None:
    """Let masks of packed sequences be made only where positions are given to the model's forward.

    transformers looks for packed sequences at the values of positions, and assumes them where it cannot look.
    """
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        global _positions_given
        before, _positions_given = _positions_given, kwargs.get("position_ids") is not None
        try:
            return forward(*args, **kwargs)
        finally:
            _positions_given = before

    model.forward = run


def register() -> None:
    """Make `attention_interface`, its masks, `packed_attention` and `experts_interface` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.integrations.moe import ExpertsInterface

    find = masking_utils.find_packed_sequence_indices
    if not hasattr(find, "original"):
        def packed(position_ids: Tensor) -> Tensor | None:
            return None if masking_utils.is_tracing(position_ids) and not _positions_given else find(position_ids)

        packed.original = find  # type: ignore[attr-defined]
        masking_utils.find_packed_sequence_indices = packed
    AttentionMaskInterface.register(NAME, attention_mask)
    AttentionInterface.register(NAME, attention_interface)
    AttentionInterface.register(PACKED, packed_attention)
    ExpertsInterface.register(NAME, experts_interface)
