"""The architectures with experts that dense models can be assembled into: names, config, and what each can hold.

A Llama or Mistral becomes a Mixtral, a DeepSeek-MoE or a Qwen2-MoE, a Qwen2 a Qwen2-MoE, a Qwen3 a Qwen3-MoE: the
architectures whose experts are exactly those MLPs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles

_PLAIN = {part: part for part in ("gate_proj", "down_proj", "up_proj")}
_DEEPSEEK = "deepseek-ai/deepseek-moe-16b-base"


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture with experts differs from its dense base: config changes and where tensors go.

    ``expert`` and ``shared`` are names of an expert's tensor below the layer, with ``{expert}`` and ``{part}``.
    ``shared_gate``: the shared expert has a gate of that name, made of prompts like the routers. ``biases``: query, key
    and value have biases, zero where the base has none.
    """

    name: str
    bases: tuple[str, ...]
    model_type: str
    architecture: str
    expert: str
    router: str
    count: str
    """The config's key for the number of experts."""
    parts: dict[str, str] = field(default_factory=lambda: _PLAIN)
    config: dict[str, Any] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    """Keys of the config that get the dense MLP's size."""
    shared: str = ""
    shared_gate: str = ""
    shared_count: Literal["none", "at most one", "one"] = "none"
    biases: bool = False


MIXTRAL = Family(
    "mixtral", ("llama", "mistral"), "mixtral", "MixtralForCausalLM",
    "block_sparse_moe.experts.{expert}.{part}.weight", "block_sparse_moe.gate.weight", "num_local_experts",
    {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    {"router_aux_loss_coef": 0.001, "output_router_logits": False, "sliding_window": None})
DEEPSEEK = Family(
    "deepseek", ("llama", "mistral"), "deepseek", "DeepseekForCausalLM",
    "mlp.experts.{expert}.{part}.weight", "mlp.gate.weight", "n_routed_experts",
    config={"first_k_dense_replace": 0, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True,
            "auto_map": {"AutoConfig": f"{_DEEPSEEK}--configuration_deepseek.DeepseekConfig",
                         "AutoModel": f"{_DEEPSEEK}--modeling_deepseek.DeepseekModel",
                         "AutoModelForCausalLM": f"{_DEEPSEEK}--modeling_deepseek.DeepseekForCausalLM"}},
    inner=("moe_intermediate_size",), shared="mlp.shared_experts.{part}.weight", shared_count="at most one")
QWEN2 = Family(
    "qwen2", ("qwen2", "llama", "mistral"), "qwen2_moe", "Qwen2MoeForCausalLM",
    "mlp.experts.{expert}.{part}.weight", "mlp.gate.weight", "num_experts",
    config={"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [], "sliding_window": None,
            "use_sliding_window": False},
    inner=("moe_intermediate_size", "shared_expert_intermediate_size"), shared="mlp.shared_expert.{part}.weight",
    shared_gate="mlp.shared_expert_gate.weight", shared_count="one", biases=True)
QWEN3 = Family(
    "qwen3", ("qwen3",), "qwen3_moe", "Qwen3MoeForCausalLM",
    "mlp.experts.{expert}.{part}.weight", "mlp.gate.weight", "num_experts",
    config={"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []}, inner=("moe_intermediate_size",))
FAMILIES = (MIXTRAL, DEEPSEEK, QWEN2, QWEN3)
"""In the order in which they are chosen where the recipe names none."""


def choose_family(base: CheckpointFiles, architecture: str | None, num_shared: int, prompted: bool,
                  random: bool) -> Family:
    """The family that a dense base becomes.

    Args:
        architecture: the start of a family's name, or None.
        prompted: the shared experts have prompts. random: all gates are random.

    Raises:
        InputError: none of them can be made of this base with these shared experts.
    """
    kind = str(base.config.get("model_type", ""))
    named = [family for family in FAMILIES if family.name.startswith((architecture or "").lower().split(" ")[0])]
    if not named:
        raise InputError(f"architecture: found {shown(architecture)}, expected one of"
                         f" {', '.join(family.name for family in FAMILIES)}")
    fitting = [family for family in named if kind in family.bases]
    if not fitting:
        bases = sorted({item for family in named for item in family.bases})
        raise InputError(f"{base.path}: model_type {kind!r} cannot be made"
                         f" {'a mixture of experts' if architecture is None else named[0].name}; expected one of"
                         f" {', '.join(bases)}")
    reasons = [_problem(family, base, num_shared, prompted, random) for family in fitting]
    if "" not in reasons:
        raise InputError(f"{base.path}: {'; '.join(dict.fromkeys(reasons))}")
    return fitting[reasons.index("")]


def _problem(family: Family, base: CheckpointFiles, num_shared: int, prompted: bool, random: bool) -> str:
    """Why a family cannot hold the assembly; empty where it can."""
    if family.shared_count == "none" and num_shared:
        return f"{family.name} has no shared experts"
    if num_shared > 1 or (family.shared_count == "one" and not num_shared):
        return f"{family.name} has {family.shared_count} shared expert, found {num_shared}"
    if num_shared and family.shared_gate and not (prompted or random):
        return f"the shared expert of {family.name} has a gate, so it needs prompts"
    if num_shared and prompted and not family.shared_gate:
        return f"the shared expert of {family.name} has no gate, so no prompts"
    if base.config.get("mlp_bias") or (base.config.get("attention_bias") and not family.biases):
        return f"the base has biases, which {family.name} cannot hold"
    return ""
