"""Folders that appear whole or not at all: what is in them reaches the disk first, then they get their name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(folder: Path, target: Path, files: Iterable[Path] = ()) -> None:
    """Rename a finished folder to ``target``, once ``files`` are on disk; the new name is too when this returns."""
    for file in files:
        sync(file)
    os.rename(folder, target)
    sync(target.absolute().parent)
