"""`pyomo.environ`, imported where a model is first built: two thirds of a second that a solve without one saves.

``from mipipe.planner.milp import pyo`` stands where ``import pyomo.environ as pyo`` would. What this module itself
needs has underscores (Pyomo has an ``Any`` of its own), but for the clock.
"""

from __future__ import annotations

import contextlib as _contextlib
import importlib as _importlib
import threading as _threading
import types as _types
import typing as _typing

from mipipe.planner import clock

_ENVIRON = "pyomo.environ"
_found: list[_types.ModuleType] = []


def _load() -> _types.ModuleType:
    """Pyomo, loaded by a thread of its own: where the machine is busy or the disk cold that takes longer than a short
    limit, and an import cannot be interrupted.

    Raises:
        OutOfTimeError: the time of the solve that asks was over first.
    """
    loading = _threading.Thread(target=_try_import, daemon=True)
    loading.start()
    while loading.is_alive():
        loading.join(clock.LEAST_S)
        clock.ask()
    return _importlib.import_module(_ENVIRON)


def _try_import() -> None:
    with _contextlib.suppress(Exception):  # who asked imports it once more, and sees the error
        _importlib.import_module(_ENVIRON)


def __getattr__(name: str) -> _typing.Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if not _found:
        _found.append(_load())
    return getattr(_found[0], name)
