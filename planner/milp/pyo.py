"""`pyomo.environ`, imported where a model is first built: two thirds of a second that a solve without one saves.

``from mipipe.planner.milp import pyo`` stands where ``import pyomo.environ as pyo`` would. What this module itself
needs has underscores: Pyomo has an ``Any`` of its own.
"""

from __future__ import annotations

import importlib as _importlib
import threading as _threading
import typing as _typing

_ENVIRON = "pyomo.environ"


def loaded(seconds: float) -> bool:
    """Whether Pyomo and HiGHS are loaded within so many seconds. A thread of its own loads them: where the machine is
    busy or the disk cold that takes longer than a short limit, and an import cannot be interrupted."""
    loading = _threading.Thread(target=lambda: [_importlib.import_module(name) for name in (_ENVIRON, "highspy")],
                                daemon=True)
    loading.start()
    loading.join(max(seconds, 0.0))
    return not loading.is_alive()


def __getattr__(name: str) -> _typing.Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_importlib.import_module(_ENVIRON), name)
