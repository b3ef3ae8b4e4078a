"""Code that a person names as ``package.module:name``: models, loaders of data, optimizers.

A graph or plan may record such a name, but only what stands on the command line or in the train.yaml that a person
gives is ever imported, and nothing of Python's own library: ``os:system`` is no model.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from mipipe.graphs.errors import InputError, MipipeError, printable, shown

_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


def is_named_code(text: str) -> bool:
    """Whether text has the form ``package.module:name``."""
    return _NAMED.fullmatch(text) is not None


def import_named(path: str) -> Any:
    """The object ``package.module:name``; the folder that the command runs in counts, as with ``python -m``.

    Raises:
        InputError: it cannot be imported, or is part of Python's own library.
    """
    if not is_named_code(path):
        raise InputError(f"{shown(path)}: expected package.module:name")
    module, _, name = path.partition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(f"{path}: {module} is part of Python's own library, which holds no model, loader or optimizer;"
                         " name a module of yours")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        if name not in str(error):
            raise InputError(f"{path}: importing {module!r} failed: {error}") from error
        raise InputError(f"{path}: module {module!r} has no {name!r}") from None
    except Exception as error:  # whatever the module's own code raises
        raise InputError(f"{path}: cannot import {module!r}: {error}") from error


@contextlib.contextmanager
def no_exit() -> Iterator[None]:
    """Inside, code of a person's that ends the process (``sys.exit(0)``) is an error: nothing of ours ends there, and
    what was asked for is not done, whatever status it gives.

    Raises:
        InputError: names the line. The exit of a printer whose reader has gone passes.
    """
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):
            raise
        *_, last = traceback.extract_tb(ended.__traceback__)
        raise InputError(f"{last.filename}, line {last.lineno}: ends the process ({shown(last.line, quoted=False)})"
                         " before the work is done; return, or raise an error that says what is wrong") from None


@contextlib.contextmanager
def in_one_line(kind: type[MipipeError], what: str) -> Iterator[None]:
    """Inside, whatever a person's code raises becomes an error of ``kind``: ``what`` it was, the exception and the last
    line that is neither ours nor torch's. Errors of our own pass."""
    try:
        yield
    except MipipeError:
        raise
    except Exception as error:
        raise kind(f"{what}: {_told(error)}") from None


def _told(error: Exception) -> str:
    """An exception in one line; of one that torch passes on from a process of a loader, the original's last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    passed_on = len(lines) > 1 and "Original Traceback" in str(error)
    text = lines[-1] if passed_on else f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    places = [f"{frame.f_code.co_filename}, line {line}" for frame, line in traceback.walk_tb(error.__traceback__)
              if frame.f_globals.get("__name__", "").partition(".")[0] not in ("mipipe", "torch", "queue")]
    if passed_on:
        places = [f"{file}, line {line}" for file, line in re.findall(r'File "(.+)", line (\d+)', str(error))[-1:]]
    return shown(text, quoted=False, most=300) + (f" ({printable(places[-1])})" if places else "")
