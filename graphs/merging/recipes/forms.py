"""Other spellings of a recipe brought to one: mergekit's ``modules``, single filters, short names of dtypes.

Works on plain data, before anything is checked.
"""

from __future__ import annotations

import re
from typing import Any

from mipipe.graphs.errors import InputError

SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
"""Names of dtypes by their short forms."""
MODULES = {"multi_modal_projector": r"multi_modal_projector|visual\.(.*\.)?merger|embed_vision",
           "vision_tower": r"vision_tower|vision_model|(^|\.)visual\.", "vision_model": r"vision_model",
           "encoder": r"(^|\.)encoder\.", "shared": r"^shared\."}
"""Tensors of mergekit's modules beside the text decoder, in the order in which they claim them."""
DECODERS = ("default", "text_decoder", "decoder")
NAMING = ("model", "base_model", "source_model", "tokenizer_source")
"""Keys whose value names a model."""


def normal_form(data: dict[str, Any], where: str) -> dict[str, Any]:
    """A recipe's data in the spelling that `mipipe.graphs.merging.recipes.recipe` reads.

    Raises:
        InputError: ``modules`` that cannot be told apart, or beside ``models`` or ``slices``.
    """
    found: dict[str, Any] = _python_names(with_labels(data))
    if isinstance(found.get("modules"), dict):
        found = _without_modules(found, where)
    if isinstance(found.get("calibration"), str):
        found["calibration"] = {"data": found["calibration"]}
    for key in ("dtype", "out_dtype"):
        if isinstance(found.get(key), str):
            found[key] = SHORT.get(found[key], found[key])
    return found


def with_labels(data: Any) -> Any:
    """The data with models that are spelt out, as in the recipes of model cards that mergekit wrote (``{model: {path:
    org/name, revision: v2}, lora: {path: org/adapter}}``), as ``org/name@v2+org/adapter``."""
    if isinstance(data, list):
        return [with_labels(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {key: _label(item) if key in NAMING and isinstance(item, dict) else with_labels(item)
            for key, item in data.items()}


def _label(model: dict[str, Any]) -> Any:
    """A model's name; what is spelt otherwise stays as it is, for the check of types to say so."""
    given = {key: value for key, value in model.items() if value is not None}
    if isinstance(given.get("path"), str) and set(given) <= {"path", "revision"}:
        return f"{given['path']}@{given['revision']}" if "revision" in given else given["path"]
    if "model" in given and set(given) <= {"model", "lora"}:
        parts = [given[key] for key in ("model", "lora") if key in given]
        names = [_label(part) if isinstance(part, dict) else part for part in parts]
        if all(isinstance(name, str) for name in names):
            return "+".join(names)
    return model


def _python_names(data: Any) -> Any:
    """The data with ``from`` and ``to`` of name rules as Python spells them, and ``1e-5`` as the number it is.

    YAML 1.1, which PyYAML reads, takes a number without a point for a word. A parameter that is one filter becomes a
    list of one; ``parameters:`` without any are none.
    """
    if isinstance(data, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", data):
        return float(data)
    if isinstance(data, dict):
        data = {key: item for key, item in data.items() if (key, item) != ("parameters", None)}
        renamed = {"from": "source", "to": "target"} if set(data) == {"from", "to"} else {}
        found = {renamed.get(key, key): _python_names(item) for key, item in data.items()}
        if isinstance(found.get("parameters"), dict):
            found["parameters"] = {key: [item] if isinstance(item, dict) else item
                                   for key, item in found["parameters"].items()}
        return found
    return [_python_names(item) for item in data] if isinstance(data, list) else data


def _without_modules(data: dict[str, Any], where: str) -> dict[str, Any]:
    """A recipe whose main module stands at the top level, and every other in a branch."""
    modules = data["modules"]
    both = [key for key in ("models", "slices") if data.get(key)]
    if both or not modules:
        raise InputError(f"{where}: modules: found {both[0] if both else 'no module'}"
                         f"{' beside it' if both else ''}; expected models or slices inside each module")
    for name, body in modules.items():
        if not isinstance(body, dict) or bool(body.get("models")) == bool(body.get("slices")):
            raise InputError(f"{where}: modules: {name}: expected models or slices, one of them")
        unknown = sorted(set(body) - {"models", "slices", "parameters"})
        if unknown:
            raise InputError(f"{where}: modules: {name}: {', '.join(unknown)}: unknown key; expected models or slices,"
                             " and parameters")
    main = next((name for name in DECODERS if name in modules), next(iter(modules)))
    rest = {key: value for key, value in data.items() if key != "modules"}
    shared = rest.get("parameters") or {}
    branches = []
    for name in sorted((name for name in modules if name != main), key=_rank):
        body = modules[name]
        if body.get("slices"):
            raise InputError(f"{where}: modules: {name}: has slices; layers can be picked of the text decoder alone, so"
                             " give it models")
        if name not in MODULES:
            raise InputError(f"{where}: modules: {name!r} is not known; expected {', '.join((*DECODERS, *MODULES))}, or"
                             " a branch with the pattern of its tensors")
        branches.append({"name": name, "tensors": MODULES[name], "merge_method": data.get("merge_method"),
                         "models": body["models"], "parameters": {**shared, **(body.get("parameters") or {})}})
    body = modules[main]
    own = {"parameters": {**shared, **body["parameters"]}} if body.get("parameters") else {}
    inner = {key: body[key] for key in ("models", "slices") if body.get(key)}
    return {**rest, **inner, **own, **({"branches": [*(data.get("branches") or []), *branches]} if branches else {})}


def _rank(name: str) -> int:
    return list(MODULES).index(name) if name in MODULES else len(MODULES)
