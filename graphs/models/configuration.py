"""A model's configuration, read from a folder, a file or a family's name, with overrides; no code of it is run."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.serialize import load_data


def config_file(path: str | Path) -> Path | None:
    """The configuration's file, where ``path`` is one or a folder with one; None for the name of a class or type."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    return file if file.is_file() else None


def read_model_config(path: str | Path, overrides: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> Any:
    """A transformers configuration from a ``config.json``, a folder with one, or the name of a model class or type.

    Args:
        data: what ``config.json`` holds, where it is known already; then nothing is read.

    Raises:
        InputError: unreadable, an unknown model type or class, or an override that the configuration does not have.
    """
    from transformers import CONFIG_MAPPING

    file = config_file(path)
    if data is None and file is not None:
        data = load_data(file, foreign=True)
    if data is not None:
        data = without_code(data)
        kind, where = data.get("model_type"), file or path
        converted = converted_classes(kind)
        if converted is not None:
            return _make_config(converted[0], _with_floats(data), overrides, str(where))
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise InputError(f"{where}: model_type {shown(kind)} is unknown to transformers {_version()}; expected one"
                             " such as 'llama', 'qwen3_moe' or 'deepseek_v3'")
        return _make_config(CONFIG_MAPPING[kind], _with_floats(data), overrides, str(where))
    name = str(path)
    if name in CONFIG_MAPPING:
        return _make_config(CONFIG_MAPPING[name], {}, overrides, name)
    config = getattr(find_class(name), "config_class", None)
    if config is None:
        raise InputError(f"{name}: no file, and not a model class of transformers {_version()}")
    return _make_config(config, {"architectures": [name]}, overrides, name)


def _with_floats(value: Any) -> Any:
    """Configuration data with numbers for transformers' ``{"__float__": "Infinity"}`` (JSON has no infinity)."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and str(value["__float__"]) in ("Infinity", "-Infinity", "NaN"):
            return float(str(value["__float__"]))
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def as_written(value: Any) -> Any:
    """Configuration data as our files may hold it: without code's names, infinities as transformers writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: as_written(item) for key, item in without_code(dict(value)).items()}
    return [as_written(item) for item in value] if isinstance(value, list) else value


def _version() -> str:
    import transformers

    return transformers.__version__


def find_class(name: str) -> Any:
    """A model class of transformers by its name; None where there is none (a file may name anything)."""
    import transformers

    try:
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{name}: transformers cannot load it: {first_line(error)}") from None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


_CODE = re.compile(r"auto_map|custom_pipelines|.*(attn|experts)_implementation.*|use_kernels|use_timm_backbone")
"""Entries of a configuration that make transformers fetch code, or weights, from elsewhere."""


def without_code(data: Any) -> Any:
    """The data of a configuration without the entries that name code of the model's publisher or kernels of a hub."""
    if isinstance(data, dict):
        kept = {key: without_code(item) for key, item in data.items() if not _CODE.fullmatch(str(key))}
        return {**kept, "use_pretrained_backbone": False} if kept.get("use_pretrained_backbone") else kept
    return [without_code(item) for item in data] if isinstance(data, list) else data


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _make_config(kind: Any, data: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Any:
    """The configuration from its data with changed values; ``text_config.hidden_size`` reaches into parts.

    What the configuration derives from other entries (head sizes, kinds of layers) is derived after the change.
    """
    made: dict[str, Any] = copy.deepcopy(dict(data))
    known = _from_dict(kind, dict(data), where)
    for key, value in overrides.items():
        *path, last = str(key).split(".")
        plain = all(name.isidentifier() and not name.startswith("__") for name in (*path, last))
        if not plain or _CODE.fullmatch(last):
            raise InputError(f"{where}: override {shown(key)} is no entry of its {kind.__name__}")
        part, owner = made, known
        for name in path:
            owner = getattr(owner, name, None)
            part = part.setdefault(name, {})
        last = getattr(owner, "attribute_map", {}).get(last, last)
        if owner is None or not (hasattr(owner, last) or _model_reads(owner, last)):
            raise InputError(f"{where}: override {key!r} is no entry of its {kind.__name__}")
        if last == "num_hidden_layers":
            for name in ("layer_types", "mlp_layer_types"):
                part.pop(name, None)
        part[last] = value
    return _from_dict(kind, made, where)


def _from_dict(kind: Any, data: dict[str, Any], where: str) -> Any:
    """The configuration; whatever its constructor raises is about the values."""
    try:
        return kind.from_dict(data)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__).strip()
        raise InputError(f"{where}: {kind.__name__} refuses these values: {shown(line, quoted=False, most=300)}"
                         ) from None


def _model_reads(config: Any, name: str) -> bool:
    """Whether the modeling code of a configuration reads an entry that the configuration leaves undeclared."""
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    try:  # beside the module of a config class that is loaded already: one of transformers' or ours, named by no file
        text = inspect.getsource(importlib.import_module(modeling))
    except (ImportError, OSError):
        return False
    return re.search(rf"config\.{name}\b|config, \"{name}\"", text) is not None


def converted_classes(model_type: object) -> tuple[Any, Any] | None:
    """The config and model class of a converted mixture's ``model_type``; None for other types.

    They are those of this installation, not the code that lies in the model's folder, which is never run.
    """
    if not isinstance(model_type, str) or not model_type.startswith("mipipe_"):
        return None
    from mipipe.graphs.models import mipipe_moe

    return mipipe_moe.classes(model_type) if model_type[len("mipipe_"):] in mipipe_moe.HOSTS.values() else None


def know_converted(folder: str | Path) -> None:
    """Let transformers load a folder of a converted mixture with this installation's class, without its code."""
    file = config_file(folder)
    converted = None if file is None else converted_classes(load_data(file, foreign=True).get("model_type"))
    if converted is not None:
        from transformers import AutoConfig, AutoModelForCausalLM

        AutoConfig.register(converted[0].model_type, converted[0], exist_ok=True)
        AutoModelForCausalLM.register(*converted, exist_ok=True)
