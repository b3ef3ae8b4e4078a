"""Assembling a mixture of experts from dense models: the recipe (in mergekit-moe's vocabulary) and its graph.

Attention, norms and embeddings come from the base; every dense model gives its MLP as one expert; the router comes from
a small checkpoint made beforehand (`mipipe.runtime.merge.router`). A Llama or Mistral base gives a Mixtral, a Qwen3
base a Qwen3-MoE: the architectures whose experts are exactly those MLPs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoint_files import CheckpointFiles, StoredTensor, licence_of, read_checkpoint
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeModel, MergeUnit
from mipipe.graphs.merging.quantised import refuse_quantised
from mipipe.graphs.merging.recipe import DTYPES
from mipipe.graphs.merging.recipe_paths import beside_recipe
from mipipe.graphs.merging.tensor_classes import classify, layer_index
from mipipe.graphs.serialize import STRICT, from_data, to_data, yaml_documents


@dataclass(frozen=True, slots=True)
class Expert:
    """A dense model that becomes an expert, and what it is for.

    ``positive_prompts`` (or token ids in ``positive_tokens``) are inputs it shall be chosen for, negative ones those it
    shall not.
    """

    __pydantic_config__: ClassVar = STRICT
    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    positive_tokens: tuple[tuple[int, ...], ...] = ()
    negative_tokens: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class MoeRecipe:
    """``gate_mode``: ``hidden`` (mean hidden states of the prompts in the base), ``cheap_embed`` (mean embeddings), or
    ``random`` (normal, for training afterwards)."""

    __pydantic_config__: ClassVar = STRICT
    base_model: str
    experts: tuple[Expert, ...]
    gate_mode: Literal["hidden", "cheap_embed", "random"] = "hidden"
    experts_per_token: int = 2
    dtype: str | None = None
    seed: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture with experts differs from its dense base: config changes and where tensors go."""

    model_type: str
    architecture: str
    expert: str
    """Name of an expert's tensor, with ``{expert}`` and ``{part}``, below the layer."""
    router: str
    parts: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)


_MIXTRAL = Family("mixtral", "MixtralForCausalLM", "block_sparse_moe.experts.{expert}.{part}.weight",
                  "block_sparse_moe.gate.weight", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
                  {"router_aux_loss_coef": 0.001, "output_router_logits": False})
_QWEN3 = Family("qwen3_moe", "Qwen3MoeForCausalLM", "mlp.experts.{expert}.{part}.weight", "mlp.gate.weight",
                {part: part for part in ("gate_proj", "down_proj", "up_proj")},
                {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []})
FAMILIES = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen3": _QWEN3}
"""By the model type of the base."""

ROUTER = "layers.{layer}"
"""Name of a layer's router in the checkpoint that holds them all."""


def is_moe_recipe(data: Mapping[str, Any]) -> bool:
    """Whether plain data is a recipe of this kind: it has ``experts`` and no merge method."""
    return "experts" in data and "merge_method" not in data


def parse_moe_recipe(data: Any, where: str) -> MoeRecipe:
    """A checked recipe.

    Raises:
        InputError: an unknown key, no experts, more experts per token than experts, a mode that lacks its prompts.
    """
    recipe = from_data(data, MoeRecipe, where)
    if not recipe.experts:
        raise InputError(f"{where}: has no experts")
    if not 1 <= recipe.experts_per_token <= len(recipe.experts):
        raise InputError(f"{where}: experts_per_token: found {recipe.experts_per_token}, expected 1 to"
                         f" {len(recipe.experts)}, the number of experts")
    if recipe.dtype is not None and recipe.dtype not in DTYPES:
        raise InputError(f"{where}: dtype: found {recipe.dtype!r}, expected one of {', '.join(DTYPES)}")
    if recipe.gate_mode != "random":
        for number, expert in enumerate(recipe.experts):
            if not expert.positive_prompts and not expert.positive_tokens:
                raise InputError(f"{where}: experts[{number}]: gate_mode {recipe.gate_mode} needs positive_prompts (or"
                                 " positive_tokens)")
    return recipe


def read_moe_recipe(path: str | Path) -> MoeRecipe | None:
    """The assembly a YAML file describes; None where it holds merge recipes."""
    documents = beside_recipe(yaml_documents(path), path)
    data = documents[0] if len(documents) == 1 else None
    return parse_moe_recipe(data, str(path)) if isinstance(data, dict) and is_moe_recipe(data) else None


