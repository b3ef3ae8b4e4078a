"""What a model's files remember outside its modules: cached functions, dicts and lists of a file or class.

An export runs a forward on tensors without values. A table that the forward keeps for its next call, such as position
embeddings by length, would be one of these ever after.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mipipe.graphs.capture.python_state import of_library, own_code

_CACHED = functools._lru_cache_wrapper


@contextlib.contextmanager
def caches_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards, what a model's files remember outside its modules holds no tensor that was made inside.

    A cached function (``functools.lru_cache``) forgets all it has, before and after; a dict, list or set is as it was.
    """
    files = _reached_files(module)
    owners = [*files.values(), *(dict(vars(kind)) for kind in own_code(module)[0])]
    values: list[Any] = list({id(value): value for items in owners for value in list(items.values())}.values())
    cached = [item for value in values if isinstance(
        item := value.__func__ if isinstance(value, (classmethod, staticmethod)) else value, _CACHED)]
    kept: list[tuple[Any, Any]] = [(value, copy.copy(value)) for value in values
                                   if isinstance(value, (dict, list, set, deque))]
    for function in cached:
        function.cache_clear()
    try:
        yield
    finally:
        for function in cached:
            function.cache_clear()
        for value, before in kept:
            if not _same_items(value, before) \
                    and any(isinstance(item, torch.Tensor) for item in _leaves(value)):
                value.clear()
                getattr(value, "update" if isinstance(value, (dict, set)) else "extend")(before)


def _items(value: Any) -> list[Any]:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _leaves(value: Any) -> list[Any]:
    """What is in a container and the containers in it, each entered once: one may hold itself."""
    entered = set[int]()

    def known(item: Any) -> bool:
        if not isinstance(item, (dict, list, tuple, deque)):
            return False
        new = id(item) not in entered
        entered.add(id(item))
        return not new

    return tree_leaves(_items(value), is_leaf=known)


def _same_items(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects in the same order."""
    flat, rest = _leaves(one), _leaves(other)
    return len(flat) == len(rest) and all(a is b for a, b in zip(flat, rest, strict=True))


def _reached_files(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The globals of the model's own files and of those whose functions they have imported."""
    files = dict(own_code(module)[1])
    pending = list(files.values())
    while pending:
        for value in list(pending.pop().values()):
            value = value.__wrapped__ if isinstance(value, _CACHED) else value
            space: dict[str, Any] = vars(value) if isinstance(value, types.ModuleType) else (
                value.__globals__ if isinstance(value, types.FunctionType) else {})
            name = space.get("__name__")
            if isinstance(name, str) and name not in files and not of_library(name) \
                    and name.partition(".")[0] not in (*sys.stdlib_module_names, "numpy"):
                files[name] = space
                pending.append(space)
    return files
