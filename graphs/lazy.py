"""Package faces that import nothing until a name is used (PEP 562).

The names of a face stand in its package's ``__init__.pyi``, which type checkers and editors read as it is; at run time
`attach` reads the same lines and imports what is asked for. One list, and ``import mipipe`` stays free of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a package whose stub lies beside ``file`` (its ``__init__.py``)."""
    origins: dict[str, tuple[str, str]] = {}

    def known() -> dict[str, tuple[str, str]]:
        if not origins:
            origins.update(read_stub(file + "i"))
        return origins

    def get(name: str) -> Any:
        if name.startswith("_") or name not in known():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = known()[name]
        value = import_module(f"{package}.{name}") if module == package else getattr(import_module(module), original)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *known()})

    return get, names


def read_stub(path: str) -> dict[str, tuple[str, str]]:
    """Each name that a stub imports, with the module and the name it comes from."""
    import ast

    with open(path, encoding="utf-8") as stream:
        tree = ast.parse(stream.read(), path)
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in tree.body
            if isinstance(node, ast.ImportFrom) for alias in node.names}
