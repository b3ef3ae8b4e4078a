"""What transformers has opened before: the user's cache of checks that passed.

Whether transformers opens a result follows from its config, from the names, shapes and dtypes of its tensors, and from
the transformers that is installed. What passed once passes again, and a merge of models of the same architecture as
an earlier one imports no transformers for it. Failures are not kept, nor is anything of a transformers that is
installed to be edited, or of a converted mixture, whose class is our own. An entry that is not whole, not this user's,
or not a file is none. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mipipe.graphs.cache import cache_folder
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints import tensor_classes
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
    path = cache_folder("opened") / key
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or not _says(path.read_bytes(), key):
            return False
    except OSError:
        return False
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: among the last to go
    return True


def _says(content: bytes, key: str) -> bool:
    """Whether an entry is whole, and of this check."""
    return content.endswith(f" {key}\n".encode())


def note_opened(key: str | None, architecture: str) -> None:
    """Keep that a check has passed; a cache that cannot be written is no error."""
    if key is None:
        return
    folder = cache_folder("opened")
    with contextlib.suppress(OSError, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / key) and not stat.S_ISREG((folder / key).lstat().st_mode):
            return  # a pipe would be waited for, a link be followed
        version = importlib.metadata.version("transformers")
        write_text(folder / key, f"{architecture} of transformers {version} opened {key}\n")
        _drop_old(folder)


def _drop_old(folder: Path) -> None:
    """Keep the entries used last; other merges may be doing so too."""
    times: dict[Path, float] = {}
    for item in folder.iterdir():
        with contextlib.suppress(OSError):
            times[item] = item.lstat().st_mtime
    for old in sorted(times, key=lambda item: times[item], reverse=True)[KEPT:]:
        with contextlib.suppress(OSError):
            old.unlink()


def _installed() -> list[Any] | None:
    """The transformers that is installed, by the digests of its files, and torch; None if that may change unseen.

    What is imported must be what is installed (no checkout ahead of it on the path), and its sources as they were then.
    """
    try:
        found = importlib.metadata.distribution("transformers")
        torch = importlib.metadata.version("torch")
        spec = importlib.util.find_spec("transformers")
        files, origin = found.read_text("RECORD"), found.read_text("direct_url.json")
        kind = json.loads(origin) if origin else {}
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    if files is None or spec is None or spec.origin is None or not isinstance(kind, dict):
        return None
    place = os.path.realpath(str(found.locate_file("transformers")))
    if os.path.realpath(os.path.dirname(spec.origin)) != place:
        return None
    if not isinstance(kind.get("dir_info", {}), dict) or kind.get("dir_info", {}).get("editable"):
        return None
    try:
        sources = hashlib.sha256(json.dumps(sorted(_sources(place))).encode()).hexdigest()
    except OSError:
        return None
    return [found.version, hashlib.sha256(files.encode()).hexdigest(), sources, torch]


def _sources(folder: str) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of change of every source file of a package."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _sources(entry.path)
            elif entry.name.endswith(".py"):
                found = entry.stat()
                yield entry.path, found.st_size, found.st_mtime_ns


def _check() -> str:
    """The digest of what checks."""
    sources = (Path(__file__).with_name("verify.py"), Path(tensor_classes.__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
