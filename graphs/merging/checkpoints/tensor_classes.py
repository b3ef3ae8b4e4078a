"""What kind of tensor a checkpoint's name stands for, and how it splits into the matrices a merge works on.

Decided once per tensor name from name, shape, dtype and the model's config, before any merge method runs. Everything
here is names and integers: no tensor is read.

A tensor is seen as a table of rows: a matrix as it is, a convolution as ``[out, in * k * k]``, stacked experts
``[E, m, n]`` as E blocks of m rows. A `TableRows` is a run of rows that methods treat as one matrix: one expert, one of
the projections fused into ``gate_up`` or ``qkv``. Rows are contiguous in the file, so pieces are byte ranges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""The safetensors dtypes that are averaged; every other dtype is copied."""
QUANTISED = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"})
"""Storage that must be dequantised before a merge."""


class TensorClass(StrEnum):
    """How a merge method treats a tensor."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "vector"
    BUFFER = "buffer"


@dataclass(frozen=True, slots=True)
class TableRows:
    """Rows ``[start, stop)`` of a tensor's table that methods treat as one matrix; ``key`` names it uniquely."""

    key: str
    start: int
    stop: int


_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings?|tok_embeddings|embed_positions|embed_in"
                        r"|position_embeddings?|position_embedding|token_type_embeddings|patch_pos_embed|pos_embed"
                        r"|class_embedding|embeddings?)(\.weight)?$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.(weight|bias)$|^output\.weight$")
_BUFFER = re.compile(r"(^|\.)(position_ids|inv_freq|num_batches_tracked|rotary_emb\..*|attn\.masked_bias|attn\.bias"
                     r"|token_type_ids|relative_position_index)$")
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_LAYER = re.compile(r"(^|\.)(layers|layer|h|blocks|block|resblocks)\.(\d+)(?=\.)")
_STACKED = re.compile(r"(^|\.)experts\.|(^|\.)experts$")


def classify(name: str, shape: tuple[int, ...], dtype: str) -> TensorClass:
    """The class of a tensor (dtype in safetensors' spelling)."""
    if dtype not in FLOATING or _BUFFER.search(name):
        return TensorClass.BUFFER
    if _HEAD.search(name):
        return TensorClass.HEAD
    if _EMBEDDING.search(name):
        return TensorClass.EMBEDDING
    if len(shape) < 2:
        return TensorClass.VECTOR
    return TensorClass.MATRIX


def table_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a table; a vector has one column, stacked experts E * m rows.

    A 3-D tensor of experts and a convolution differ: the former joins its first two axes, the latter its last ones;
    both are told apart by `is_stacked`.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def is_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a 3-D tensor is a bank of experts ``[E, m, n]`` and not a convolution."""
    return len(shape) == 3 and _STACKED.search(name) is not None


def is_transposed(name: str, model_type: str) -> bool:
    """Whether a matrix is stored ``[in, out]`` (GPT-2's Conv1D)."""
    return model_type in ("gpt2", "gptj_conv1d", "imagegpt", "decision_transformer") and bool(_TRANSPOSED.search(name))


def pieces(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[TableRows, ...]:
    """The matrices inside a tensor: per expert, and per projection where several are fused along the output rows.

    Fused query, key and value rows are split when the config gives their head counts; ``gate_up`` into two halves.
    """
    if is_stacked(name, shape):
        experts, rows = shape[0], shape[1]
        blocks = _fused_blocks(name, rows, config)
        return tuple(TableRows(f"{name}[{expert}]{suffix}", expert * rows + start, expert * rows + stop)
                     for expert in range(experts) for suffix, start, stop in blocks)
    rows = table_shape(shape)[0]
    blocks = _fused_blocks(name, rows, config) if len(shape) == 2 else (("", 0, rows),)
    return tuple(TableRows(name + suffix, start, stop) for suffix, start, stop in blocks)


def _fused_blocks(name: str, rows: int, config: Mapping[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """The row blocks ``(suffix, start, stop)`` of a fused projection, or the whole as one block."""
    if re.search(r"(^|\.)(gate_up_proj|w13)(\.weight)?$", name) and rows % 2 == 0:
        return (("#gate", 0, rows // 2), ("#up", rows // 2, rows))
    if re.search(r"(^|\.)(qkv_proj|qkv|query_key_value|Wqkv)\.weight$", name):
        text = config.get("text_config", config)
        heads = text.get("num_attention_heads")
        groups = text.get("num_key_value_heads", heads)
        if heads and groups and rows % (heads + 2 * groups) == 0:
            size = rows // (heads + 2 * groups)
            query, key = heads * size, (heads + groups) * size
            return (("#q", 0, query), ("#k", query, key), ("#v", key, rows))
    return (("", 0, rows),)


def layer_index(name: str) -> int | None:
    """The decoder (or encoder) layer a name belongs to; None outside the layers."""
    match = _LAYER.search(name)
    return int(match[3]) if match else None


def with_layer(name: str, layer: int) -> str:
    """The same name in another layer."""
    return _LAYER.sub(lambda match: f"{match[1]}{match[2]}.{layer}", name, count=1)


def layer_prefix(name: str) -> str | None:
    """What stands before the layer number: ``model.layers`` of ``model.layers.3.mlp.up_proj.weight``."""
    match = _LAYER.search(name)
    return name[:match.start()] + match[1] + match[2] if match else None
