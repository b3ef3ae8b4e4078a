"""What a config says by layer, when a merge picks layers; and what models of one shape disagree about."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
KINDS = ("layers_block_type", "layer_types", "mlp_layer_types", "hybrid_override_pattern")
"""Lists (or words) of kinds by layer, whose length is the number of layers where no count says it."""
PATTERN = "hybrid_override_pattern"
"""Nemotron-H's word of a letter by layer."""
NUMBERED = "per_layer_config"
"""A mapping from the numbers of layers to what differs there."""
USUAL = ("full_attention", "dense", False)
"""Kinds that layers have of which a config says nothing."""
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Counts of first layers that differ from the rest."""
LAST = ("num_kv_shared_layers",)
"""Counts of last layers that differ from the rest."""
PERIODS: dict[str, tuple[str, str]] = {
    "decoder_sparse_step": ("", ""), "interleave_moe_layer_step": ("", "moe_layers"),
    "moe_layer_freq": ("", ""), "moe_layer_interval": ("", ""), "sliding_window_pattern": ("", "layer_types"),
    "_sliding_window_pattern": ("", "layer_types"), "global_attn_every_n_layers": ("", "layer_types"),
    "layer_group_size": ("", "layer_types"), "full_attention_interval": ("", "layer_types"),
    "no_rope_layer_interval": ("", "no_rope_layers"), "attn_layer_period": ("attn_layer_offset", "layers_block_type"),
    "expert_layer_period": ("expert_layer_offset", "")}
"""Periods over layers: the key of their offset, and the list that counts in their place where there is one."""
_OTHERWISE = re.compile(r"architectures|token_id|time_step|languages|^mtp_")
"""Lists that may be as long as there are layers, and are not by layer."""
UNSAID = ("kv_source_layers", "loop_layer_index_start", "loop_layer_index_end", "n_layers_per_attn_res_block",
          "num_layers_per_stack", "n_input_layers", "n_recurrent_layers", "linear_attn_config",
          "num_decoder_layers", "decoder_layers", "encoder_layers")
"""What names layers in ways that do not carry over: it is kept for all layers in their order, else refused."""
COMPUTED = {"diffllama": "weighs its two attentions by the number of the layer",
            "beam": "weighs residuals by the number of the layer",
            "minicpm3": "scales residuals by the number of layers",
            "minimax": "lets attention decay by the number of the layer"}
"""Models, by type, that compute by a layer's number or by how many there are."""
BEHAVIOUR = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon",
             "hidden_act", "hidden_activation", "activation_function", "sliding_window", "use_sliding_window",
             "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "num_experts_per_tok")
"""What changes a model's function and no tensor's shape."""


@dataclass(frozen=True)
class Picked:
    """A layer of the output: the number it has in the model it comes from, and the config of that model's text."""

    old: int
    config: Mapping[str, Any]


def layer_count(config: Mapping[str, Any]) -> int:
    """How many layers a text model's config says there are; 0 where it says nothing.

    Layers beyond them, as for predicting further tokens, are of no stack that can be picked from.
    """
    told = [config[key] for key in COUNTS if type(config.get(key)) is int and config[key] > 0]
    lists = [len(config[key]) for key in KINDS if isinstance(config.get(key), (list, str)) and config[key]]
    return min(told, default=0) or min(lists, default=0)


def picked_layers(config: Mapping[str, Any], picked: Sequence[int | Picked], where: str) -> dict[str, Any]:
    """The text model's config for layers that were picked: lists, counts and periods by layer follow.

    Args:
        config: of the model whose architecture the output has; empty for state dicts that have none.
        picked: for each layer of the output, the layer it comes from; numbers alone are of ``config``.

    Raises:
        InputError: the config cannot say what the picked layers are.
    """
    if not config:
        return {}
    before = layer_count(config)
    inner = [key for key, value in config.items() if isinstance(value, dict) and layer_count(value)]
    if inner and not before:
        raise InputError(f"{where}: slices: the config says how many layers there are in {' and '.join(inner)}, where"
                         " it cannot be changed; expected them at the top, or in text_config")
    layers = [item if isinstance(item, Picked) else Picked(item, config) for item in picked]
    whole = [item.old for item in layers] == list(range(before))
    found = dict(config)
    for key in UNSAID:
        same = all(item.config.get(key) == config.get(key) for item in layers)
        _expect(same and (whole or not config.get(key)), where, key, config.get(key))
    found |= _lists(config, layers, where)
    listed = isinstance(config.get("mlp_layer_types"), list)
    for key in FIRST:
        flags = [item.old < _number(item.config, key) for item in layers]
        if any(flags) or _number(config, key) > 0:
            _expect(listed or (key in config and flags == sorted(flags, reverse=True)), where, key, config.get(key))
            found[key] = sum(flags)
    for key in LAST:
        flags = [0 < layer_count(item.config) - item.old <= _number(item.config, key) for item in layers]
        if any(flags) or _number(config, key) > 0:
            _expect(key in config and flags == sorted(flags), where, key, config.get(key))
            found[key] = sum(flags)
    if isinstance(config.get("moe_layer_end_index"), int) and config["moe_layer_end_index"] >= 0:
        flags = [item.old <= _number(item.config, "moe_layer_end_index") for item in layers]
        _expect(flags == sorted(flags, reverse=True), where, "moe_layer_end_index", config["moe_layer_end_index"])
        found["moe_layer_end_index"] = sum(flags) - 1
    if isinstance(config.get("max_window_layers"), int):
        flags = [item.old < _number(item.config, "max_window_layers") for item in layers]
        free = isinstance(config.get("layer_types"), list) or not config.get("use_sliding_window")
        _expect(free or flags == sorted(flags, reverse=True), where, "max_window_layers", config["max_window_layers"])
        found["max_window_layers"] = sum(flags)
    _check_periods(config, layers, where)
    counts = [key for key in COUNTS if isinstance(config.get(key), int) and config[key] > 0]
    for key in counts:
        found[key] = len(layers) * config[key] // before
    return found if before else {**found, COUNTS[0]: len(layers)}


