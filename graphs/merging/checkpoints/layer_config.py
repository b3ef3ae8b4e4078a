"""What a config says by layer, when a merge picks layers; and what models of one shape disagree about."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mipipe.graphs.errors import InputError

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks")
"""How many layers there are, by the names that configs have for it; of several the least is of blocks (LongCat)."""
INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "global_attn_layers",
           "cross_attention_layers", "dense_layers", "hybrid_layer_ids", "local_layer_ids", "ple_layer_ids",
           "rope_scaling_layers", "moe_layers_enum")
"""Lists of layer numbers (or text with commas between them)."""
CYCLES = ("block_types", "layer_pattern")
"""Lists of kinds that are repeated over the layers."""
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Counts of first layers that differ from the rest."""
LAST = ("num_kv_shared_layers",)
"""Counts of last layers that differ from the rest."""
PERIODS: dict[str, tuple[str, str]] = {
    "decoder_sparse_step": ("", ""), "interleave_moe_layer_step": ("", "moe_layers"),
    "moe_layer_freq": ("", ""), "moe_layer_interval": ("", ""), "sliding_window_pattern": ("", "layer_types"),
    "_sliding_window_pattern": ("", "layer_types"), "global_attn_every_n_layers": ("", "layer_types"),
    "layer_group_size": ("", "layer_types"), "full_attention_interval": ("", "layer_types"),
    "no_rope_layer_interval": ("", "no_rope_layers"), "attn_layer_period": ("attn_layer_offset", ""),
    "expert_layer_period": ("expert_layer_offset", "")}
"""Periods over layers: the key of their offset, and the list that counts in their place where there is one."""
_OTHERWISE = re.compile(r"architectures|token_id|time_step|languages|^mtp_")
"""Lists that may be as long as there are layers, and are not by layer."""
UNSAID = ("kv_source_layers", "loop_layer_index_start", "loop_layer_index_end", "n_layers_per_attn_res_block",
          "num_layers_per_stack", "n_input_layers", "n_recurrent_layers", "linear_attn_config")
"""What names layers in ways that do not carry over: it is kept for all layers in their order, else refused."""
BEHAVIOUR = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon",
             "hidden_act", "hidden_activation", "activation_function", "sliding_window", "use_sliding_window",
             "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "num_experts_per_tok")
"""What changes a model's function and no tensor's shape."""


def picked_layers(config: Mapping[str, Any], picked: Sequence[int], where: str) -> dict[str, Any]:
    """The text model's config for layers taken from its own: lists, counts and periods by layer follow.

    Args:
        picked: for each layer of the output, the layer it comes from.

    Raises:
        InputError: the config cannot say what the picked layers are.
    """
    counts = {key: config[key] for key in COUNTS if isinstance(config.get(key), int) and config[key] > 0}
    before = min(counts.values(), default=0)
    found = dict(config)
    for key in UNSAID:
        _expect(not config.get(key) or list(picked) == list(range(before)), where, key, config.get(key))
    for key, value in config.items():
        if key in INDICES:
            found[key] = _renumbered(value, picked)
        elif key in CYCLES and isinstance(value, list) and value:
            found[key] = [value[old % len(value)] for old in picked]
        elif key == "attention_types" and isinstance(value, list):  # GPT-Neo: kinds and how often they are repeated
            kinds = [kind for kinds, times in value for _ in range(times) for kind in kinds]
            found[key] = [[[kinds[old] for old in picked], 1]]
        elif key == "hybrid_override_pattern" and isinstance(value, str):  # Nemotron-H: a letter by layer
            found[key] = "".join(value[old] for old in picked)
        elif isinstance(value, list) and len(value) == before and not _OTHERWISE.search(key):
            found[key] = [value[old] for old in picked]
    for key in FIRST:
        if isinstance(config.get(key), int) and config[key] > 0:
            flags = [old < config[key] for old in picked]
            _expect(flags == sorted(flags, reverse=True), where, key, config[key])
            found[key] = sum(flags)
    for key in LAST:
        if isinstance(config.get(key), int) and config[key] > 0:
            flags = [old >= before - config[key] for old in picked]
            _expect(flags == sorted(flags), where, key, config[key])
            found[key] = sum(flags)
    if isinstance(config.get("moe_layer_end_index"), int) and config["moe_layer_end_index"] >= 0:
        flags = [old <= config["moe_layer_end_index"] for old in picked]
        _expect(flags == sorted(flags, reverse=True), where, "moe_layer_end_index", config["moe_layer_end_index"])
        found["moe_layer_end_index"] = sum(flags) - 1
    if isinstance(config.get("max_window_layers"), int):
        flags = [old < config["max_window_layers"] for old in picked]
        listed = isinstance(config.get("layer_types"), list) or not config.get("use_sliding_window")
        _expect(listed or flags == sorted(flags, reverse=True), where, "max_window_layers", config["max_window_layers"])
        found["max_window_layers"] = sum(flags)
    for key, (offset, instead) in PERIODS.items():
        period = config.get(key)
        if isinstance(period, int) and period > 1 and not (instead and isinstance(config.get(instead), list)):
            hit = _hit(period, config.get(offset) if offset else period - 1)
            _expect(all(hit(new) == hit(old) for new, old in enumerate(picked)), where, key, period)
    for key, value in counts.items():
        found[key] = len(picked) * value // before
    return found if counts else {**found, COUNTS[0]: len(picked)}


def _renumbered(value: Any, picked: Sequence[int]) -> Any:
    """Layer numbers (a list, or text with commas between them) as they are after picking."""
    if isinstance(value, str) and value:
        old_numbers = [int(item) for item in value.split(",") if item.strip().isdigit()]
        return ",".join(str(new) for new, old in enumerate(picked) if old in old_numbers)
    return [new for new, old in enumerate(picked) if old in value] if isinstance(value, list) else value


def _hit(period: int, offset: Any) -> Callable[[int], bool]:
    start = offset if isinstance(offset, int) else 0
    return lambda layer: layer % period == start % period


def _expect(holds: bool, where: str, key: str, value: Any) -> None:
    if not holds:
        raise InputError(f"{where}: slices: the config's {key} {value} cannot say which of the stacked layers are of"
                         " which kind; take layers so that the pattern goes on, or first layers first")


def differences(label: str, config: Mapping[str, Any], other: str, reference: Mapping[str, Any]) -> str:
    """A line about what two configs of the same shapes disagree on, with both values; empty where nothing.

    What only one of them says is a default of the other that is not known here, and no disagreement.
    """
    mine, theirs = _plain_rope(_text(config)), _plain_rope(_text(reference))
    found = [f"{key} {mine[key]} and {theirs[key]}" for key in BEHAVIOUR
             if mine.get(key) is not None and theirs.get(key) is not None and mine[key] != theirs[key]]
    return (f"{label} and {other} differ in {', '.join(found)}; the result has those of {other}" if found else "")


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _plain_rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with ``rope_theta`` and ``rope_scaling`` in place of the newer ``rope_parameters`` that hold both."""
    rope = text.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return text  # by kind of layer
    scaling = text.get("rope_scaling")
    told = {**(scaling if isinstance(scaling, dict) else {}), **rope}
    found = {key: value for key, value in text.items() if key not in ("rope_parameters", "rope_scaling")}
    found |= {key: told.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in told}
    kind = told.pop("type", "default")
    if "rope_theta" in found:
        found["rope_scaling"] = {"rope_type": kind, **told}
    return found
