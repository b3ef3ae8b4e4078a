"""One merge at a time into a folder: a second one says so, and neither touches what the other writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mipipe.graphs.errors import InputError

_HELD: set[int] = set()
"""Handles of this process's locks."""


def let_go_in_fork() -> None:
    """Close the locks that a fork inherited, so that they end with the process that took them."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold ``OUT.lock`` meanwhile; the system lets go of it when the process ends, however it ends.

    Raises:
        InputError: another process holds it.
    """
    path = out.with_name(out.name + ".lock")
    handle = _lock(path)
    _HELD.add(handle)
    try:
        yield
    finally:
        _HELD.discard(handle)
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _lock(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = os.read(handle, 20).decode(errors="replace").strip()
            os.close(handle)
            raise InputError(f"{path.with_suffix('')}: another merge is writing it"
                             f"{f' (process {told})' if told.isdigit() else ''}; wait for it, or give another -o") \
                from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:  # else its last holder removed it meanwhile
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        os.close(handle)
