"""Where the models of a recipe are: beside the recipe first, so that a folder with recipe and models can be moved."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mipipe.graphs.merging.checkpoints.hub_cache import split_label
from mipipe.graphs.merging.recipes.forms import with_labels

_KEYS = ("model", "base_model", "architecture", "source_model", "tokenizer_source", "source", "data", "calibration")
"""The keys of a recipe whose text may name a model's folder (``base+adapter`` names two), or a file of samples."""


def beside_recipe(documents: Sequence[Any], path: str | Path) -> list[Any]:
    """The documents with every model that lies beside the recipe named by where that is.

    What is absolute, names an earlier recipe of the file, or is no folder there stays as it is (and is then looked for
    in the current folder).
    """
    folder, found = Path(path).parent, [with_labels(item) for item in documents]
    if folder.resolve() == Path.cwd():
        return found
    names = {str(item["name"]) for item in found if isinstance(item, dict) and "name" in item}
    return [_resolved(item, folder, names) for item in found]


def _resolved(data: Any, folder: Path, names: Collection[str], inside: str = "") -> Any:
    if isinstance(data, list):
        return [_resolved(item, folder, names, inside) for item in data]
    if not isinstance(data, dict):
        return data
    def there(part: str) -> bool:
        return part in names or (folder / part).exists()

    assembly = "experts" in data and "merge_method" not in data
    return {key: "+".join(_place(part, folder, names) for part in split_label(item, there))
            if key in _KEYS and isinstance(item, str) and not _is_word(key, item, inside, assembly)
            else _resolved(item, folder, names, str(key)) for key, item in data.items()}


def _is_word(key: str, value: str, inside: str, assembly: bool) -> bool:
    """Whether a text is a word of the recipe's own where it stands, whatever folders there are."""
    if key == "tokenizer_source" or (key == "source" and inside == "tokenizer"):
        return value in ("base", "union")
    return key == "architecture" and assembly


def _place(name: str, folder: Path, names: Collection[str]) -> str:
    if not name or name in names or os.path.isabs(name) or not (folder / name).exists():
        return name
    return os.path.normpath(folder / name)
