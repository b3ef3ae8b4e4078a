"""Units of a merge: opens the models, matches names, resolves every parameter, checks every shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.expert_layout import as_single, has_banks, is_single
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor
from mipipe.graphs.merging.checkpoints.layer_config import differences, layer_count
from mipipe.graphs.merging.checkpoints.tensor_classes import (
    FLOATING,
    QUANTISED,
    TensorClass,
    classify,
    is_transposed,
    layer_index,
    layer_prefix,
    with_layer,
)
from mipipe.graphs.merging.graph import Adapter, Input, MergeUnit
from mipipe.graphs.merging.method_table.method_spec import Base
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.participants import Participant, decoder_prefix, num_layers, open_participant
from mipipe.graphs.merging.recipes.recipe import (
    DTYPES,
    MergeRecipe,
    Parameters,
    RecipeModel,
    merged_models,
    merges_base,
    same_model,
)
from mipipe.graphs.merging.token_rows import check_given, join_vocabularies
from mipipe.graphs.merging.values import Filters, values_of

_EXPERT = re.compile(r"^(.*\.(?:mlp|block_sparse_moe|moe|feed_forward|ffn))\.(?:experts(?:\.|$)|gate\.|router\.)")


@dataclass(frozen=True)
class MergeRule:
    """How a set of tensors is merged: a method, its models with their parameters, shared parameters."""

    group: str
    method: str
    models: tuple[RecipeModel, ...]
    base: str | None
    shared: tuple[Parameters, ...]
    step: int | None = None
    """Where slices pick layers: how far into each source's layer range the output layer is."""


