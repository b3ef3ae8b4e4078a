"""From a recipe to its `MergeGraph`: which tensors the output has, by which rule each is merged, and its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mipipe.graphs.calibration.streams import CalibrationPlan
from mipipe.graphs.errors import InputError
from mipipe.graphs.expressions import search
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, licence_of
from mipipe.graphs.merging.checkpoints.layer_config import Picked, layer_count, numbered_note, picked_layers
from mipipe.graphs.merging.checkpoints.lora import rename
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass, classify, with_layer
from mipipe.graphs.merging.graph import MergeGraph, MergeModel, MergeUnit
from mipipe.graphs.merging.needed_streams import calibration_of
from mipipe.graphs.merging.participants import AUTO_NAMES, Participant
from mipipe.graphs.merging.recipes.recipe import Branch, MergeRecipe
from mipipe.graphs.merging.unit_groups import widened
from mipipe.graphs.merging.units import MergeRule, UnitBuilder, slice_length
from mipipe.graphs.serialize import to_data


def build(recipe: MergeRecipe, where: str = "recipe",
          known: Mapping[str, CheckpointFiles] | None = None) -> MergeGraph:
    """The graph of a recipe. ``known`` gives results of earlier recipes by name.

    Raises:
        InputError: a missing model or tensor, shapes that do not fit, an unmatched filter or branch.
    """
    builder = UnitBuilder(recipe, known or {}, where)
    rules = _slice_rules(builder) if recipe.slices else _model_rules(builder)
    _check_leftovers(builder, {name for name, _ in rules})
    units = tuple(sorted((builder.unit(name, rule) for name, rule in rules), key=lambda unit: unit.name))
    if not units:
        raise InputError(f"{where}: its branches drop every tensor")
    idle = builder.filters.check(where, "lm_head.weight" if builder.reference.tied and not builder.untied else "")
    units, config = widened(units, _config(builder, units), builder.reference.files.config, where)
    models = tuple(_source(label, found) for label, found in builder.opened.items())
    rule = recipe.vocabulary
    tokenizer = builder.reference_label if rule is None or rule.source in ("base", "union") else rule.source
    align = recipe.align
    if align is not None and not any(unit.experts and unit.method != "copy" for unit in units):
        raise InputError(f"{where}: align: the models have no experts to match")
    return MergeGraph(units, models, config, builder.reference.files.config,
                      builder.opened[tokenizer].tokenizer_folder, to_data(recipe), builder.vocabulary,
                      "float64" if recipe.dtype == "float64" else "float32", recipe.seed,
                      align is not None and align.experts, align is not None and align.hidden_units,
                      (*_notes(builder), *idle), _calibration(builder, units))


def _notes(builder: UnitBuilder) -> tuple[str, ...]:
    """Lines for whoever merges."""
    notes = builder.notes()
    if builder.recipe.slices:
        notes.append(numbered_note(builder.text_config(builder.reference_label), _picked(builder), builder.where))
    return tuple(note for note in notes if note)


def _calibration(builder: UnitBuilder, units: Sequence[MergeUnit]) -> CalibrationPlan | None:
    """The models to run first, of what the recipe's methods need."""
    recipe = builder.recipe
    layers = layer_count(builder.text_config(builder.reference_label))
    own = {builder.labels.index(model.model): model.calibration for model in builder.all_models() if model.calibration}
    return calibration_of(units, recipe.calibration, own, layers, recipe.seed, builder.where)


def _source(label: str, participant: Participant) -> MergeModel:
    """A model with its adapters: their fingerprints, licences and bytes together."""
    parts = [participant.files, *(item.files for item in participant.adapters)]
    licences = dict.fromkeys(licence_of(part.path) for part in parts)  # each once, the model's first
    return MergeModel(label, participant.files.path, "+".join(part.fingerprint for part in parts), " + ".join(licences),
                      sum(part.num_bytes for part in parts), participant.files.file)


def _picked(builder: UnitBuilder) -> list[Picked]:
    """Where each layer of the output comes from: its slice's first source."""
    return [Picked(source.layer_range[0] + step, builder.text_config(source.model))
            for piece in builder.recipe.slices for source in piece.sources[:1] if source.layer_range
            for step in range(slice_length(source))]


def _branch_of(recipe: MergeRecipe, name: str) -> Branch | None:
    return next((branch for branch in recipe.branches if search(branch.tensors, name)), None)


def _branch_rule(recipe: MergeRecipe, branch: Branch) -> MergeRule:
    models = branch.models or tuple(
        model if branch.merge_method == recipe.merge_method else replace(model, parameters={})
        for model in recipe.models or recipe.slices[0].sources)
    return MergeRule(branch.name or branch.tensors, branch.merge_method, models, branch.base_model or recipe.base_model,
                 (branch.parameters,))


