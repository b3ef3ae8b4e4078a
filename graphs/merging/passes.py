"""How often a merge method reads a tensor, and over which tensors it takes statistics: what planning must know.

A method measures its statistics in rounds (`mipipe.runtime.merge.methods.method`), each a reading of the data of its
own. A test holds these numbers to what the methods do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from mipipe.graphs.merging.graph import MergeUnit
from mipipe.graphs.merging.methods import BY_NAME


class Scope(StrEnum):
    """Over which tensors a method's statistics are added up."""

    PIECE = "piece"
    LAYER = "layer"
    MODEL = "model"


Params = Mapping[str, Any]


def _smallest(value: Any) -> float:
    return min(value) if isinstance(value, (list, tuple)) else value


def _ties(params: Params) -> int:
    return 2 * (_smallest(params["density"]) < 1.0) + (params["zero_sum"] == "majority")


def _dare(params: Params) -> int:
    return int(params["rescale"] and params["rescale_norm"] == "l1" and _smallest(params["density"]) < 1.0)


_ROUNDS: dict[str, Callable[[Params], int]] = {
    "slerp": lambda _params: 1, "karcher": lambda _params: 1, "onebit": lambda _params: 1, "varm": lambda _params: 1,
    "frank": lambda _params: 1, "breadcrumbs": lambda _params: 2, "breadcrumbs_ties": lambda _params: 2,
    "doge": lambda _params: 2, "ties": _ties, "dare_linear": _dare, "dare_ties": _dare,
    "nuslerp": lambda params: int(not params["nuslerp_row_wise"]),
    "model_stock": lambda params: int(not params["filter_wise"]),
    "sce": lambda params: 1 + 2 * (params["select_topk"] < 1.0),
}
"""Rounds of the methods that measure; the others have none."""


def num_rounds(unit: MergeUnit) -> int:
    """How many rounds of statistics are measured on a unit before it is merged."""
    spec = BY_NAME.get(unit.method)
    if spec is None or unit.tensor_class not in spec.classes or unit.method not in _ROUNDS:
        return 0
    defaults = {parameter.name: parameter.default for parameter in spec.parameters}
    return _ROUNDS[unit.method](defaults | unit.parameters)


def scope_of(unit: MergeUnit) -> Scope:
    """Over which tensors a unit's statistics are added up; for a method without any, the piece."""
    spec = BY_NAME.get(unit.method)
    if spec is None or unit.tensor_class not in spec.classes:
        return Scope.PIECE
    if unit.method == "frank":
        return Scope.LAYER
    if unit.method == "doge" or (unit.method == "ties" and unit.parameters.get("scope") == "model"):
        return Scope.MODEL
    return Scope.PIECE


def is_wide(unit: MergeUnit) -> bool:
    """Whether a unit's statistics are shared with other tensors, so that they are measured before anything is merged.

    Tensors outside the layers have no layer to share statistics with; their method says what becomes of them.
    """
    scope = scope_of(unit)
    return scope is Scope.MODEL or (scope is Scope.LAYER and unit.layer is not None)


def is_whole(unit: MergeUnit) -> bool:
    """Whether a unit's pieces are merged as whole matrices, not tile by tile."""
    spec = BY_NAME.get(unit.method)
    return spec is not None and spec.whole and unit.tensor_class in spec.classes
