"""A merged checkpoint opened as transformers would open it, on the meta device, before it is called done.

Names and shapes of the stored tensors, renamed as transformers renames them on loading, are held against the model that
the config describes; token ids of the tokenizer against the rows of the embedding. No weights are read: that they are
finite was checked as they were written. What transformers said once of the same config and the same tensors is
remembered (`mipipe.runtime.merge.output.opened`).
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import RunError, shown
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor, read_checkpoint
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass, classify
from mipipe.graphs.merging.participants import TOKEN_TABLES
from mipipe.graphs.merging.tokens.vocabulary import read_tokens
from mipipe.graphs.models.configuration import converted_classes, first_line, without_code
from mipipe.runtime.merge.output.opened import key_of, note_opened, was_opened

HINT = "; the result is kept beside it: --no-verify publishes it as it is"
MARK = "verify"
"""A file of the partial folder that asks for verification before the result is published."""


def verify_output(folder: Path) -> str:
    """Check a finished folder; returns a line where transformers cannot tell, else nothing.

    Raises:
        RunError: tensors that are missing, unexpected or of other shapes than the config's model has, or token ids
            beyond the embedding.
    """
    files = read_checkpoint(folder)
    _check_tokens(folder, files)
    if not files.config.get("architectures"):
        return "the result was not opened with transformers: its config names no architecture"
    key = key_of(files.config, ((name, item.shape, item.dtype) for name, item in files.tensors.items()))
    if was_opened(key):
        return ""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return "transformers is not installed, so the result was not opened with it"
    model, reason = _meta_model(transformers, folder)
    if model is None:
        return f"the result was not opened with transformers: {reason}"
    _compare(model, loaded_tensors(files, model))
    note_opened(key, type(model).__name__)
    return ""


def _check_tokens(folder: Path, files: CheckpointFiles) -> None:
    table = next((tensor for name, tensor in sorted(files.tensors.items()) if name.endswith(TOKEN_TABLES)), None)
    if table is None or not (folder / "tokenizer.json").exists():
        return
    tokens = read_tokens(str(folder))
    if tokens and max(tokens.values()) >= table.shape[0]:
        token = max(tokens, key=lambda name: tokens[name])
        raise RunError(f"tokenizer.json: the token {shown(token)} has the id {tokens[token]}, but {table.name} has"
                       f" {table.shape[0]} rows; choose tokenizer_source: union, or the model the rows are of{HINT}")


def _meta_model(transformers: Any, folder: Path) -> tuple[Any, str]:
    """The config's model on the meta device, or None and why there is none. Never runs code of the folder."""
    data = json.loads((folder / "config.json").read_text())
    named = data.get("architectures")
    name = named[0] if isinstance(named, list) and named else ""
    converted = converted_classes(data.get("model_type"))
    if converted is not None:  # this installation's class, whatever file the folder's auto_map names
        config = converted[0].from_dict(without_code(data))
        with torch.device("meta"):
            return converted[1](config), ""
    cls = getattr(transformers, str(name), None)
    if cls is None or not isinstance(cls, type):
        return None, f"it has no architecture {shown(name)}"
    if data.get("model_type") not in transformers.CONFIG_MAPPING:
        return None, f"it has no model_type {shown(data.get('model_type'))}"
    try:  # a class of transformers' own, by trust_remote_code=False: auto_map and *.py of the folder stay data
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return cls(config), ""
    except Exception as error:
        raise RunError(f"config.json: transformers makes no {name} of it: {first_line(error)}{HINT}") from None


@dataclass
class Loaded:
    """What loading makes a tensor of the model from; ``joined``: by stacking, joining or splitting stored tensors."""

    tensors: list[StoredTensor]
    joined: bool = False
    split: tuple[str, ...] = ()
    """Endings of the tensors that the stored one is split into."""


def loaded_tensors(files: CheckpointFiles, model: Any) -> dict[str, Loaded]:
    """The stored tensors by the model's own names, as loading renames (and joins) them."""
    expected = model.state_dict()
    try:
        # names of our own, here and above: no file chooses what is imported
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        renamings = [item for item in mapping if isinstance(item, loading.WeightRenaming)]
        converters = [item for item in mapping if isinstance(item, loading.WeightConverter)]
        rename = loading.rename_source_key
    except (ImportError, AttributeError):  # an older transformers renames nothing
        return {name: Loaded([tensor]) for name, tensor in files.tensors.items()}
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    found: dict[str, Loaded] = {}
    for name, tensor in files.tensors.items():
        own, pattern = rename(name, renamings, converters, model.base_model_prefix, expected)
        if own not in expected and name in expected:
            own, pattern = name, None
        made = found.setdefault(own, Loaded([]))
        made.tensors.append(tensor)
        if pattern is not None:
            targets = tuple(by_pattern[pattern].target_patterns)
            made.joined, made.split = True, targets if len(targets) > 1 else ()
    return found


def _compare(model: Any, found: Mapping[str, Loaded]) -> None:
    expected, name = model.state_dict(), type(model).__name__
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    split = {ending for made in found.values() for ending in made.split}
    absent = {own for own, _ in model.named_parameters(remove_duplicate=False)
              if own not in found and own not in tied and not any(own.endswith(ending) for ending in split)}
    missing = _without(absent, getattr(model, "_keys_to_ignore_on_load_missing", None))
    if missing:
        raise RunError(f"the result lacks {_first(missing)} of the {name} that config.json describes{HINT}")
    odd = {made.tensors[0].name for own, made in found.items() if own not in expected
           and classify(made.tensors[0].name, (0, 0), made.tensors[0].dtype) is not TensorClass.BUFFER}
    unexpected = _without(odd, getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    if unexpected:
        raise RunError(f"the result has {_first(unexpected)}, which the {name} that config.json describes does not"
                       f" have{HINT}")
    for own, made in found.items():
        first = made.tensors[0]
        if own not in expected or made.split:
            continue
        shape = tuple(expected[own].shape)
        entries = sum(math.prod(tensor.shape) for tensor in made.tensors)
        if math.prod(shape) != entries if made.joined else shape != first.shape:
            raise RunError(f"{first.name} has shape {list(first.shape)} in the result, but the {name} that config.json"
                           f" describes has {own} of shape {list(shape)}{HINT}")


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    """Names that no pattern is found in, in order."""
    ignored = [re.compile(pattern) for pattern in patterns or ()]
    return sorted(name for name in names if not any(pattern.search(name) for pattern in ignored))


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensor{'s' if len(names) > 2 else ''}" if len(names) > 1 else "")