def dry_router(recipe: MoeRecipe) -> CheckpointFiles:
    """The router checkpoint as it will be, for planning before it is made."""
    base = read_checkpoint(recipe.base_model)
    tensors = {name: StoredTensor(name, "F32", shape, "model.safetensors", 0, 4 * math.prod(shape))
               for name, shape in router_tensors(base, recipe).items()}
    return CheckpointFiles(base.path, {}, tensors, "router")


def dense_family(base: CheckpointFiles) -> Family:
    """The mixture-of-experts family a dense base becomes.

    Raises:
        InputError: an architecture that has none.
    """
    kind = str(base.config.get("model_type", ""))
    if kind not in FAMILIES:
        raise InputError(f"{base.path}: model_type {kind!r} cannot be made a mixture of experts; expected one of"
                         f" {', '.join(FAMILIES)}")
    if base.config.get("mlp_bias") or base.config.get("attention_bias"):
        raise InputError(f"{base.path}: has biases, which {FAMILIES[kind].model_type} cannot hold")
    return FAMILIES[kind]


def router_tensors(base: CheckpointFiles, recipe: MoeRecipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the routers to make: ``[experts, hidden]`` for every layer."""
    layers = {layer for name in base.tensors if (layer := layer_index(name)) is not None}
    return {ROUTER.format(layer=layer): (len(recipe.experts), int(base.config["hidden_size"]))
            for layer in sorted(layers)}


def build_moe(recipe: MoeRecipe, router: CheckpointFiles, where: str = "recipe") -> MergeGraph:
    """The graph of an assembly: every unit takes one tensor from one model.

    Raises:
        InputError: an expert that lacks a tensor or has another shape, an unsupported base.
    """
    base = read_checkpoint(recipe.base_model)
    family = dense_family(base)
    experts = [read_checkpoint(expert.source_model) for expert in recipe.experts]
    for files in (base, *experts):
        refuse_quantised(files.path, files)
    folders = [base, router, *experts]
    units = []
    for name, tensor in base.tensors.items():
        match = re.search(r"\.mlp\.(gate_proj|up_proj|down_proj)\.weight$", name)
        if match is None:
            units.append(_unit(name, 0, base, tensor, recipe))
            continue
        for number, expert in enumerate(experts):
            found = expert.require(name)
            if found.shape != tensor.shape:
                raise InputError(f"{where}: {expert.path}: {name} has shape {list(found.shape)}, the base's"
                                 f" {list(tensor.shape)}; experts must have the base's sizes")
            place = family.expert.format(expert=number, part=family.parts[match[1]])
            units.append(_unit(f"{name[:match.start()]}.{place}", 2 + number, expert, found, recipe))
    for layer in sorted({layer for name in base.tensors if (layer := layer_index(name)) is not None}):
        stored = router.require(ROUTER.format(layer=layer))
        first = next(unit for unit in units if unit.layer == layer)
        units.append(_unit(f"{first.stack}.{layer}.{family.router}", 1, router, stored, recipe, first.dtype))
    labels = [recipe.base_model, "router", *(expert.source_model for expert in recipe.experts)]
    models = tuple(MergeModel(label, files.path, files.fingerprint, "" if files is router else licence_of(files.path),
                              files.num_bytes) for label, files in zip(labels, folders, strict=True))
    config = {**base.config, **family.config, "model_type": family.model_type, "architectures": [family.architecture],
              "num_experts_per_tok": recipe.experts_per_token}
    count = "num_local_experts" if family.model_type == "mixtral" else "num_experts"
    config[count] = len(recipe.experts)
    if family.model_type != "mixtral":
        config["moe_intermediate_size"] = config["intermediate_size"]
    if recipe.dtype:
        config["dtype"] = recipe.dtype
        config.pop("torch_dtype", None)
    return MergeGraph(tuple(sorted(units, key=lambda unit: unit.name)), models, config, base.config, base.path,
                      to_data(recipe), seed=recipe.seed,
                      notes=tuple(dict.fromkeys(note for files in (base, *experts) for note in files.left_out)))


def _unit(name: str, model: int, files: CheckpointFiles, tensor: StoredTensor, recipe: MoeRecipe,
          dtype: str | None = None) -> MergeUnit:
    source = Input(model, files.path, tensor)
    wanted = DTYPES[recipe.dtype] if recipe.dtype else dtype or tensor.dtype
    kind = classify(name, tensor.shape, tensor.dtype)
    layer = layer_index(name)
    prefix = name.split(f".{layer}.")[0] if layer is not None else ""
    if kind == "buffer":
        return MergeUnit(name, "copy", tensor.shape, tensor.dtype, kind, None, (source,))
    return MergeUnit(name, "passthrough", tensor.shape, wanted, kind, None, (source,), {"scale": [1.0]}, layer,
                     stack=prefix)
