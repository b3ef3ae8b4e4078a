"""Captures that are kept: the same model, options and versions give the graph of last time.

What determines a capture is the source with its options, the versions of Python, torch, transformers and mipipe's own
graph code, and every file that was read while the model was built: its configuration, the user's modules, whatever a
factory opens. An entry names those files with their SHA-256 and holds only as long as all are unchanged. Left out: what
a factory reads from the environment, the network or a C library; and installed packages, which their version stands
for only in the case of torch and transformers (``--no-cache`` captures anew).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mipipe.graphs.cache import cache_folder
from mipipe.graphs.capture.assemble import TraceProgress
from mipipe.graphs.capture.model import capture
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import digest, load, save, write_text

KEPT = 50
"""Graphs that stay; the oldest go first."""

_MADE = {"site-packages", "dist-packages", "__pycache__"}
"""Folders of installed packages and of compiled modules."""
_OWN = Path(__file__).resolve().parent.parent
_opened: set[str] | None = None
"""Files opened for reading while a capture is watched; None while none is."""
_hooked = False


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, the file it is kept in (None: not kept), and whether it was there already."""

    graph: OperatorGraph
    path: Path | None
    reused: bool


def capture_cached(source: str | Path, options: Mapping[str, Any], *, progress: TraceProgress | None = None,
                   folder: Path | None = None) -> Captured:
    """`capture` of a source that is named, from the cache where nothing has changed.

    Args:
        source: as for `capture`.
        options: its keyword arguments, plain data.
        progress: called with a line now and then.
        folder: of the cache; None: the user's.

    Raises:
        InputError, GraphError: as `capture`.
    """
    folder = folder or cache_folder("graphs")
    record = folder / f"{_key(source, options)}.key.json"
    found = _recall(record)
    if found is not None:
        return found
    with _watching() as opened:
        graph = capture(source, **options, progress=progress)
    return Captured(graph, _remember(record, graph, _dependencies(source, opened)), False)


def _key(source: str | Path, options: Mapping[str, Any]) -> str:
    """What is known before the capture, hashed."""
    name = str(source)
    place = os.path.abspath(name) if os.path.exists(name) else os.getcwd()
    parts = [name, place, dict(options), platform.python_version(), _version("torch"), _version("transformers"),
             *((str(path.relative_to(_OWN)), _sha256(path)) for path in sorted(_OWN.rglob("*.py")))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sha256(path: str | Path) -> str | None:
    """Of a file's content; None where there is no such file."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _recall(record: Path) -> Captured | None:
    """The kept graph, if the entry is whole and every file it rests on is unchanged."""
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        path = record.parent / data["graph"]
        if _sha256(path) != data["sha256"] or any(_sha256(name) != known for name, known in data["files"].items()):
            return None
        graph = load(path, OperatorGraph)
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: among the last to go
        return Captured(graph, path, True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        return None


def _remember(record: Path, graph: OperatorGraph, files: Mapping[str, str]) -> Path | None:
    """Keep a graph under its own digest, then the entry that names it; a cache that cannot be written is no error."""
    path = record.parent / f"{digest(graph)}.graph.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(graph, path)
        write_text(record, json.dumps({"graph": path.name, "sha256": _sha256(path), "files": dict(files)}))
        graphs = sorted(path.parent.glob("*.graph.json"), key=lambda item: item.stat().st_mtime, reverse=True)
        for old in graphs[KEPT:]:
            old.unlink(missing_ok=True)
    except (OSError, InputError):
        return None
    return path


@contextlib.contextmanager
def _watching() -> Iterator[set[str]]:
    """The files that Python opens for reading meanwhile. (An audit hook stays for the life of the process, idle.)"""
    global _opened, _hooked
    if not _hooked:
        sys.addaudithook(_hear)
        _hooked = True
    opened: set[str] = set()
    _opened = opened
    try:
        yield opened
    finally:
        _opened = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        mode = arguments[1]
        if mode is None or (isinstance(mode, str) and not set(mode) & set("wax")):
            _opened.add(os.path.abspath(os.fsdecode(arguments[0])))


def _dependencies(source: str | Path, opened: set[str]) -> dict[str, str]:
    """The user's files that a capture read or imported, with their SHA-256."""
    modules = {os.path.abspath(file) for module in list(sys.modules.values())
               if isinstance(file := getattr(module, "__file__", None), str)}
    named = {os.path.abspath(source)} if os.path.isfile(source) else set()
    own = tuple(str(_OWN.parent / name) for name in ("graphs", "planner", "runtime", "cli", "mipipe"))
    passed = (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *own, str(cache_folder("")), "/proc",
              "/sys", "/dev", "/etc")
    files = {path for path in modules | opened | named
             if not path.startswith(tuple(os.path.abspath(folder) + os.sep for folder in passed))
             and not _MADE & set(path.split(os.sep)) and "torchinductor" not in path}
    return {path: known for path in sorted(files) if (known := _sha256(path)) is not None}
