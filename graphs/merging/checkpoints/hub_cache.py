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
    folder = cache_folder() / f"models--{match['name'].replace('/', '--')}"
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
