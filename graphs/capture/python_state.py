"""Python state that a forward changes: random generators, counters. An operator graph keeps one value of it for ever.

A generator (Python's, numpy's, one in an attribute or a global of the model's file) that a forward moves is refused,
and so is a number that every forward changes and that the model's code reads elsewhere: a graph would be the model of
one moment. Left out: what hides in closures or other libraries; `mipipe.graphs.capture.verify` calls the model twice
for that.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import random
import sys
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from mipipe.graphs.errors import GraphError

Snapshot = dict[tuple[str, str], Any]
"""Values by (owner, attribute): the owner is a module's class, an object's, a Python module."""

_TORCH = str(Path(torch.__file__).parent)
_NUMBERS = (bool, int, float)
_GENERATOR = "a random generator"


def refuse_changes(module: nn.Module, model: str, run: Callable[[], Any]) -> Any:
    """The result of ``run()``, in which the module's forward is called.

    Raises:
        GraphError: the forward depends on Python state that it changes; names the model's line.
    """
    with _observed(module, 1) as seen:
        result = run()
    if len(seen) < 2:
        return result
    moved = [key for key, value in seen[1].items() if seen[0].get(key) != value]
    drawn = [key for key in moved if seen[1][key][0] == _GENERATOR]
    line = _line_of_draw(module, run) if drawn else None
    if line is not None:
        raise GraphError(f"model {model}: its forward, at {line}, draws from Python's {'.'.join(drawn[0])}, and a graph"
                         " keeps what was drawn at the capture; draw with torch and use torch.where, or switch it off"
                         " (a layer drop of 0)")
    places = {key: place for key in moved if key not in drawn and (place := _place(module, key[1])) is not None}
    if places:  # a size that the first call remembers is no counter: see what a second call does
        with _observed(module, 2) as seen:
            run()
        for key, line in places.items():
            if seen[2].get(key) != seen[1].get(key):
                values = ", ".join(str(item[key][1]) if key in item else "nothing" for item in seen)
                raise GraphError(f"model {model}: its forward, at {line}, changes {'.'.join(key)} in every call"
                                 f" ({values}) and reads it, and a graph keeps one value; make it a buffer that tensor"
                                 " operations update, or an input")
    return result


@contextlib.contextmanager
def _observed(module: nn.Module, calls: int) -> Iterator[list[Snapshot]]:
    """Inside, a call of the module is ``calls`` calls of its forward; the snapshots before, between and after them.

    They are taken there because an export puts a module's attributes back.
    """
    seen: list[Snapshot] = []
    own, original = module.__dict__.get("forward"), module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():  # what a snapshot reads is not the model's
            seen[:] = [snapshot(module)]
        for _ in range(calls):
            result = original(*args, **kwargs)
            with _disable_current_modes():
                seen.append(snapshot(module))
        return result

    module.forward = forward
    try:
        yield seen
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def snapshot(module: nn.Module) -> Snapshot:
    """The numbers and generators within a model's reach."""
    found: Snapshot = {("random", "random"): (_GENERATOR, hash(random.getstate()))}
    if "numpy" in sys.modules:
        found["numpy", "random"] = (_GENERATOR, repr(sys.modules["numpy"].random.get_state()[1:3])
                                    + str(sys.modules["numpy"].random.get_state()[1].sum()))
    for path, part in module.named_modules():
        owner = f"{type(part).__name__} {path.removeprefix('wrapped').lstrip('.')}".strip()
        found |= _values(owner, part.__dict__)
        for name, value in part.__dict__.items():
            plain = isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, (nn.Module, type))
            if plain and not of_library(type(value).__module__):
                found |= _values(f"{owner}.{name}", vars(value))
    classes, files = own_code(module)
    for kind in classes:
        found |= _values(kind.__qualname__, dict(vars(kind)))
    for name, items in files.items():
        found |= _values(name, items)
    return found


def own_code(module: nn.Module) -> tuple[list[type], dict[str, dict[str, Any]]]:
    """The model's own classes and the others in their files, and the globals of these files."""
    kinds = {kind: None for part in module.modules() for kind in type(part).__mro__ if not of_library(kind.__module__)}
    files: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        for item in vars(kind).values():
            space = getattr(item, "__globals__", {})
            if not of_library(space.get("__name__", "builtins")):
                files[space["__name__"]] = space
    for name, space in files.items():  # autograd Functions and the like
        kinds |= {item: None for item in space.values() if isinstance(item, type) and item.__module__ == name}
    return list(kinds), files


def of_library(name: str) -> bool:
    """Whether a Python module is part of what every model uses: its state is not the model's."""
    return name.partition(".")[0] in ("torch", "mipipe", "transformers", "builtins")


