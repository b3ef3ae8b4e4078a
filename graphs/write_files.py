"""The one place that writes a file somebody asked for: whole or not at all, and never in place of something else.

A regular file is replaced by a rename, so that a reader sees the old or the new one; its mode and owner stay, and other
names of it (hard links, as of a backup) keep the old one. What the name leads to is written, not the name: a symbolic
link stays one. What is no regular file (a pipe, a terminal, ``/dev/stdout``) is written in place, and waits for a
reader no longer than `PATIENCE_S`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from mipipe.graphs.errors import InputError

PATIENCE_S = 30.0
"""How long a named pipe is given to find a reader, and a reader to take what is there, before that is an error."""

WRITTEN: set[int] = set()
"""Which of this process's standard streams (1, 2) somebody chose as a file to write."""


def write_text(path: str | Path, text: str) -> None:
    """Write a file as the module says, in UTF-8.

    Raises:
        InputError: the folder does not exist or is not writable, the file is a folder or read-only, the disk is full,
            or nothing reads the pipe.
        BrokenPipeError: the reader of a pipe has gone.
    """
    data = text.encode("utf-8", "backslashreplace")
    try:
        found = _status(path)
        if found is None or (stat.S_ISREG(found.st_mode) and not _leads_to_descriptor(path)):
            _replace(Path(os.path.realpath(path)), data, found)
        else:
            _write_in_place(path, data, found)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def check_output(path: str | Path, option: str) -> None:
    """Raise `InputError` before long work if a file could not be written in the end."""
    target = Path(os.path.realpath(path))
    try:
        found = _status(path)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written: {error.strerror}") from None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise InputError(f"{option} {path}: is a folder; give the name of a file")
    if found is not None and not os.access(path, os.W_OK):
        raise InputError(f"{option} {path}: is read-only; give another name, or make it writable")
    if found is None and not target.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {Path(path).parent} does not exist; make it first")
    if found is None and not os.access(target.parent, os.W_OK):
        raise InputError(f"{option} {path}: the folder {Path(path).parent} is not writable")


def check_apart(wanted: Mapping[str, str | Path | None]) -> None:
    """Raise `InputError` if two of the files, by what names them, are one: the second would replace the first.

    Devices such as ``/dev/null`` keep nothing, and may be named twice.
    """
    seen: dict[str, str] = {}
    for what, path in wanted.items():
        if path is None:
            continue
        with contextlib.suppress(OSError):
            found = _status(path)
            if found is not None and stat.S_ISCHR(found.st_mode):
                continue
        other = seen.setdefault(os.path.realpath(path), what)
        if other != what:
            raise InputError(f"{other} and {what} both write {path}: give each a file of its own")


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of one file that keeps what is written; false where one of them does not exist."""
    try:
        return stat.S_ISREG(os.stat(one).st_mode) and os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def open_lines(path: str | Path, kept: str) -> TextIO:
    """A stream that appends lines to a file which first holds ``kept``, whatever it held before.

    Raises:
        InputError: as of `write_text`.
    """
    found = None
    with contextlib.suppress(OSError):
        found = _status(path)
    if found is None or stat.S_ISREG(found.st_mode):
        write_text(path, kept)
        try:
            return open(path, "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        return os.fdopen(_open_special(path, found), "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _status(path: str | Path) -> os.stat_result | None:
    """The status of what a path leads to; None where there is nothing (a link to nothing included)."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _leads_to_descriptor(path: str | Path) -> bool:
    """Whether a path names an open descriptor (``/dev/stdout``, ``/dev/fd/5``): its file is in use, and is not ours to
    replace."""
    place = os.path.abspath(path)
    for _ in range(40):  # as many links as the kernel follows
        if os.path.realpath(os.path.dirname(place)).startswith("/proc/"):
            return True
        if not os.path.islink(place):
            return False
        place = os.path.join(os.path.dirname(place), os.readlink(place))
    return False


def _replace(target: Path, data: bytes, found: os.stat_result | None) -> None:
    """Write under a temporary name beside the file, then rename; in place where the folder takes no new file."""
    if found is not None and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, "it is read-only")
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:80]}.")
    except PermissionError:
        if found is None:
            raise
        target.write_bytes(data)
        return
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            if found is None:
                os.fchmod(stream.fileno(), 0o666 & ~_umask())
            else:
                with contextlib.suppress(PermissionError):  # only the superuser gives files away
                    os.fchown(stream.fileno(), found.st_uid, found.st_gid)
                os.fchmod(stream.fileno(), stat.S_IMODE(found.st_mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_in_place(path: str | Path, data: bytes, found: os.stat_result) -> None:
    """Write to what is no regular file, or to a descriptor's."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):  # closed, or not a file
            if stream is not None and os.path.samestat(os.fstat(stream.fileno()), found):
                stream.flush()
                WRITTEN.add(stream.fileno())
                _write_all(stream.fileno(), data)
                return
    handle = _open_special(path, found)
    try:
        _write_all(handle, data)
    finally:
        os.close(handle)


def _open_special(path: str | Path, found: os.stat_result) -> int:
    """A descriptor for writing; a named pipe without a reader is asked again for a while."""
    if not stat.S_ISFIFO(found.st_mode):
        return os.open(path, os.O_WRONLY | os.O_NOCTTY)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.ENXIO, f"nothing read the pipe within {PATIENCE_S:g} s") from None
        time.sleep(0.02)


def _write_all(handle: int, data: bytes) -> None:
    """All of the bytes, waiting for a slow reader."""
    left = memoryview(data)
    while left:
        if not select.select([], [handle], [], PATIENCE_S)[1]:
            raise OSError(errno.EAGAIN, f"the reader took nothing for {PATIENCE_S:g} s")
        try:
            left = left[os.write(handle, left[:select.PIPE_BUF]):]
        except BlockingIOError:
            continue
