"""``--set``: overrides of a model's configuration."""

from __future__ import annotations

from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import yaml_value


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """``["a.b=3", "c=text"]`` as a mapping; values are read as YAML (numbers, booleans)."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InputError(f"--set {setting}: expected name=value, such as num_hidden_layers=8")
        try:
            parsed[name] = yaml_value(value)
        except ValueError:
            raise InputError(f"--set {setting}: {value!r} is no YAML value; quote it") from None
    return parsed