def _values(owner: str, items: Mapping[str, Any]) -> Snapshot:
    """The numbers and generators among some named values."""
    found: Snapshot = {}
    for name, value in list(items.items()):
        if name == "training" or name.startswith("__"):
            continue
        if isinstance(value, _NUMBERS):
            found[owner, name] = ("a number", value)
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            found[owner, name] = (_GENERATOR, hash(value.getstate()))
        elif isinstance(value, itertools.count):
            found[owner, name] = (_GENERATOR, repr(value))
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            found[owner, name] = (_GENERATOR, repr(value.bit_generator.state))
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "get_state"):
            found[owner, name] = (_GENERATOR, repr(value.get_state()))
        elif isinstance(value, torch.Generator):
            found[owner, name] = (_GENERATOR, bytes(value.get_state().tolist()))
    return found


def containers(module: nn.Module) -> Snapshot:
    """Lists, dicts and the like within a model's reach, by what they hold of numbers, and tensors by identity.

    They change in many models whose result does not depend on them (maps kept for a plot): they explain a difference.
    """
    owners = [(type(part).__name__, part.__dict__) for part in module.modules()]
    found: Snapshot = {}
    for owner, items in [*owners, *own_code(module)[1].items()]:
        for name, value in list(items.items()):
            if name.startswith("_"):
                value = None if name in nn.Module().__dict__ or name.startswith("__") else value
            if isinstance(value, torch.Tensor):
                found[owner, name] = id(value)
            elif isinstance(value, (list, dict, set, deque)):
                held = list(value.values()) if isinstance(value, dict) else list(value)
                found[owner, name] = len(held), [item for item in held if isinstance(item, _NUMBERS)]
    return found


def changed_containers(module: nn.Module, before: Snapshot) -> str:
    """What of `containers` has changed since ``before``, with the model's last line that names it; empty if nothing."""
    classes, files = own_code(module)
    spaces = [*((vars(kind), kind.__module__) for kind in classes), *((items, file) for file, items in files.items())]
    codes = [code for items, file in spaces for code in _codes(items, file)]
    texts = []
    for key, value in containers(module).items():
        if before.get(key) != value:
            lines = [line for code in codes for line in _lines(
                code, ("LOAD_ATTR", "STORE_ATTR", "LOAD_GLOBAL", "STORE_GLOBAL"), (key[1],))]
            texts.append(".".join(key) + (f" at {lines[-1]}" if lines else ""))
    return ", ".join(texts[:3])


def _line_of_draw(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """The line of the model at which a second run moves a generator; None: torch itself did."""
    found: list[str] = []
    seen: dict[types.CodeType, None] = {}

    def watch(frame: Any, event: str, value: Any) -> None:
        if event == "call" and not frame.f_code.co_filename.startswith(_TORCH):
            seen[frame.f_code] = None
        elif event == "c_call" and isinstance(getattr(value, "__self__", None), random.Random):
            while frame is not None and frame.f_code.co_filename == random.__file__:
                frame = frame.f_back
            if frame is not None and not frame.f_code.co_filename.startswith(_TORCH):
                found.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    if not found:  # numpy's generators are no C functions to the interpreter
        files = {items.get("__file__") for items in own_code(module)[1].values()}
        found = [line for code in seen if code.co_filename in files for line in _lines(
            code, ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"), ("random", "rng", "generator", "integers", "next"))]
        found += [f"{code.co_filename}:{code.co_firstlineno}" for code in seen if code.co_filename in files]
    return found[0] if found else None


def _lines(code: types.CodeType, operations: tuple[str, ...], names: tuple[str, ...]) -> Iterator[str]:
    """The lines of a code object on which one of the operations has one of the names."""
    for item in dis.get_instructions(code):
        if item.opname in operations and item.argval in names:
            line = item.positions.lineno if item.positions is not None else code.co_firstlineno
            yield f"{code.co_filename}:{line}"


def _place(module: nn.Module, name: str) -> str | None:
    """Where the model's code stores a number; None if nothing reads it but what stores it anew (``n += 1``)."""
    classes, files = own_code(module)
    spaces = [(items, file) for file, items in files.items()] + [(vars(kind), kind.__module__) for kind in classes]
    codes = list(dict.fromkeys(code for items, file in spaces for code in _codes(items, file)))
    stores = Counter(line for code in codes for line in _lines(code, ("STORE_ATTR", "STORE_GLOBAL"), (name,)))
    reads = Counter(line for code in codes for line in _lines(code, ("LOAD_ATTR", "LOAD_GLOBAL"), (name,)))
    return list(stores)[-1] if stores and reads - stores else None


def _codes(items: Mapping[str, Any], file: str) -> Iterator[types.CodeType]:
    """All code of functions and classes that a namespace defines, nested functions included."""
    for value in list(items.values()):
        value = getattr(value, "__func__", value)
        if isinstance(value, type) and value.__module__ == file:
            yield from _codes(vars(value), file)
        code = getattr(value, "__code__", None)
        pending = [code] if isinstance(code, types.CodeType) and getattr(value, "__module__", file) == file else []
        while pending:
            found = pending.pop()
            yield found
            pending += [item for item in found.co_consts if isinstance(item, types.CodeType)]


