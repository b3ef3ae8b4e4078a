"""Python's cyclic garbage collector, held off while much is made that is no garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """The collector waits meanwhile: with torch or a large model loaded one pass takes tens of milliseconds. What has
    no cycles goes by reference counts as ever; the rest when the collector is back."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
