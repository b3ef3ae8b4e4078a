"""Compiled functions whose compiled form is kept: numba's ``njit`` and its cache, told what else a kernel is made of.

numba keeps what it compiled under the file of the function alone. A kernel that calls one of another module would go on
running the old code of that one, and an index that names a class which is gone ends in an error. Here an index counts
only while the text of all modules that a kernel is made of is the same; whatever cannot be read counts as none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher


class _Index(IndexDataCacheFile):
    """An index that is empty where it cannot be read: of other classes than today's, cut off, or no index at all."""

    def _load_index(self) -> Any:
        try:
            return super()._load_index()  # type: ignore[no-untyped-call]
        except Exception:  # what unpickling may raise has no common kind; the index is made anew
            return {}


class _KernelCache(FunctionCache):
    def __init__(self, function: Callable[..., Any], stamp: str) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file = _Index(self._cache_path, self._impl.filename_base, stamp)  # type: ignore[no-untyped-call]

    def is_filled(self) -> bool:
        """Whether anything compiled from today's text is kept."""
        return bool(self._cache_file._load_index())  # type: ignore[no-untyped-call]


@cache
def _text(file: str) -> bytes:
    return Path(file).read_bytes()


def files_of(function: Any) -> set[str]:
    """The modules' files that a kernel is made of: its own, and those of the kernels that its module imports."""
    plain = getattr(function, "py_func", function)
    others = (item for item in plain.__globals__.values() if isinstance(item, Dispatcher) and item is not function)
    return {plain.__code__.co_filename}.union(*(getattr(item, "files", ()) for item in others))


def stamp_of(files: Iterable[str]) -> str:
    """A digest of the files' text."""
    return hashlib.sha256(b"\0".join(_text(file) for file in sorted(files))).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` at its first call, without the GIL, and keep the result; with NUMBA_DISABLE_JIT as it is."""
    compiled: Any = njit(nogil=True)(function)
    if hasattr(compiled, "py_func"):
        compiled.files = files_of(function)
        compiled._cache = _KernelCache(function, stamp_of(compiled.files))
    return compiled


def is_compiled(function: Any) -> bool:
    """Whether calling a kernel needs no compiler: this process has called it, it is kept, or it is plain Python."""
    signatures = getattr(function, "signatures", None)
    return signatures is None or bool(signatures) or bool(function._cache.is_filled())
