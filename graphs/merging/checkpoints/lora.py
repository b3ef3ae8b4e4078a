"""LoRA folders as PEFT writes them, bound to the model they adapt: factors, scales, and whole tensors in its place.

Scales follow PEFT: ``alpha / r`` (``alpha / sqrt(r)`` for rsLoRA), where the keys of ``alpha_pattern`` and
``rank_pattern`` are regular expressions for the end of a module's name, and the first that matches counts. With DoRA
(arXiv 2402.09353) the rows of the adapted weight are scaled to the magnitudes that the adapter holds. Of weights stored
``[in, out]`` (embeddings, GPT-2's Conv1D) the change is ``(B A)^T``. Tensors that are no factors (``modules_to_save``,
biases, resized tables) take the place of the model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.expressions import check_expression, search, substitute
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor, read_checkpoint
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass, classify, is_transposed

PEFT_ALPHA = 8.0
"""``lora_alpha`` where an adapter's config gives none, PEFT's default."""
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "true", "false")
"""Values of ``init_lora_weights`` that leave the base model as it was."""
COMPUTED_STARTS = ("pissa", "olora")
"""Those that take from the base what can be found in it again: its leading singular triplets (PiSSA, arXiv 2404.02948),
or the first columns and rows of its QR decomposition (OLoRA, arXiv 2406.01775)."""

Pairs = Sequence[tuple[str, str]]
"""Substitutions of regular expressions; of a name the first that changes it is made."""


@dataclass(frozen=True)
class LoraFactors:
    """One adapter's factors for a weight: ``delta = scale * B A``, B ``[m, r]``, A ``[r, n]``.

    ``magnitude`` ``[m]``: with DoRA, the norms that the rows of ``weight + delta`` get. ``transposed``: the weight is
    ``[n, m]``, and ``delta^T`` is added to it.
    """

    folder: str
    down: StoredTensor
    up: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    start: str = ""
    """One of `COMPUTED_STARTS`, where the weight loses what the factors began with."""
    transposed: bool = False


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter on a model: factors by the canonical name of the weight, and tensors that replace the model's."""

    files: CheckpointFiles
    factors: Mapping[str, LoraFactors]
    tensors: Mapping[str, StoredTensor]


def bind(adapter: CheckpointFiles, base: str, tensors: Mapping[str, StoredTensor],
         maps: Sequence[Pairs], sign: float = 1.0, model_type: str = "") -> BoundAdapter:
    """An adapter's tensors by the canonical names of the model it adapts.

    Args:
        base: the model, for errors.
        tensors: the model's, by canonical name.
        maps: name maps to try on the adapter's names; the one that fits most of them is used.
        sign: -1 for the adapter that another one started as, which the base has lost.
        model_type: the model's, which says how its weights are stored.

    Raises:
        InputError: no LoRA adapter, one that cannot be added to weights, or one that does not fit the model.
    """
    start = _check_kind(adapter)
    pairs = max(maps, key=lambda pairs: sum(_target(name, pairs) in tensors for name in adapter.tensors))
    modules: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in adapter.tensors.items():
        part = factor_name(name)
        if part is not None:
            modules.setdefault(part[0], {})[part[1]] = tensor
            continue
        target = _target(name, pairs)
        if target not in tensors and classify(target, tensor.shape, tensor.dtype) is not TensorClass.HEAD:
            raise InputError(f"{adapter.path}: tensor {name} is no LoRA factor, and {base} has no such tensor that it"
                             " could replace; only LoRA adapters on weights can be merged")
        whole[target] = tensor
    _check_patterns(adapter, list(modules))
    factors = {}
    for module, found in modules.items():
        target = rename(pairs, f"{module}.weight")
        turned = ".lora_embedding_" in next(iter(found.values())).name or is_transposed(target, model_type)
        _check_fit(adapter, base, module, found, whole.get(target, tensors.get(target)), turned)
        if turned and (start or "magnitude" in found):
            raise InputError(f"{adapter.path}: {module} is stored transposed, for which"
                             f" {'DoRA' if 'magnitude' in found else f'init_lora_weights {start}'} is not supported")
        scale = sign * _scale(adapter, module, found["A"].shape[0])
        factors[target] = LoraFactors(adapter.path, found["A"], found["B"], scale, found.get("magnitude"), start,
                                      turned)
    return BoundAdapter(adapter, factors, whole)


def rename(pairs: Pairs, name: str) -> str:
    """A name after the first substitution that changes it."""
    for source, target in pairs:
        replaced = substitute(source, target, name, count=1)
        if replaced != name:
            return replaced
    return name


def factor_name(name: str) -> tuple[str, str] | None:
    """``(module, "A" or "B" or "magnitude")`` of an adapter tensor's name; None for others."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?(A|B|magnitude)(?:_vector)?(?:\.\w+?)??"
                         r"(?:\.weight)?(?<!\.bias)", name)
    return (match[1], match[2]) if match else None


def _target(name: str, pairs: Pairs) -> str:
    """The canonical name of the model's tensor that an adapter's tensor works on."""
    part = factor_name(name)
    if part is not None:
        return rename(pairs, f"{part[0]}.weight")
    plain = re.sub(r"\.(modules_to_save|base_layer)(\.default)?(?=\.)", "", name.removeprefix("base_model.model."))
    return rename(pairs, plain)


def pattern_key(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first key of an ``alpha_pattern`` or ``rank_pattern`` that a module's name ends with, by PEFT's rule."""
    return next((key for key in patterns if search(rf"^(.*\.)?({key})$", module)), None)


