"""Where mipipe keeps what it can make again: ``$XDG_CACHE_HOME/mipipe``, or ``~/.cache/mipipe``."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder of one kind of results; it need not exist (XDG base directory specification: no relative paths).

    Of a user without a home it is one that cannot be made, as of a disk that cannot be written.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):
        return Path(home) / "mipipe" / name
    try:
        return Path.home() / ".cache" / "mipipe" / name
    except RuntimeError:
        return Path(os.devnull) / "mipipe" / name
