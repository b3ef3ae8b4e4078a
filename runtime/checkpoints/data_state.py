"""What of a checkpoint is no weight, as data: a loader's state, by torch's restricted reader, and values as JSON.

Nothing that is read here runs code, so what would need some is refused where it is written, by its place.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import InputError, RunError, shown


def pack_state(data: dict[str, Any]) -> bytes:
    """A loader's state as bytes that are read back without running any code from them.

    Raises:
        RunError: it holds more than tensors, numbers, texts, lists and dicts.
    """
    packed = _packed(data)
    if packed is None:
        raise RunError("data: the loader's state_dict() holds more than tensors, numbers, texts, lists and dicts, so it"
                       f" cannot be saved: {_foreign(data.get('loader'), 'state_dict()')}")
    return packed


def _packed(data: Any) -> bytes | None:
    """Bytes that torch's restricted reader reads; None where it does not, or there are none."""
    stream = io.BytesIO()
    try:
        torch.save(data, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)  # bytes that we made a moment ago: may the restricted reader read them?
    except Exception:
        return None
    return stream.getvalue()


def _foreign(data: Any, where: str) -> str:
    """The first thing in a loader's state that cannot be saved, for people."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, item in items:
        if _packed(item) is None:
            return _foreign(item, f"{where}[{shown(key)}]")
    return f"{where} is a {type(data).__module__}.{type(data).__qualname__}"


def pack_values(values: dict[str, Any]) -> str:
    """What of an optimizer's state is no tensor, as JSON.

    Raises:
        RunError: a value that JSON has not.
    """
    for name, item in values.items():
        try:
            json.dumps(item)
        except (TypeError, ValueError):
            raise RunError(f"{name} is a {type(item).__module__}.{type(item).__qualname__}, so the optimizer's state"
                           " cannot be saved; expected tensors, numbers, texts, lists and dicts") from None
    return json.dumps(values)


def read_loader(path: Path) -> dict[str, Any]:
    """A loader's state as `pack_state` made it, by torch's restricted reader.

    Raises:
        InputError: it is something else.
    """
    try:
        # a checkpoint's file is data: weights_only builds tensors, numbers, texts, lists and dicts, and calls nothing
        # that the file names (torch's own unpickler with a list of what it may make)
        data = torch.load(path, weights_only=True)
    except Exception as error:
        raise InputError(f"checkpoint {path.parent}: {path.name} cannot be read: {reason(error)}") from None
    if not isinstance(data, dict) or not isinstance(data.get("taken"), int):
        raise InputError(f"checkpoint {path.parent}: {path.name} holds no loader's state")
    return data


def reason(error: BaseException) -> str:
    """One line of an error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {os.fspath(error.filename)}" if error.filename else "")
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
