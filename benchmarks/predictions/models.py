"""The configurations of models that published runs name, as transformers' classes with the entries that differ.

Architectures are those of the models' own config.json files on their publishers' pages; GPT models of Megatron-LM
(learned positions, LayerNorm, GELU of four times the width, biases) are sized by the row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mipipe.graphs.errors import InputError


@dataclass(frozen=True)
class Model:
    """A transformers class and its entries. ``note``: in what the graph differs from the model."""

    source: str
    overrides: dict[str, Any]
    note: str = ""


def _llama(hidden: int, inner: int, layers: int, heads: int, keys: int, vocab: int = 128256) -> Model:
    return Model("LlamaForCausalLM", {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
                                      "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocab})


def _qwen3_moe(hidden: int, inner: int, layers: int, heads: int) -> Model:
    return Model("Qwen3MoeForCausalLM", {
        "hidden_size": hidden, "moe_intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128,
        "num_attention_heads": heads, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "vocab_size": 151936})


def _qwen(family: str, hidden: int, inner: int, layers: int, heads: int, keys: int) -> Model:
    """Dense models of the second and third generation (the third's heads are 128 wide whatever the hidden size)."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
             "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": 152064}
    apart = {"head_dim": 128, "vocab_size": 151936} if family == "Qwen3" else {}
    return Model(f"{family}ForCausalLM", sizes | apart)


