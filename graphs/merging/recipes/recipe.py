"""Merge recipes as values, in mergekit's vocabulary.

Beyond mergekit's keys: ``branches`` (methods per part of a multimodal model), ``names`` (name maps between wrapped and
unwrapped checkpoints), ``mismatch`` (what to do with tables of other sizes), ``align`` (matching experts before
merging), ``adapter`` (LoRA adapters merged into an adapter) and ``seed``. What a recipe must keep to,
`mipipe.graphs.merging.recipes.read` checks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mipipe.graphs.calibration.rule import CalibrationRule
from mipipe.graphs.merging.method_table.method_spec import Base, MethodSpec
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.tokens.tokenizer_rule import TokenizerRule
from mipipe.graphs.serialize import STRICT

Parameters = dict[str, Any]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class NameRule:
    """Renames a model's tensors to the base's names: ``re.sub(source, target)``; written ``from`` and ``to``."""

    __pydantic_config__: ClassVar = STRICT
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class RecipeModel:
    """A model to merge: a folder, ``folder+adapter``, or the name of an earlier recipe; in slices with layers."""

    __pydantic_config__: ClassVar = STRICT
    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    names: Literal["auto"] | tuple[NameRule, ...] = ()
    calibration: str = ""
    """The data that this model is run on, in place of the recipe's."""


@dataclass(frozen=True, slots=True)
class RecipeSlice:
    """Layers of the output, made from the same number of layers of each source."""

    __pydantic_config__: ClassVar = STRICT
    sources: tuple[RecipeModel, ...]
    parameters: Parameters = field(default_factory=dict)
    base_model: str | None = None
    residual_weight: float | None = None
    """Accepted for mergekit's recipes, where it does nothing either."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Tensors (by regular expression) merged by a method of their own, from models of their own if given."""

    __pydantic_config__: ClassVar = STRICT
    tensors: str
    merge_method: str
    models: tuple[RecipeModel, ...] = ()
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True, slots=True)
class AlignRule:
    """Experts to reorder before the merge: by similarity of their weights to the base's (or first model's).

    ``hidden_units``: also match the hidden units inside each expert.
    """

    __pydantic_config__: ClassVar = STRICT
    experts: bool = True
    hidden_units: bool = False


@dataclass(frozen=True, slots=True)
class AdapterRule:
    """Make the merge a LoRA adapter of its base: of at most ``rank``, and as small as keeps ``energy`` of the change.

    Of adapters, linear methods join the factors and are exact without a rank; of whole models, the change of every
    matrix is cut to the rank, to the share of its squared norm, or both.
    """

    __pydantic_config__: ClassVar = STRICT
    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """One merge. Exactly one of ``models`` and ``slices`` is given."""

    __pydantic_config__: ClassVar = STRICT
    merge_method: str
    models: tuple[RecipeModel, ...] = ()
    slices: tuple[RecipeSlice, ...] = ()
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None
    """``auto``, the one most of the models have; a name (``chatml``, ...); or the text of a Jinja template."""
    branches: tuple[Branch, ...] = ()
    base_names: Literal["auto"] | tuple[NameRule, ...] = ()
    architecture: str | None = None
    """The model whose tensors and config the output has; the base (else the first model) if not given."""
    mismatch: Literal["error", "submatrix"] = "error"
    align: AlignRule | None = None
    adapter: AdapterRule | None = None
    calibration: CalibrationRule | None = None
    seed: int = 0
    name: str = ""

    @property
    def spec(self) -> MethodSpec:
        return BY_NAME[self.merge_method]

    @property
    def vocabulary(self) -> TokenizerRule | None:
        """The tokenizer rule, whichever of its two spellings was used."""
        if self.tokenizer is not None:
            return self.tokenizer
        return TokenizerRule(self.tokenizer_source) if self.tokenizer_source else None


def merges_base(spec: MethodSpec, models: Sequence[RecipeModel], shared: Sequence[Parameters]) -> bool:
    """Whether a base that is not among whole models is merged as one more, by the values for all models; slices say
    themselves what they are made of (both as in mergekit)."""
    if not models or models[0].layer_range is not None:
        return False
    return spec.base_last == "always" or (spec.base_last == "weighted" and any("weight" in item for item in shared))


def merged_models(spec: MethodSpec, models: Sequence[RecipeModel], base: str | None,
                  shared: Sequence[Parameters]) -> list[RecipeModel]:
    """The models whose weights go in: without the base where task vectors are merged, with it first for SLERP."""
    if spec.base_first and base is not None:
        others = [model for model in models if not same_model(model, base)]
        given = [model for model in models if same_model(model, base)]
        return [*(given[:1] or [RecipeModel(base)]), *others]
    if base is not None and merges_base(spec, models, shared) and not any(same_model(model, base) for model in models):
        return [*models, RecipeModel(base)]
    if spec.base is Base.UNUSED:
        return list(models)
    return [model for model in models if not same_model(model, base)]


def same_model(model: RecipeModel, label: str | None) -> bool:
    """Whether a model is the one a label names: ``./base/`` is ``base``."""
    return label is not None and os.path.normpath(model.model) == os.path.normpath(label)
