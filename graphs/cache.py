"""Where mipipe keeps what it can make again: ``$XDG_CACHE_HOME/mipipe``, or ``~/.cache/mipipe``."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder of one kind of results; it need not exist (XDG base directory specification: no relative paths)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "mipipe" / name