class UnitBuilder:
    """What is shared while the units of one recipe are made: opened models, filters, the vocabulary."""

    def __init__(self, recipe: MergeRecipe, known: Mapping[str, CheckpointFiles], where: str) -> None:
        self.recipe, self.where, self.filters = recipe, where, Filters()
        self.reference = open_participant(self.reference_label, known, recipe.base_model)
        self.prefix = decoder_prefix(self.reference)
        models = [*self.all_models(), *([RecipeModel(recipe.base_model, names=recipe.base_names)]
                                        if recipe.base_model else [])]
        names = {model.model: model.names for model in models if model.names}
        self.opened: dict[str, Participant] = {}
        for label in dict.fromkeys([self.reference_label, *(model.model for model in models)]):
            self.opened[label] = open_participant(label, known, recipe.base_model, names.get(label, ()),
                                                  self.reference.tensors)
        self.one_expert_layout()
        self.labels = list(self.opened)
        self._depths: dict[str, int] = {}
        self._experts = expert_blocks(self.reference)
        self.vocabulary = join_vocabularies(recipe.vocabulary, self.opened, self.reference_label, where)
        self.untied = self.heads_differ()

    def one_expert_layout(self) -> None:
        """Read all models' experts as single tensors, where some store them so and others as banks."""
        single = next((item for item in self.opened.values() if is_single(item.tensors)), None)
        if single is None or not any(has_banks(item.tensors) for item in self.opened.values()):
            return
        self.opened = {label: replace(item, tensors=as_single(item.tensors, single.tensors))
                       for label, item in self.opened.items()}
        self.reference = self.opened[self.reference_label]

    def all_models(self) -> list[RecipeModel]:
        """Every model mentioned anywhere in the recipe."""
        recipe = self.recipe
        return [*recipe.models, *(source for piece in recipe.slices for source in piece.sources),
                *(model for branch in recipe.branches for model in branch.models),
                *(RecipeModel(base) for base in (*(branch.base_model for branch in recipe.branches),
                                                 *(piece.base_model for piece in recipe.slices)) if base),
                *(RecipeModel(rule.model) for rule in (recipe.vocabulary.tokens if recipe.vocabulary else {}).values()
                  if rule.model)]

    @property
    def reference_label(self) -> str:
        """The model whose architecture the output has."""
        first = self.recipe.models[0].model if self.recipe.models else self.recipe.slices[0].sources[0].model
        return self.recipe.architecture or self.recipe.base_model or first

    def heads_differ(self) -> bool:
        """Whether some merged model has a head of its own while another's is its embedding."""
        tied = {self.opened[label].tied for label in self.main_labels()}
        return len(tied) == 2

    def heads(self) -> set[str]:
        """Heads that some merged model has, where another's is its embedding."""
        return {name for label in self.main_labels() for name, tensor in self.opened[label].tensors.items()
                if classify(name, tensor.shape, tensor.dtype) is TensorClass.HEAD} if self.untied else set()

    def notes(self) -> list[str]:
        """Lines for whoever merges."""
        files = [part for found in self.opened.values() for part in (found.files, *(item.files for item in
                                                                                    found.adapters))]
        notes = [note for part in files for note in part.left_out]
        base, spec = self.recipe.base_model, self.recipe.spec
        if base is not None and spec.base is Base.UNUSED and not spec.base_first and not merges_base(
                spec, self.recipe.models, [self.recipe.parameters]) and not any(
                same_model(model, base) for model in self.all_models()):
            notes.append(f"{self.where}: {spec.name} does not read base_model {base}; only its config and names count")
        notes += [f"{self.where}: slices[{number}]: residual_weight does nothing, as in mergekit"
                  for number, piece in enumerate(self.recipe.slices) if piece.residual_weight is not None]
        if self.recipe.calibration is not None and not any(
                BY_NAME[name].runs_models for name in (
                    spec.name, *(branch.merge_method for branch in self.recipe.branches)) if name in BY_NAME):
            notes.append(f"{self.where}: {spec.name} runs no models; its calibration does nothing")
        notes += [line for label in self.main_labels() if (line := differences(
            label, self.opened[label].files.config, self.reference_label, self.reference.files.config))]
        return list(dict.fromkeys(notes + unused_parameters(self.recipe, self.where)))

    def main_labels(self) -> list[str]:
        """The models of the recipe's main method, and its base."""
        models = self.recipe.models or [source for piece in self.recipe.slices for source in piece.sources]
        labels = [model.model for model in models]
        return [*labels, self.recipe.base_model] if self.recipe.base_model else labels

    # Units -----------------------------------------------------------------------------------------------------------

    def inputs(self, label: str, name: str) -> Input:
        folder, stored, factors = self.opened[label].source(name)
        if stored.dtype in QUANTISED:
            raise InputError(f"{label}: {name} is stored in {stored.dtype}; dequantise the model before merging it")
        adapters = tuple(Adapter(item.folder, item.down, item.up, item.scale, item.magnitude, item.start,
                                 item.transposed)
                         for item in factors)
        return Input(self.labels.index(label), folder, stored, adapters)

    def unit(self, name: str, rule: MergeRule) -> MergeUnit:
        """The unit of an output tensor under a rule."""
        def there(model: RecipeModel) -> str:
            if rule.step is None or not self.is_decoder(name):
                return name
            layers = model.layer_range or rule.models[0].layer_range
            assert layers is not None
            return with_layer(name, layers[0] + rule.step)

        def source(model: RecipeModel) -> Input:
            return self.inputs(model.model, there(model))

        spec = BY_NAME[rule.method]
        chosen = merged_models(spec, rule.models, rule.base, rule.shared)
        given = next((model for model in rule.models if same_model(model, rule.base)), None)
        base = source(given or RecipeModel(rule.base)) if rule.base and spec.base is not Base.UNUSED else None
        models = tuple(map(source, chosen))
        first = base or models[0]
        self.check_dtypes(name, ([base] if base else []) + list(models))
        kind = classify(name, first.tensor.shape, first.tensor.dtype)
        if kind is TensorClass.BUFFER:
            return MergeUnit(name, "copy", first.tensor.shape, first.tensor.dtype, kind, None, (first,),
                             group=rule.group)
        layer = layer_index(name)
        depth = self.depth(name)
        values = values_of(spec, [(model.parameters, there(model)) for model in chosen], rule.shared, name,
                           self.position(name, rule, depth), self.filters, self.where)
        shape, gathered, crop = self.shape(name, kind, base, models)
        if gathered and self.vocabulary is not None:
            check_given(self.vocabulary, {item.model for item in ([base] if base else []) + list(models)}, self.labels,
                        f"{self.where}: tensor {name}")
        problem = spec.check(values)
        if problem:
            raise InputError(f"{self.where}: {spec.name}: {problem} (tensor {name})")
        prefix = layer_prefix(name)
        expert = _EXPERT.match(name)
        config = self.opened[self.labels[first.model]].files.config
        return MergeUnit(name, rule.method, shape, self.dtype(first.tensor), kind, base, models, values, layer, depth,
                         prefix or "", is_transposed(name, str(config.get("model_type", ""))), gathered, crop,
                         rule.group, expert[1] if expert and expert[1] in self._experts else "")

    def check_dtypes(self, name: str, inputs: Sequence[Input]) -> None:
        """Raises where some models store weights as floating numbers and others as integers: quantised ones."""
        odd = next((item for item in inputs
                    if (item.tensor.dtype in FLOATING) != (inputs[0].tensor.dtype in FLOATING)), None)
        if odd is not None and classify(name, odd.tensor.shape, "F32") is not TensorClass.BUFFER:
            found = [f"{item.tensor.dtype} in {self.labels[item.model]}" for item in (inputs[0], odd)]
            raise InputError(f"{self.where}: tensor {name} is stored as {' but '.join(found)}; dequantise the model"
                             " before merging it")

    def is_decoder(self, name: str) -> bool:
        return self.prefix is not None and name.startswith(self.prefix + ".") and layer_index(name) is not None

    def depth(self, name: str) -> int:
        """How many layers the stack of a name has in the output."""
        if self.recipe.slices and self.is_decoder(name):
            return sum(slice_length(piece.sources[0]) for piece in self.recipe.slices)
        stack = layer_prefix(name) or self.prefix
        if stack is None:
            return 1
        if stack not in self._depths:
            self._depths[stack] = max(1, self.stack_layers(self.reference_label, stack))
        return self._depths[stack]

    def stack_layers(self, label: str, stack: str) -> int:
        """How many layers a model has under a prefix: of the decoder as many as its config says.

        Files may have more, as those that predict further tokens (DeepSeek-V3's, numbered on from the last).
        """
        stored = num_layers(self.opened[label], stack)
        told = layer_count(self.text_config(label)) if stack == self.prefix else 0
        return min(stored, told) if told else stored

    def text_config(self, label: str) -> Mapping[str, Any]:
        """The config of a model's text decoder."""
        config = self.opened[label].files.config
        return config["text_config"] if isinstance(config.get("text_config"), dict) else config

    def position(self, name: str, rule: MergeRule, depth: int) -> float:
        """Where a tensor stands on a gradient, as in mergekit: layers evenly from 0 to 1, all others at 0.

        Gradients run over all layers of merged models, in slices over each slice's own; an only layer is the last.
        """
        layer = layer_index(name)
        if layer is None:
            return 0.0
        if rule.step is not None and self.is_decoder(name):
            layer, depth = rule.step, slice_length(rule.models[0])
        return min(1.0, layer / (depth - 1)) if depth > 1 else 1.0

    def dtype(self, first: StoredTensor) -> str:
        wanted = self.recipe.out_dtype or self.recipe.dtype
        return DTYPES[wanted] if wanted else first.dtype

    def shape(self, name: str, kind: TensorClass, base: Input | None,
              models: Sequence[Input]) -> tuple[tuple[int, ...], bool, bool]:
        """The output's shape, whether rows are gathered by vocabulary, and whether inputs are cropped."""
        inputs = ([base] if base else []) + list(models)
        shapes = {item.tensor.shape for item in inputs}
        tables = kind in (TensorClass.EMBEDDING, TensorClass.HEAD)
        token_table = kind is TensorClass.HEAD or name == self.reference.token_table
        if self.vocabulary is not None and token_table:
            tails = {shape[1:] for shape in shapes}
            if len(tails) == 1:
                return (self.vocabulary.size, *next(iter(tails))), True, False
        if len(shapes) == 1:
            return inputs[0].tensor.shape, False, False
        first = inputs[0]
        other = next(item for item in inputs if item.tensor.shape != first.tensor.shape)
        labels = self.labels[first.model], self.labels[other.model]
        found = (f"{self.where}: tensor {name} has shape {list(first.tensor.shape)} in {labels[0]} but"
                 f" {list(other.tensor.shape)} in {labels[1]}")
        if not tables or self.recipe.mismatch != "submatrix":
            hint = "; choose tokenizer_source: union, or mismatch: submatrix" if tables else ""
            raise InputError(found + hint)
        ranks = {len(shape) for shape in shapes}
        if base is None and len(ranks) == 1:
            return tuple(min(sizes) for sizes in zip(*shapes, strict=True)), False, True
        for item in models:
            if len(ranks) > 1 or any(a < b for a, b in zip(item.tensor.shape, first.tensor.shape, strict=False)):
                raise InputError(f"{found}: smaller than the base's, which mismatch: submatrix cannot cut to size")
        return first.tensor.shape, False, True


def unused_parameters(recipe: MergeRecipe, where: str) -> list[str]:
    """Lines about parameters that belong to other methods than the recipe's, and so do nothing."""
    given = [recipe.parameters, *(model.parameters for model in recipe.models)]
    for piece in recipe.slices:
        given += [piece.parameters, *(source.parameters for source in piece.sources)]
    names = dict.fromkeys(key for values in given for key in values if recipe.spec.parameter(key) is None)
    return [f"{where}: {recipe.merge_method} does not use the parameter {name}" for name in names]


def slice_length(source: RecipeModel) -> int:
    """Layers a slice takes of a source."""
    assert source.layer_range is not None
    return source.layer_range[1] - source.layer_range[0]


def expert_blocks(participant: Participant) -> set[str]:
    """What stands before ``.experts.`` in the names of a model: a dense MLP's ``gate_proj`` is of no such block."""
    return {name[:name.index(".experts.")] for name in participant.tensors if ".experts." in name}