def _lists(config: Mapping[str, Any], layers: Sequence[Picked], where: str) -> dict[str, Any]:
    """The config's lists and mappings by layer, as they are for the output's layers."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in (config, *(item.config for item in layers)) for key in each):
        kinds = [_kind_of(key, item) for item in layers]
        told = [kind for kind in kinds if kind is not _UNTOLD]
        if not told:
            _expect(key not in KINDS or not config.get(key), where, key, config.get(key))
            continue
        if len(told) < len(kinds):  # as of another transformers, which leaves out what is usual
            _expect(told[0] in USUAL and all(kind == told[0] for kind in told), where, key, config.get(key, "(unsaid)"))
            kinds = [told[0]] * len(kinds)
        value = next(each[key] for each in (config, *(item.config for item in layers)) if each.get(key) is not None)
        found[key] = _together(key, value, kinds)
        if isinstance(config.get(key), list) and key in KINDS:
            found[key] += config[key][layer_count(config):]  # of layers that predict further tokens
    return found


def _check_periods(config: Mapping[str, Any], layers: Sequence[Picked], where: str) -> None:
    """Raise unless every period goes on over the output's layers."""
    for key, (offset, instead) in PERIODS.items():
        period = config.get(key)
        if isinstance(period, int) and period > 1 and not (instead and isinstance(config.get(instead), list)):
            hit = _hit(period, config.get(offset) if offset else period - 1)
            said = period, config.get(offset)
            same = all((item.config.get(key), item.config.get(offset)) == said for item in layers)
            _expect(same and all(hit(new) == hit(item.old) for new, item in enumerate(layers)), where, key, period)


_UNTOLD = object()
"""A key that says nothing about a layer."""


def _kind_of(key: str, layer: Picked) -> Any:
    """What a key of a layer's own config says about it."""
    value, old, before = layer.config.get(key), layer.old, layer_count(layer.config)
    if key in INDICES:
        if isinstance(value, str) and value:
            return str(old) in [item.strip() for item in value.split(",")]
        return old in value if isinstance(value, list) else _UNTOLD
    if key in CYCLES:
        return value[old % len(value)] if isinstance(value, list) and value else _UNTOLD
    if key == "attention_types" and isinstance(value, list):  # GPT-Neo: kinds and how often they are repeated
        value = [kind for kinds, times in value for _ in range(times) for kind in kinds]
    elif key == NUMBERED and isinstance(value, dict):
        return value.get(str(old), value.get(old))
    elif _OTHERWISE.search(key) or not isinstance(value, list if key != PATTERN else str):
        return _UNTOLD
    further = layer.config.get("num_nextn_predict_layers")
    lengths = (before, before + further if key in KINDS and isinstance(further, int) else before)
    return value[old] if len(value) in lengths and old < before else _UNTOLD


def _together(key: str, value: Any, kinds: Sequence[Any]) -> Any:
    """A key's value for the output's layers."""
    if key in INDICES:
        numbers = [new for new, kind in enumerate(kinds) if kind]
        return ",".join(map(str, numbers)) if isinstance(value, str) else numbers
    if key == "attention_types":
        return [[list(kinds), 1]]
    if key == NUMBERED:
        return {str(new): kind for new, kind in enumerate(kinds) if kind is not None}
    return "".join(kinds) if key == PATTERN else list(kinds)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


def _hit(period: int, offset: Any) -> Callable[[int], bool]:
    start = offset if isinstance(offset, int) else 0
    return lambda layer: layer % period == start % period


def _expect(holds: bool, where: str, key: str, value: Any) -> None:
    if not holds:
        raise InputError(f"{where}: slices: the config's {key} {value} cannot say which of the stacked layers are of"
                         " which kind; take layers so that the pattern goes on, or first layers first")


def numbered_note(config: Mapping[str, Any], picked: Sequence[Picked], where: str) -> str:
    """A line about models that compute by a layer's number or by how many layers there are, where these change."""
    reason = COMPUTED.get(str(config.get("model_type")), "")
    if config.get("scale_attn_by_inverse_layer_idx"):
        reason = "divides attention by the number of the layer"
    same = [item.old for item in picked] == list(range(layer_count(config)))
    return "" if same or not reason else (f"{where}: slices: {config.get('model_type')} {reason}, so layers that get"
                                          " another number compute otherwise than in their model")


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
