"""One job at a time in a folder: a lock of the operating system, which a job that died does not hold.

A POSIX record lock (fcntl): it belongs to one process, is not inherited by its children, works on NFS, and goes with
the process however it ends. The file says who holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from mipipe.graphs.errors import InputError

NAME = ".lock"
LAST_BREATH_S = 5.0
"""How long a restarted worker waits for the one before it, which is dying."""


class FolderLock:
    """Holds a folder from construction to `release`, or to the end of the process.

    Raises:
        InputError: another process holds it; says which.
    """

    def __init__(self, folder: Path, patience_s: float = 0.0) -> None:
        self.path = folder / NAME
        self._handle: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        until = time.monotonic() + patience_s
        while not self._take():
            if time.monotonic() >= until:
                holder = os.pread(self._handle, 500, 0).decode(errors="replace")
                self.release()
                raise InputError(f"checkpoint folder {folder}: another job is using it ({_who(holder)}); wait for it"
                                 " to end, or give another folder")
            time.sleep(0.1)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid(),
                                            "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode(), 0)

    def _take(self) -> bool:
        assert self._handle is not None
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def release(self) -> None:
        """Let the next job in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _who(text: str) -> str:
    try:
        data = json.loads(text)
        return f"process {data['pid']} on {data['host']}, since {data['since']}"
    except (ValueError, KeyError, TypeError):
        return "it does not say which"
