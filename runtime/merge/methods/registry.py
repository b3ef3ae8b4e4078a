"""The merge methods ready to run: the functions that each row of `mipipe.graphs.merging.method_table.methods` names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mipipe.graphs.merging.method_table.method_spec import MethodSpec
from mipipe.graphs.merging.method_table.methods import METHODS as SPECS
from mipipe.graphs.merging.method_table.methods import REBUILD, STORE
from mipipe.runtime.merge.methods import parts
from mipipe.runtime.merge.methods.method import Method, no_rounds


def _function(name: str) -> Callable[..., Any]:
    """``module.function`` of this folder; names come from our own table, never from a file."""
    module, _, function = name.partition(".")
    return getattr(import_module(f"mipipe.runtime.merge.methods.{module}"), function)


def _method(spec: MethodSpec) -> Method:
    return Method(spec, _function(spec.apply), _function(spec.measure) if spec.measure else no_rounds,
                  _function(spec.elsewhere) if spec.elsewhere else None)


METHODS = tuple(map(_method, SPECS))
INTERNAL = (Method(STORE, parts.compress), Method(REBUILD, parts.reconstruct))
"""What storing and rebuilding parts runs in place of a merge; see `mipipe.runtime.merge.launching.store`."""

BY_METHOD = {method.spec.name: method for method in (*METHODS, *INTERNAL)}
