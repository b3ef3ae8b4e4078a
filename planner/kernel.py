"""Compiled functions whose compiled form is kept: numba's ``njit`` and its cache, told what else a kernel is made of.

numba keeps what it compiled under the file of the function alone, and under the types it was called with. But a kernel
is also made of the kernels that it calls, in whatever module; of every constant that its code names, whose value is
frozen into it wherever it was imported from; and of the order of the fields of named tuples, which become places.
Here an index counts only while all of these are the same; whatever cannot be read counts as none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numpy as np
from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.core.types import BaseTuple


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

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return super()._index_key(sig, codegen), _fields(getattr(sig, "args", sig))  # type: ignore[no-untyped-call]

    def is_filled(self) -> bool:
        """Whether anything compiled from today's text is kept."""
        return bool(self._cache_file._load_index())  # type: ignore[no-untyped-call]


@cache
def _text(file: str) -> bytes:
    return Path(file).read_bytes()


def _fields(types: Iterable[Any]) -> tuple[Any, ...]:
    """The names of the fields of all named tuples among some types, and of those within them: numba tells two types
    apart by their class and the types of their fields."""
    return tuple((getattr(item, "fields", ()), _fields(getattr(item, "types", ()))) for item in types
                 if isinstance(item, BaseTuple))


def _names(code: CodeType) -> set[str]:
    """The global names and attributes that a function's code, and that of the functions within it, looks up."""
    return set(code.co_names).union(*(_names(item) for item in code.co_consts if isinstance(item, CodeType)))


def _frozen(value: Any, names: set[str]) -> str:
    """What of a global value the compiler freezes, as text: constants, constants of a module that are named, the
    fields of a class; nothing for what else there is."""
    if isinstance(value, ModuleType):
        return "".join(f"{name}={_frozen(getattr(value, name), set())};" for name in sorted(names)
                       if hasattr(value, name))
    if isinstance(value, type):
        return repr(getattr(value, "_fields", ""))
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    if isinstance(value, tuple):
        return f"({', '.join(_frozen(item, names) for item in value)})"
    return repr(value) if isinstance(value, int | float | complex | str | bytes | np.generic | None) else ""


def constants_of(function: Callable[..., Any]) -> str:
    """The values, as text, that are frozen into a function when it is compiled: of all globals that its code names."""
    space, names = function.__globals__, _names(function.__code__)
    cells = zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    return "".join(f"{name}={_frozen(value, names)};" for name, value in (
        *cells, *((name, space[name]) for name in sorted(names) if name in space)))


def kernels_of(function: Callable[..., Any]) -> list[Any]:
    """The other kernels that a function's module knows at this moment."""
    return [item for item in function.__globals__.values() if isinstance(item, Dispatcher)]


def files_of(function: Any) -> set[str]:
    """The modules' files that a kernel is made of: its own, and those of the kernels that its module imports."""
    plain = getattr(function, "py_func", function)
    others = (item for item in kernels_of(plain) if item is not function)
    return {plain.__code__.co_filename}.union(*(getattr(item, "files", ()) for item in others))


def stamp_of(files: Iterable[str], constants: Iterable[str]) -> str:
    """A digest of the files' text and of the constants' values."""
    found = [*(_text(file) for file in sorted(files)), *(item.encode() for item in sorted(constants))]
    return hashlib.sha256(b"\0".join(found)).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` at its first call, without the GIL, and keep the result; with NUMBA_DISABLE_JIT as it is."""
    compiled: Any = njit(nogil=True)(function)
    if hasattr(compiled, "py_func"):
        compiled.files = files_of(function)
        compiled.constants = {constants_of(function)}.union(
            *(getattr(item, "constants", ()) for item in kernels_of(function)))
        compiled._cache = _KernelCache(function, stamp_of(compiled.files, compiled.constants))
    return compiled


def is_compiled(function: Any) -> bool:
    """Whether calling a kernel needs no compiler: this process has called it, it is kept, or it is plain Python."""
    signatures = getattr(function, "signatures", None)
    return signatures is None or bool(signatures) or bool(function._cache.is_filled())
