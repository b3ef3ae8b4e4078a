"""Importing what a user names as ``package.module:name``."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


def user_module(name: str) -> ModuleType:
    """A module that a user names, also from the current folder, as for ``python -m``.

    Raises:
        ImportError: there is none. Whatever the module itself raises.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    return import_module(name)
