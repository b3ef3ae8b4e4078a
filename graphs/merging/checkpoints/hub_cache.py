"""Models by their names on the Hugging Face Hub, where the local cache has them; nothing is downloaded.

The cache holds ``models--ORG--NAME/snapshots/COMMIT`` folders, and ``refs/BRANCH`` files that name a commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


def cache_folder() -> Path:
    """Where huggingface_hub keeps models: ``HF_HUB_CACHE``, ``HF_HOME/hub``, or ``~/.cache/huggingface/hub``."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(os.environ["HF_HUB_CACHE"]))
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("HF_HOME") or f"{cache}/huggingface")) / "hub"


def cached_model(label: str) -> Path | None:
    """The folder of ``org/name`` or ``org/name@revision`` (a branch, tag or commit) in the cache, if it is there."""
    match = _NAME.fullmatch(label)
    if match is None or ".." in label:
        return None
    folder = _model_cache(match["name"])
    revision = match["revision"] or "main"
    ref = folder / "refs" / revision
    try:
        commit = ref.read_text().strip() if ref.is_file() else revision
    except OSError:
        return None
    if "/" in commit or not commit:
        return None
    whole = folder / "snapshots" / commit
    if whole.is_dir():
        return whole
    short = sorted((folder / "snapshots").glob(f"{commit}*")) if re.fullmatch(r"[0-9a-f]{7,40}", commit) else []
    return short[0] if len(short) == 1 else None


def not_there(label: str) -> str:
    """What is wrong with a label for which `model_folder` finds nothing, and what to do."""
    revisions = _revisions(label)
    if revisions:
        return (f"{label}: the cache {cache_folder()} has other revisions of this model: {', '.join(revisions[:5])};"
                " give one of them (org/name@revision), or download this one")
    return (f"{label}: no such folder, and no such model in the cache {cache_folder()}; models are given as local"
            " checkpoint folders (config.json and .safetensors files), or by the name under which they were downloaded")


def _revisions(label: str) -> list[str]:
    """The branches and tags of a model that the cache has, then the commits that none of them names."""
    match = _NAME.fullmatch(label)
    if match is None or ".." in label:
        return []
    folder = _model_cache(match["name"])
    names = {str(ref.relative_to(folder / "refs")): cached_model(f"{match['name']}@{ref.relative_to(folder / 'refs')}")
             for ref in sorted((folder / "refs").rglob("*")) if ref.is_file()}
    commits = sorted(path.name for path in (folder / "snapshots").glob("*") if path not in names.values())
    return [*(name for name, path in names.items() if path is not None), *commits]


def _model_cache(name: str) -> Path:
    return cache_folder() / f"models--{name.replace('/', '--')}"


def model_folder(label: str | Path) -> Path:
    """The folder a label names: itself where there is one, else what the cache has; the label where nothing is."""
    folder = Path(label)
    return folder if folder.is_dir() else cached_model(str(label)) or folder


def split_label(label: str, there: Callable[[str], bool]) -> list[str]:
    """The models of ``model+adapter+...``: names may have a ``+`` of their own, as long as ``there`` knows them whole.

    Where no way of cutting gives names that are all there, every ``+`` separates.
    """
    pieces = label.split("+")
    if len(pieces) == 1 or there(label):
        return [label.strip()]
    for cut in range(len(pieces) - 1, 0, -1):
        first = "+".join(pieces[:cut]).strip()
        if there(first):
            rest = split_label("+".join(pieces[cut:]).strip(), there)
            if all(map(there, rest)):
                return [first, *rest]
    return [piece.strip() for piece in pieces]