def _model_rules(builder: UnitBuilder) -> list[tuple[str, MergeRule]]:
    """Every output tensor with its rule, where whole models are merged."""
    recipe = builder.recipe
    main = MergeRule("", recipe.merge_method, recipe.models, recipe.base_model, (recipe.parameters,))
    names = set(builder.reference.tensors)
    for branch in recipe.branches:
        for model in branch.models:
            names |= {name for name in builder.opened[model.model].tensors if search(branch.tensors, name)}
        if branch.merge_method != "drop" and not any(search(branch.tensors, name) for name in names):
            raise InputError(f"{builder.where}: branch {branch.name or branch.tensors!r} matches no tensor")
    names |= builder.heads()
    rules = []
    for name in names:
        claimed = _branch_of(recipe, name)
        if claimed is None:
            rules.append((name, main))
        elif claimed.merge_method != "drop":
            rules.append((name, _branch_rule(recipe, claimed)))
    return rules


def _slice_rules(builder: UnitBuilder) -> list[tuple[str, MergeRule]]:
    """Every output tensor with its rule, where layers are stacked from slices."""
    recipe, prefix = builder.recipe, builder.prefix
    if prefix is None:
        raise InputError(f"{builder.where}: {builder.reference.label} has no numbered layers to slice")
    rules: list[tuple[str, MergeRule]] = []
    layer = 0
    for number, piece in enumerate(recipe.slices):
        for source in piece.sources:
            available = builder.stack_layers(source.model, prefix)
            assert source.layer_range is not None
            if source.layer_range[1] > available:
                raise InputError(f"{builder.where}: slices[{number}]: layer_range {list(source.layer_range)} of"
                                 f" {source.model}, which has {available} layers")
        for step in range(slice_length(piece.sources[0])):
            first = piece.sources[0].layer_range
            assert first is not None
            names = [name for name in builder.opened[piece.sources[0].model].tensors
                     if name.startswith(f"{prefix}.{first[0] + step}.")]
            rule = _slice_rule(recipe, number, step)
            rules += [(with_layer(name, layer), rule) for name in names]
            layer += 1
    for name in {*builder.reference.tensors, *builder.heads()}:
        if not builder.is_decoder(name):
            claimed = _branch_of(recipe, name)
            early = classify(name, (0, 0), "F32") is TensorClass.EMBEDDING
            rule = _slice_rule(recipe, 0 if early else len(recipe.slices) - 1, None)
            if claimed is None or claimed.merge_method != "drop":
                rules.append((name, rule if claimed is None else _branch_rule(recipe, claimed)))
    return rules


def _slice_rule(recipe: MergeRecipe, number: int, step: int | None) -> MergeRule:
    piece = recipe.slices[number]
    return MergeRule("", recipe.merge_method, piece.sources, piece.base_model or recipe.base_model,
                     (piece.parameters, recipe.parameters), step)


def _check_leftovers(builder: UnitBuilder, made: set[str]) -> None:
    """Raises where a merged model has tensors the output would silently lack."""
    recipe = builder.recipe
    if recipe.slices:
        return
    dropped = [branch.tensors for branch in recipe.branches]
    for label in builder.main_labels():
        participant = builder.opened[label]
        extra = sorted(name for name, tensor in participant.tensors.items()
                       if name not in made and classify(name, tensor.shape, tensor.dtype) is not TensorClass.BUFFER
                       and not any(search(pattern, name) for pattern in dropped))
        if extra:
            raise InputError(f"{builder.where}: {label} has {len(extra)} tensor{'s' if len(extra) > 1 else ''} that"
                             f" {builder.reference_label} lacks, first {extra[0]}; {_name_map(builder, extra[0])}give"
                             " them a branch (merge_method: passthrough keeps them, drop leaves them out)")


def _name_map(builder: UnitBuilder, name: str) -> str:
    """Advice to map names, where one of the maps known would help."""
    helps = any(rename(pairs, name) in builder.reference.tensors for pairs in AUTO_NAMES)
    return "map its names (names: auto), or " if helps else ""


def _config(builder: UnitBuilder, units: Sequence[MergeUnit]) -> dict[str, Any]:
    """The output's config.json: the reference's, with layers, vocabulary, dtype and tie as the merge made them."""
    recipe = builder.recipe
    config = dict(builder.reference.files.config)
    if not config:
        return config  # state dicts of something else
    text = dict(config["text_config"]) if isinstance(config.get("text_config"), dict) else None
    inner = config if text is None else text
    if recipe.slices:
        made = picked_layers(inner, _picked(builder), builder.where)
        config, text = (made, None) if text is None else (config, made)
        inner = made
    rows = next((unit.shape[0] for unit in units if unit.name == builder.reference.token_table), None)
    if rows is not None and rows != inner.get("vocab_size"):
        inner["vocab_size"] = rows
        if text is not None and "vocab_size" in config:
            config["vocab_size"] = rows
    head = any(unit.tensor_class is TensorClass.HEAD for unit in units)
    if head and (config.get("tie_word_embeddings") or inner.get("tie_word_embeddings")):
        inner["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    if recipe.vocabulary is not None and recipe.vocabulary.source in builder.opened:
        theirs = builder.opened[recipe.vocabulary.source].files.config
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if key in theirs:
                config[key] = theirs[key]
    wanted = recipe.out_dtype or recipe.dtype
    for place in (config, inner):
        for key in ("dtype", "torch_dtype"):
            if wanted and key in place:
                place[key] = wanted
    if text is not None:
        config["text_config"] = text
    return config
