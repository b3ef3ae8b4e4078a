"""Assembling a mixture of experts from dense models: the recipe (in mergekit-moe's vocabulary) and its graph.

Attention, norms and embeddings come from the base; every dense model gives its MLP as one expert; the routers come from
a small checkpoint made beforehand (`mipipe.runtime.merge.programs.router`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor, licence_of, read_checkpoint
from mipipe.graphs.merging.checkpoints.quantised import refuse_quantised
from mipipe.graphs.merging.checkpoints.tensor_classes import classify, layer_index
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeModel, MergeUnit
from mipipe.graphs.merging.moe_families import Family, choose_family
from mipipe.graphs.merging.recipes.forms import normal_form
from mipipe.graphs.merging.recipes.paths import beside_recipe
from mipipe.graphs.merging.recipes.recipe import DTYPES
from mipipe.graphs.serialize import STRICT, from_data, to_data, yaml_documents

RANDOM = ("random", "uniform_random")
"""Gate modes that need no prompts."""


@dataclass(frozen=True, slots=True)
class Expert:
    """A dense model that becomes an expert, and what it is for.

    ``positive_prompts`` (or token ids in ``positive_tokens``) are inputs it shall be chosen for, negative ones those it
    shall not. ``residual_scale``: factor of what it adds to the residual stream (its ``down_proj``).
    """

    __pydantic_config__: ClassVar = STRICT
    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    positive_tokens: tuple[tuple[int, ...], ...] = ()
    negative_tokens: tuple[tuple[int, ...], ...] = ()
    residual_scale: float | None = None

    @property
    def has_prompts(self) -> bool:
        return bool(self.positive_prompts or self.positive_tokens)


@dataclass(frozen=True, slots=True)
class MoeRecipe:
    """``gate_mode``, as in mergekit: ``hidden`` (or ``hidden_last``) takes the residual stream before each layer at the
    prompts' last tokens, ``hidden_avg`` its mean over their tokens, ``cheap_embed`` the sum of token embeddings;
    ``random`` is standard normal and ``uniform_random`` torch's own start of a linear layer, for training afterwards.

    ``shared_experts`` work on every token, beside those the router chooses. ``architecture``: the family's name, where
    several can be made.
    """

    __pydantic_config__: ClassVar = STRICT
    base_model: str
    experts: tuple[Expert, ...]
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = "hidden"
    experts_per_token: int = 2
    shared_experts: tuple[Expert, ...] = ()
    architecture: str | None = None
    dtype: str | None = None
    seed: int = 0
    name: str = ""


ROUTER, SHARED_GATE, ZEROS = "layers.{layer}", "shared.{layer}", "zeros.{name}"
"""Names of a layer's router, its shared expert's gate, and biases of zeros in the checkpoint that holds them all."""


def is_moe_recipe(data: Mapping[str, Any]) -> bool:
    """Whether plain data is a recipe of this kind: it has ``experts`` and no merge method."""
    return "experts" in data and "merge_method" not in data


def parse_moe_recipe(data: Any, where: str) -> MoeRecipe:
    """A checked recipe.

    Raises:
        InputError: an unknown key, no experts, more experts per token than experts, a mode that lacks its prompts.
    """
    recipe = from_data(normal_form(data, where), MoeRecipe, where)
    if not recipe.experts:
        raise InputError(f"{where}: has no experts")
    if not 1 <= recipe.experts_per_token <= len(recipe.experts):
        raise InputError(f"{where}: experts_per_token: found {recipe.experts_per_token}, expected 1 to"
                         f" {len(recipe.experts)}, the number of experts")
    if recipe.dtype is not None and recipe.dtype not in DTYPES:
        raise InputError(f"{where}: dtype: found {recipe.dtype!r}, expected one of {', '.join(DTYPES)}")
    if recipe.gate_mode not in RANDOM:
        for number, expert in enumerate(recipe.experts):
            if not expert.has_prompts:
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


def family_of(base: CheckpointFiles, recipe: MoeRecipe) -> Family:
    """The mixture-of-experts family that a recipe makes of its base."""
    prompted = any(expert.has_prompts for expert in recipe.shared_experts)
    return choose_family(base, recipe.architecture, len(recipe.shared_experts), prompted, recipe.gate_mode in RANDOM)


def router_tensors(base: CheckpointFiles, recipe: MoeRecipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors to make: for every layer a router ``[experts, hidden]``, the shared expert's gate
    ``[1, hidden]``, and biases of zeros where the family has some and the base none."""
    family, hidden = family_of(base, recipe), int(base.config["hidden_size"])
    found: dict[str, tuple[int, ...]] = {}
    for layer in _layers(base):
        found[ROUTER.format(layer=layer)] = (len(recipe.experts), hidden)
        if family.shared_gate and recipe.shared_experts:
            found[SHARED_GATE.format(layer=layer)] = (1, hidden)
    for name, tensor in base.tensors.items() if family.biases else ():
        bias = name.removesuffix("weight") + "bias"
        if re.search(r"self_attn\.[qkv]_proj\.weight$", name) and bias not in base.tensors:
            found[ZEROS.format(name=bias)] = tensor.shape[:1]
    return found


