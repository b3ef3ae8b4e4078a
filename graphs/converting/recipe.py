"""What `mipipe convert` is asked for: a YAML file that names a method, a model and the method's own values.

    method: m_smoe
    model: ./mixture
    groups: 4
    calibration: {data: sample.txt, samples: 64, length: 256}

Without ``method`` and with ``experts`` it is an assembly of dense models (`mipipe.graphs.merging.moe_recipe`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from mipipe.graphs.calibration.rule import CalibrationRule
from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.named_code import is_named_code
from mipipe.graphs.serialize import STRICT, from_data, load_data

Dtype = Literal["float32", "float64"]
OutDtype = Literal["float64", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRecipe:
    """What the recipe of every method has: the model, the dtype to compute in, that of the result (none: as stored)."""

    __pydantic_config__: ClassVar = STRICT
    METHOD: ClassVar[str]
    model: str
    dtype: Dtype = "float32"
    out_dtype: OutDtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Molae(ConversionRecipe):
    """MoLAE: ``group`` experts share a latent space of ``latent`` dimensions (none: the experts' inner size), after
    ``rank`` (none: full) has been taken of each matrix. ``grouping``: neighbours, or by similarity of what they
    read."""

    METHOD: ClassVar[str] = "molae"
    group: int = 8
    latent: int | None = None
    rank: int | None = None
    grouping: Literal["consecutive", "similar"] = "consecutive"

    def __post_init__(self) -> None:
        for key in ("group", "latent", "rank"):
            _at_least(key, getattr(self, key), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging(ConversionRecipe):
    """How experts are merged: into ``groups`` per layer on average (none: half of them).

    Others join the most used expert that they are most alike: by ``similarity`` of their router logits over the
    calibration texts, router rows, weights, or at ``random``. ``align`` permutes hidden units first. ``capacity``: most
    experts of a group. ``whole_layers`` stay.
    """

    calibration: CalibrationRule
    groups: int | None = None
    similarity: Literal["router_logits", "router_weights", "weights", "random"] = "router_logits"
    align: bool = True
    capacity: int | None = None
    whole_layers: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("groups", self.groups, 1)
        _at_least("capacity", self.capacity, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeExperts(Merging):
    """M-SMoE. ``layout``: ``shared`` needs mipipe's modeling code, ``expanded`` writes copies in the model's own
    architecture."""

    METHOD: ClassVar[str] = "m_smoe"
    layout: Literal["shared", "expanded"] = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressExperts(Merging):
    """MC-SMoE: experts merged, then each matrix of low rank (``rank_ratio`` of its parameters) plus ``kept`` of its
    rows, those whose entries matter most to the loss.

    ``steps`` of distillation from the model (temperature 2, weight 0.2) train what is left at rate ``lr``, while rows
    go; 0: the gradients of the calibration texts alone decide.
    """

    METHOD: ClassVar[str] = "mc_smoe"
    rank_ratio: float = 0.15
    kept: float = 0.15
    steps: int = 0
    lr: float = 1e-4
    batch: int = 4

    def __post_init__(self) -> None:
        Merging.__post_init__(self)
        _at_least("steps", self.steps, 0)
        _at_least("batch", self.batch, 1)
        if not 0 < self.rank_ratio <= 1 or not 0 <= self.kept <= 1 or not self.lr > 0:
            raise InputError(f"rank_ratio {self.rank_ratio}, kept {self.kept}, lr {self.lr}; expected a ratio above 0"
                             " and at most 1, a share from 0 to 1, a rate above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneExperts(ConversionRecipe):
    """The ``keep`` most used experts of every layer stay, and their router's rows. ``by``: how often each is chosen, or
    the sum of its router weights."""

    METHOD: ClassVar[str] = "prune_experts"
    calibration: CalibrationRule
    keep: int
    by: Literal["usage", "weight"] = "usage"
    experts_per_token: int | None = None

    def __post_init__(self) -> None:
        _at_least("keep", self.keep, 1)
        _at_least("experts_per_token", self.experts_per_token, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ream(ConversionRecipe):
    """REAM: ``groups`` merged experts in every layer (none: three quarters of them), each led by one of the most
    salient, which take up to ``group_size - 1`` others. ``align``: hidden units are matched by activations and weights,
    by one of them, or not. ``sequential``: every layer sees the layers before it merged."""

    METHOD: ClassVar[str] = "ream"
    calibration: CalibrationRule
    groups: int | None = None
    group_size: int = 16
    align: Literal["both", "activations", "weights", "none"] = "both"
    sequential: bool = True
    experts_per_token: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("groups", "group_size", "experts_per_token"):
            _at_least(key, getattr(self, key), 1)

    def kept(self, experts: int) -> int:
        """Merged experts of a layer that has so many."""
        return self.groups or max(1, experts * 3 // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dive(ConversionRecipe):
    """DIVE: a dense model's MLP pruned for each group of domains, ``pruned`` of its channels, is an expert of its own.

    As many ``domains`` as ``experts``: one each; more are clustered by how well the model pruned for one does on
    another. The router starts at random (``seed``), and is trained afterwards.
    """

    METHOD: ClassVar[str] = "dive"
    domains: tuple[CalibrationRule, ...]
    experts: int = 8
    pruned: float = 0.5
    experts_per_token: int = 1
    compensate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("experts", self.experts, 1)
        _most_experts(self.experts_per_token, self.experts)
        if not 0 <= self.pruned < 1:
            raise InputError(f"pruned: found {self.pruned}, expected a share from 0 to below 1")
        if len(self.domains) < self.experts:
            raise InputError(f"domains: found {len(self.domains)}, expected at least one for each of the"
                             f" {self.experts} experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeAdaptation(ConversionRecipe):
    """SparseUnifiedModel's adaptation: neurons of a dense MLP dealt to ``experts`` by importance, the first
    ``shared_ratio`` of them to a shared expert. ``dense_layers`` stay (negative ones count from the end).
    ``router_std``: a random start of the router, which is zero and thus full of ties at 0."""

    METHOD: ClassVar[str] = "moe_adaptation"
    calibration: CalibrationRule
    experts: int = 32
    experts_per_token: int = 16
    shared_ratio: float = 0.0
    dense_layers: tuple[int, ...] = (0, -1)
    router_std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("experts", self.experts, 1)
        _most_experts(self.experts_per_token, self.experts)
        if not 0 <= self.shared_ratio < 1 or self.router_std < 0:
            raise InputError(f"shared_ratio {self.shared_ratio}, router_std {self.router_std}; expected a share from 0"
                             " to below 1, and no negative deviation")


ConvertRecipe = Molae | MergeExperts | CompressExperts | Ream | PruneExperts | Dive | MoeAdaptation
METHODS: dict[str, type[ConvertRecipe]] = {
    kind.METHOD: kind for kind in (Molae, MergeExperts, CompressExperts, Ream, PruneExperts, Dive, MoeAdaptation)}


def _at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"{key}: found {value}, expected at least {least}")


def _most_experts(per_token: int, experts: int) -> None:
    if not 1 <= per_token <= experts:
        raise InputError(f"experts_per_token: found {per_token}, expected 1 to {experts}, the number of experts")


def read_convert_recipe(path: str | Path) -> ConvertRecipe:
    """The conversion that a YAML file describes; relative paths in it are beside it.

    Raises:
        InputError: unreadable, no or an unknown method, an unknown key, a wrong value.
    """
    data = load_data(path)
    name = data.pop("method", None)
    kind = METHODS.get(name) if isinstance(name, str) else None
    if kind is None:
        found = "has no method" if name is None else f"method: found {shown(name)}"
        raise InputError(f"{path}: {found}; expected one of {', '.join(METHODS)} (or experts, as of an assembly of"
                         " dense models)")
    return _beside(from_data(data, kind, str(path)), Path(path).parent)


def _beside(recipe: ConvertRecipe, folder: Path) -> ConvertRecipe:
    """The recipe with paths that are relative to its file's folder."""
    changes: dict[str, Any] = {"model": _path(recipe.model, folder)}
    if isinstance(recipe, Dive):
        changes["domains"] = tuple(replace(item, data=_path(item.data, folder)) for item in recipe.domains)
    elif not isinstance(recipe, Molae):
        changes["calibration"] = replace(recipe.calibration, data=_path(recipe.calibration.data, folder))
    return replace(recipe, **changes)


def _path(text: str, folder: Path) -> str:
    beside = folder / text
    return text if not text or is_named_code(text) or Path(text).is_absolute() or not beside.exists() else str(beside)
