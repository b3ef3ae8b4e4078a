"""`pyomo.environ`, imported where a model is first built: two thirds of a second that a solve without one saves.

``from mipipe.planner.milp import pyo`` stands where ``import pyomo.environ as pyo`` would. What this module itself
needs has underscores: Pyomo has an ``Any`` of its own.
"""

from __future__ import annotations

import importlib as _importlib
import typing as _typing


def __getattr__(name: str) -> _typing.Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_importlib.import_module("pyomo.environ"), name)
