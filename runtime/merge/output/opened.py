"""What transformers has opened before: the user's cache of checks that passed.

Whether transformers opens a result follows from its config, from the names, shapes and dtypes of its tensors, and from
the transformers that is installed. What passed once passes again, and a merge of models of the same architecture as
an earlier one imports no transformers for it. Failures are not kept, nor is anything of a transformers that is
installed to be edited, or of a converted mixture, whose class is our own. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mipipe.graphs.cache import cache_folder
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging import tensor_classes
from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.write_files import write_text

KEPT = 1000
"""How many entries are kept, a line each: those used last."""


def key_of(config: Mapping[str, Any], tensors: Iterable[tuple[str, Iterable[int], str]]) -> str | None:
    """The name under which a passed check is kept.

    Args:
        config: what config.json holds.
        tensors: name, shape and dtype (safetensors' spelling) of each tensor.

    Returns:
        None where it is not to be kept.
    """
    installed = _installed()
    if installed is None or str(config.get("model_type")).startswith("mipipe_"):
        return None
    parts = [config, sorted([name, list(shape), dtype] for name, shape, dtype in tensors), installed, _check()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def key_of_graph(graph: MergeGraph) -> str | None:
    """The name under which the check of a merge's result will be kept."""
    return key_of(graph.config, ((unit.name, unit.shape, unit.dtype) for unit in graph.units))


def was_opened(key: str | None) -> bool:
    """Whether the check of this name has passed."""
    if key is None:
        return False
    try:
        os.utime(cache_folder("opened") / key)  # used now: among the last to go
    except OSError:
        return False
    return True


def note_opened(key: str | None, architecture: str) -> None:
    """Keep that a check has passed; a cache that cannot be written is no error."""
    if key is None:
        return
    folder = cache_folder("opened")
    with contextlib.suppress(OSError, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / key, f"{architecture}, transformers {importlib.metadata.version('transformers')}\n")
        entries = sorted(folder.iterdir(), key=lambda item: item.stat().st_mtime, reverse=True)
        for old in entries[KEPT:]:
            old.unlink(missing_ok=True)


def _installed() -> list[str] | None:
    """The transformers that is installed, by the digests of its files, and torch; None if that may change unseen."""
    try:
        found = importlib.metadata.distribution("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    files, origin = found.read_text("RECORD"), found.read_text("direct_url.json")
    if files is None or (origin is not None and json.loads(origin).get("dir_info", {}).get("editable")):
        return None
    return [found.version, hashlib.sha256(files.encode()).hexdigest(), importlib.metadata.version("torch")]


def _check() -> str:
    """The digest of what checks."""
    sources = (Path(__file__).with_name("verify.py"), Path(tensor_classes.__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