def _patterns(adapter: CheckpointFiles, name: str) -> Mapping[str, Any]:
    found = adapter.adapter.get(name) or {}
    if not isinstance(found, dict):
        raise InputError(f"{adapter.path}: adapter_config.json: {name} is {shown(found)}, expected a mapping")
    return found


def _check_patterns(adapter: CheckpointFiles, modules: Sequence[str]) -> None:
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = _patterns(adapter, name)
        for key, value in patterns.items():
            check_expression(rf"^(.*\.)?({key})$", f"{adapter.path}: {name}")
            hit = any(search(rf"^(.*\.)?({key})$", module) for module in modules)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise InputError(f"{adapter.path}: {name}: {key}: found {shown(value)}, expected a positive number")
            if not hit:
                raise InputError(f"{adapter.path}: {name}: {shown(key)} matches none of the adapter's modules (as"
                                 f" {modules[0] if modules else 'it has none'}); correct adapter_config.json")


def _scale(adapter: CheckpointFiles, module: str, rank: int) -> float:
    """What PEFT multiplies ``B A`` by."""
    config = adapter.adapter
    ranks, alphas = _patterns(adapter, "rank_pattern"), _patterns(adapter, "alpha_pattern")
    key = pattern_key(ranks, module)
    told = config.get("r") if key is None else ranks[key]
    if told is not None and told != rank:
        source = "r" if key is None else f"rank_pattern {key!r}"
        raise InputError(f"{adapter.path}: {module} has rank {rank}, but {source} in adapter_config.json says"
                         f" {shown(told)}")
    key = pattern_key(alphas, module)
    alpha = config.get("lora_alpha", PEFT_ALPHA) if key is None else alphas[key]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise InputError(f"{adapter.path}: lora_alpha: found {shown(alpha)}, expected a number")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def initial_adapter(adapter: CheckpointFiles) -> CheckpointFiles | None:
    """What an adapter started as, where its folder has that in a folder of its own (PEFT's ``..._init``)."""
    folders = sorted(path for path in Path(adapter.path).glob("*_init") if (path / "adapter_config.json").exists())
    return read_checkpoint(folders[0]) if folders else None


def _check_kind(adapter: CheckpointFiles) -> str:
    """The start to find again in the base, if the adapter has one.

    Raises:
        InputError: an adapter whose change of the model is no sum of products of factors that are known.
    """
    config, path = adapter.adapter, adapter.path
    if not config:
        raise InputError(f"{path}: is no LoRA adapter (no adapter_config.json), but follows a + in the recipe")
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{path}: is an adapter of type {shown(config['peft_type'])}; only LORA can be merged")
    start = config.get("init_lora_weights")
    plain = start.lower() if isinstance(start, str) else start
    for key in ("layer_replication", "alora_invocation_tokens"):
        if config.get(key):
            raise InputError(f"{path}: has {key}, which cannot be merged into weights")
    if plain in PLAIN_STARTS or initial_adapter(adapter) is not None:
        return ""
    if plain in COMPUTED_STARTS and not config.get("use_dora"):
        return str(plain)
    raise InputError(f"{path}: was started with init_lora_weights {shown(start)}, which changes the base model too, so"
                     " its factors do not fit the plain base; put the adapter it started as into a folder ..._init"
                     " inside it, or save it with PEFT's save_pretrained(...,"
                     " path_initial_model_for_weight_conversion=...), which makes it a plain LoRA adapter")


def _check_fit(adapter: CheckpointFiles, base: str, module: str, found: Mapping[str, StoredTensor],
               weight: StoredTensor | None, turned: bool) -> None:
    path = adapter.path
    if weight is None:
        hint = ("; its target_parameters are no matrices of their own, as stacked experts are, and cannot be merged"
                if adapter.adapter.get("target_parameters") else "; where the names differ by a prefix, give the model"
                " a name map (names: auto, or from/to)")
        raise InputError(f"{path}: adapts {module}, which {base} does not have{hint}")
    missing = {"A", "B"} - set(found)
    if missing:
        raise InputError(f"{path}: has no lora_{min(missing)} for {module}")
    if bool(adapter.adapter.get("use_dora")) != ("magnitude" in found):
        raise InputError(f"{path}: use_dora is {bool(adapter.adapter.get('use_dora'))} in adapter_config.json, but"
                         f" {module} has {'a' if 'magnitude' in found else 'no'} magnitude vector")
    rank = found["A"].shape[0] if found["A"].shape else 0
    flat = len(weight.shape) == 2 and rank > 0
    rows, columns = (0, 0) if not flat else weight.shape[::-1] if turned else weight.shape
    expected = {"A": (rank, columns), "B": (rows, rank), "magnitude": (rows,)}
    for part, tensor in found.items():
        if not flat or tensor.shape != expected[part]:
            raise InputError(f"{path}: {tensor.name} of shape {list(tensor.shape)} does not fit {module} of shape"
                             f" {list(weight.shape)}")