def _layers(base: CheckpointFiles) -> list[int]:
    return sorted({layer for name in base.tensors if (layer := layer_index(name)) is not None})


def build_moe(recipe: MoeRecipe, router: CheckpointFiles, where: str = "recipe") -> MergeGraph:
    """The graph of an assembly: every unit takes one tensor from one model.

    Raises:
        InputError: an expert that lacks a tensor or has another shape, an unsupported base.
    """
    base = read_checkpoint(recipe.base_model)
    family = family_of(base, recipe)
    sources = [*recipe.experts, *recipe.shared_experts]
    experts = [read_checkpoint(expert.source_model) for expert in sources]
    for files in (base, *experts):
        refuse_quantised(files.path, files)
    folders = [base, router, *experts]
    units = []
    for name, tensor in base.tensors.items():
        match = re.search(r"\.mlp\.(gate_proj|up_proj|down_proj)\.weight$", name)
        if match is None:
            units.append(_unit(name, 0, base, tensor, recipe))
            continue
        for number, (expert, files) in enumerate(zip(sources, experts, strict=True)):
            found = files.require(name)
            if found.shape != tensor.shape:
                raise InputError(f"{where}: {files.path}: {name} has shape {list(found.shape)}, the base's"
                                 f" {list(tensor.shape)}; experts must have the base's sizes")
            pattern = family.expert if number < len(recipe.experts) else family.shared
            place = pattern.format(expert=number, part=family.parts[match[1]])
            scale = expert.residual_scale if match[1] == "down_proj" else None
            units.append(_unit(f"{name[:match.start()]}.{place}", 2 + number, files, found, recipe, scale=scale))
    units += _made_units(recipe, family, router, {layer: unit for unit in units if (layer := unit.layer) is not None})
    labels = [recipe.base_model, "router", *(expert.source_model for expert in sources)]
    models = tuple(MergeModel(label, files.path, files.fingerprint, "" if files is router else licence_of(files.path),
                              files.num_bytes) for label, files in zip(labels, folders, strict=True))
    return MergeGraph(tuple(sorted(units, key=lambda unit: unit.name)), models, _config(recipe, family, base),
                      base.config, base.path, to_data(recipe), seed=recipe.seed,
                      notes=tuple(dict.fromkeys(note for files in (base, *experts) for note in files.left_out)))


def _made_units(recipe: MoeRecipe, family: Family, router: CheckpointFiles,
                of_layer: Mapping[int, MergeUnit]) -> list[MergeUnit]:
    """Routers, gates and zeros, in the dtype of their layer."""
    units = []
    for layer, like in sorted(of_layer.items()):
        for pattern, place in ((ROUTER, family.router), (SHARED_GATE, family.shared_gate)):
            stored = router.tensors.get(pattern.format(layer=layer))
            if stored is not None:
                units.append(_unit(f"{like.stack}.{layer}.{place}", 1, router, stored, recipe, like.dtype))
    start = ZEROS.format(name="")
    units += [_unit(name.removeprefix(start), 1, router, tensor, recipe, next(iter(of_layer.values())).dtype)
              for name, tensor in router.tensors.items() if name.startswith(start)]
    return units


def _config(recipe: MoeRecipe, family: Family, base: CheckpointFiles) -> dict[str, Any]:
    config = {**base.config, **family.config, "model_type": family.model_type, "architectures": [family.architecture],
              "num_experts_per_tok": recipe.experts_per_token, family.count: len(recipe.experts)}
    if family.model_type == "deepseek":
        config["n_shared_experts"] = len(recipe.shared_experts) or None
    for key in family.inner:
        config[key] = config["intermediate_size"]
    if recipe.dtype:
        config["dtype"] = recipe.dtype
        config.pop("torch_dtype", None)
    return config


def _unit(name: str, model: int, files: CheckpointFiles, tensor: StoredTensor, recipe: MoeRecipe,
          dtype: str | None = None, scale: float | None = None) -> MergeUnit:
    source = Input(model, files.path, tensor)
    wanted = DTYPES[recipe.dtype] if recipe.dtype else dtype or tensor.dtype
    kind = classify(name, tensor.shape, tensor.dtype)
    layer = layer_index(name)
    prefix = name.split(f".{layer}.")[0] if layer is not None else ""
    if kind == "buffer":
        return MergeUnit(name, "copy", tensor.shape, tensor.dtype, kind, None, (source,))
    return MergeUnit(name, "passthrough", tensor.shape, wanted, kind, None, (source,),
                     {"scale": [1.0 if scale is None else scale]}, layer, stack=prefix)