def _opt(hidden: int, layers: int, heads: int) -> Model:
    return Model("OPTForCausalLM", {
        "hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "word_embed_proj_dim": hidden, "do_layer_norm_before": True})


def _nemotron3(pattern: str, **entries: Any) -> Model:
    """``pattern``: M a Mamba layer, E a layer of experts, * attention."""
    names = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
    return Model("NemotronHForCausalLM", {"layers_block_type": [names[letter] for letter in pattern],
                                          "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
                                          **entries})


_GPT: dict[str, Any] = {"activation_function": "gelu", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
"""Without dropout attention is one operator; what dropout costs unfused attention is counted with it."""

MTP = "the layer of multi-token prediction counts as one layer more, without its head"

KNOWN: tuple[tuple[str, Model], ...] = (
    (r"llama[ _-]?3(\.\d)?[ _-]?8b", _llama(4096, 14336, 32, 32, 8)),
    (r"llama[ _-]?3(\.\d)?[ _-]?70b", _llama(8192, 28672, 80, 64, 8)),
    (r"llama[ _-]?3(\.\d)?[ _-]?405b", _llama(16384, 53248, 126, 128, 8)),
    (r"llama[ _-]?3(\.\d)?[ _-]?1b", _llama(2048, 8192, 16, 32, 8)),
    (r"llama[ _-]?3(\.\d)?[ _-]?3b", _llama(3072, 8192, 28, 24, 8)),
    (r"llama[ _-]?2[ _-]?7b", _llama(4096, 11008, 32, 32, 32, 32000)),
    (r"llama[ _-]?2[ _-]?13b", _llama(5120, 13824, 40, 40, 40, 32000)),
    (r"llama[ _-]?2[ _-]?70b", _llama(8192, 28672, 80, 64, 8, 32000)),
    (r"deepseek[ _-]?v3.*(w/o mtp)", Model("DeepseekV3ForCausalLM", {"num_hidden_layers": 61})),
    (r"deepseek[ _-]?v3", Model("DeepseekV3ForCausalLM", {"num_hidden_layers": 62}, MTP)),
    (r"kimi[ _-]?k2", Model("DeepseekV3ForCausalLM", {
        "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "vocab_size": 163840})),
    (r"qwen3[ _-]?30b", _qwen3_moe(2048, 768, 48, 32)),
    (r"qwen3[ _-]?235b", _qwen3_moe(4096, 1536, 94, 64)),
    (r"qwen3[ _-]?0\.6b", _qwen("Qwen3", 1024, 3072, 28, 16, 8)),
    (r"qwen3[ _-]?1\.7b", _qwen("Qwen3", 2048, 6144, 28, 16, 8)),
    (r"qwen3[ _-]?4b", _qwen("Qwen3", 2560, 9728, 36, 32, 8)),
    (r"qwen3[ _-]?8b", _qwen("Qwen3", 4096, 12288, 36, 32, 8)),
    (r"qwen3[ _-]?14b", _qwen("Qwen3", 5120, 17408, 40, 40, 8)),
    (r"qwen3[ _-]?32b", _qwen("Qwen3", 5120, 25600, 64, 64, 8)),
    (r"qwen3[ _-]?next", Model("Qwen3NextForCausalLM", {})),
    (r"qwen2(\.5)?[ _-]?7b", _qwen("Qwen2", 3584, 18944, 28, 28, 4)),
    (r"qwen2(\.5)?[ _-]?14b", _qwen("Qwen2", 5120, 13824, 48, 40, 8)),
    (r"qwen2(\.5)?[ _-]?32b", _qwen("Qwen2", 5120, 27648, 64, 40, 8)),
    (r"qwen2(\.5)?[ _-]?72b", _qwen("Qwen2", 8192, 29568, 80, 64, 8)),
    (r"mistral[ _-]?7b", Model("MistralForCausalLM", {"sliding_window": None})),
    (r"deepseek[ _-]?v2[ _-]?lite|moonlight", Model("DeepseekV2ForCausalLM", {
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": None, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "vocab_size": 102400})),
    (r"gpt[ _-]?neo-?x[ _-]?20b", Model("GPTNeoXForCausalLM", {})),
    (r"gpt[ _-]?oss[ _-]?120b", Model("GptOssForCausalLM", {})),
    (r"gpt[ _-]?oss[ _-]?20b", Model("GptOssForCausalLM", {"num_hidden_layers": 24, "num_local_experts": 32})),
    (r"mixtral[ _-]?8x7b", Model("MixtralForCausalLM", {})),
    (r"mixtral[ _-]?8x22b", Model("MixtralForCausalLM", {
        "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48})),
    (r"nemotron[ _-]?4[ _-]?15b", Model("NemotronForCausalLM", {
        "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 32, "num_attention_heads": 48,
        "num_key_value_heads": 8, "vocab_size": 256000})),
    (r"nemotron[ _-]?4[ _-]?340b", Model("NemotronForCausalLM", {
        "hidden_size": 18432, "intermediate_size": 73728, "num_hidden_layers": 96, "num_attention_heads": 96,
        "num_key_value_heads": 8, "vocab_size": 256000})),
    (r"nemotron[ _-]?3[ _-]?nano", _nemotron3(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden_size=2688, mamba_num_heads=64,
        n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712)),
    (r"nemotron[ _-]?3[ _-]?super", _nemotron3(
        "MEMEMEM*E" + "MEMEM*EMEMEM*E" * 3 + "MEMEMEM*EMEMEM*E" + "ME" * 10 + "M", hidden_size=4096,
        mamba_num_heads=128, n_routed_experts=512, num_experts_per_tok=22, moe_latent_size=1024,
        moe_intermediate_size=2688, moe_shared_expert_intermediate_size=5376)),
    (r"opt[ _-]?350", _opt(1024, 24, 16)),
    (r"opt[ _-]?1\.3b", _opt(2048, 24, 32)),
    (r"opt[ _-]?2\.7b", _opt(2560, 32, 32)),
    (r"opt[ _-]?6\.7b", _opt(4096, 32, 32)),
    (r"opt[ _-]?13b", _opt(5120, 40, 40)),
    (r"opt[ _-]?30b?", _opt(7168, 48, 56)),
    (r"opt[ _-]?66b", _opt(9216, 64, 72)),
    (r"gpt[ _-]?neo[ _-]?2.7", Model("GPT2LMHeadModel", {
        **_GPT, "n_embd": 2560, "n_layer": 32, "n_head": 32, "n_positions": 2048,
        "vocab_size": 128256})),
)
"""What a row's name has to match (first match), and its model."""


def model_of(name: str, layers: str, hidden: str, heads: str, seq: int, notes: str) -> Model:
    """The model of a row.

    Raises:
        InputError: neither a known name nor a GPT whose sizes the row gives.
    """
    for pattern, model in KNOWN:
        if re.match(pattern, name, re.IGNORECASE):
            return model
    if not re.match(r"gpt|megatron|mt-nlg", name, re.IGNORECASE):
        raise InputError(f"model {name}: its configuration is not known here")
    if re.match(r"gpt-?3 ?175b", name, re.IGNORECASE) and not (layers or hidden or heads):
        layers, hidden, heads = "96", "12288", "96"  # Brown et al., 2020, table 2.1
    if not (layers and hidden and heads):
        raise InputError(f"model {name}: the row gives no layers, hidden size and heads")
    width, count, parts = (_size(name, text) for text in (hidden, layers, heads))
    if count > 1000 or width % parts:
        raise InputError(f"model {name}: {count} layers of {width} in {parts} heads; expected at most 1,000 layers, and"
                         " heads that divide the hidden size")
    vocab = re.search(r"vocab (\d{1,7})\b", notes)
    return Model("GPT2LMHeadModel", {
        **_GPT, "n_embd": width, "n_layer": count, "n_head": parts,
        "n_positions": seq, "vocab_size": int(vocab[1]) if vocab else 51200})


def _size(name: str, text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,6}(\.0)?", text):
        raise InputError(f"model {name}: found {text!r} among layers, hidden size and heads; expected whole numbers")
    return int(text.removesuffix(".0"))
