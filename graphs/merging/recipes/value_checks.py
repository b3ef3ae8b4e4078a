"""Checks of the parameter values in a recipe: known to the method, of the right type, within its range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.expressions import check_expression
from mipipe.graphs.merging.method_table.method_spec import MethodSpec, Parameter
from mipipe.graphs.merging.method_table.methods import BY_NAME


def check_parameters(spec: MethodSpec, values: Mapping[str, Any], where: str, own: bool = False) -> None:
    """Raises unless every key is a parameter of the method and every value in its range.

    Parameters of other methods do nothing; `mipipe.graphs.merging.units.unused_parameters` mentions them.

    Args:
        own: the values belong to one model, where only per-model parameters may stand.
    """
    strange = [key for key in values if not any(other.parameter(key) for other in BY_NAME.values())]
    if strange:
        known = ", ".join(item.name for item in spec.parameters) or "none"
        raise InputError(f"{where}: {spec.name} has no parameter{'s' * (len(strange) > 1)}"
                         f" {', '.join(map(repr, strange))}; it has {known}")
    for key, value in values.items():
        parameter = spec.parameter(key)
        if parameter is None or (parameter.kind is bool and type(value) in (int, float) and value in (0, 1)):
            continue  # recipes of older model cards have normalize: 1.0
        if own and not parameter.per_model and spec.name not in ("passthrough",):
            raise InputError(f"{where}: {key} of {spec.name} is one value for all models; move it to the recipe's"
                             " parameters")
        sloped = parameter.per_model and isinstance(value, list)
        for item in _scalars(value, f"{where}: {key}"):
            if sloped and parameter.above and type(item) in (int, float) and item == parameter.low:
                continue  # a gradient, or part of the tensors, may reach the bound: there the model leaves nothing
            check_value(parameter, item, f"{where}: {key}")


def _scalars(value: Any, where: str) -> list[Any]:
    """Every plain value in a parameter: of filters, and of gradients."""
    if not isinstance(value, list):
        return [value]
    found: list[Any] = []
    if len({isinstance(item, dict) for item in value}) > 1:
        raise InputError(f"{where}: mixes filters with plain values; expected a gradient of values, or entries with"
                         " filter and value")
    for item in value:
        if isinstance(item, dict):
            unknown = set(item) - {"filter", "value"}
            if unknown or "value" not in item:
                problem = f"unknown key {sorted(unknown)[0]!r}" if unknown else "no value"
                raise InputError(f"{where}: an entry has {problem}; expected filter and value")
            _check_filter(item.get("filter"), where)
            found += _scalars(item["value"], where)
        else:
            found.append(item)
    if not found:
        raise InputError(f"{where}: is an empty list")
    return found


def _check_filter(pattern: Any, where: str) -> None:
    if isinstance(pattern, str) and pattern.startswith("re:"):
        check_expression(pattern[3:], f"{where}: filter")


def check_value(parameter: Parameter, value: Any, where: str) -> None:
    """Raises unless a plain value has the parameter's type and is in its range."""
    kinds: Any = (int, float) if parameter.kind is float else (parameter.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and parameter.kind is not bool):
        words = {float: "a number", int: "an integer", bool: "true or false", str: "a word"}
        raise InputError(f"{where}: found {value!r}, expected {words[parameter.kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: found {value!r}, expected a finite number")
    if parameter.choices and value not in parameter.choices:
        raise InputError(f"{where}: found {value!r}, expected one of {', '.join(parameter.choices)}")
    if parameter.low is not None and (value < parameter.low or (parameter.above and value == parameter.low)):
        raise InputError(f"{where}: found {value!r}, expected {'more than' if parameter.above else 'at least'}"
                         f" {parameter.low:g}")
    if parameter.high is not None and value > parameter.high:
        raise InputError(f"{where}: found {value!r}, expected at most {parameter.high:g}")
