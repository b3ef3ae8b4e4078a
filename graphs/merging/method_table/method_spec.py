"""What a merge method is to recipes and planning: its parameters, what it needs, what it costs. No mathematics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from mipipe.graphs.calibration.streams import Need
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass


class Base(StrEnum):
    """Whether a method works against a base model."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    UNUSED = "unused"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method as recipes write it.

    ``default`` None means the recipe must give it, unless ``optional``. ``per_model``: one value for each merged
    model. ``low`` and ``high`` bound it (``above``: the lower bound itself is excluded); ``choices`` are the words
    allowed.
    """

    name: str
    default: Any
    doc: str
    kind: type = float
    per_model: bool = False
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False


class Scope(StrEnum):
    """Over which tensors a method's statistics are added up."""

    PIECE = "piece"
    LAYER = "layer"
    MODEL = "model"


Params = Mapping[str, Any]
Number = Callable[[Params], int]
"""How many rounds of statistics a method takes with these parameters."""


def _of_piece(_params: Params) -> Scope:
    return Scope.PIECE


def _fine(_params: Params) -> str:
    return ""


def _never(_params: Params) -> int:
    return 0


def _nothing(_params: Params) -> tuple[Need, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """What a method needs and costs, and who computes it.

    ``apply`` names its function, ``measure`` the one that lists its `Round`s of statistics, ``elsewhere`` what merges
    the tensor classes it does not define. ``rounds``: how many these are; ``scope``: what they are summed over.
    ``whole``: works on whole matrices (singular values), not tile by tile. ``classes``: the tensor classes it defines.
    ``oriented``: rows and columns play different roles, so matrices stored transposed are whole, and turned first.
    ``base_first``: a base listed among the models is the first of them; ``base_last``: a base not listed is merged as a
    further model, always or where the recipe has a weight for all models. ``needs``: statistics that running the models
    finds out, before anything is merged; ``learned``: its coefficients are trained before. ``factors``: it merges the
    factors of LoRA adapters, not their products. ``check``: what is wrong with values that are each in their range, or
    an empty text. ``decompositions``: singular value decompositions per model and matrix.
    """

    name: str
    title: str
    arxiv: str
    parameters: tuple[Parameter, ...] = ()
    base: Base = Base.REQUIRED
    min_models: int = 1
    max_models: int | None = None
    whole: bool = False
    oriented: bool = False
    classes: frozenset[TensorClass] = frozenset(TensorClass) - {TensorClass.BUFFER}
    apply: str = ""
    measure: str = ""
    elsewhere: str = ""
    rounds: Number = _never
    scope: Callable[[Params], Scope] = _of_piece
    base_first: bool = False
    base_last: Literal["", "always", "weighted"] = ""
    check: Callable[[Params], str] = _fine
    decompositions: int = 0
    needs: Callable[[Params], tuple[Need, ...]] = _nothing
    learned: bool = False
    factors: bool = False

    @property
    def runs_models(self) -> bool:
        """Whether the method needs a calibration."""
        return self.learned or self.needs is not _nothing

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)
