"""The one place that reads the text of a file and makes data of it: JSON, and YAML for what people write.

A file is data from anywhere, so reading takes bounded time and memory, whatever is in it: no file that never ends, no
nesting beyond `MAX_DEPTH`, no aliases of YAML that multiply; a key given twice is an error (the last would silently
win), and so is a number that is none. What comes out is plain: mappings, lists, text, numbers, true, false, null.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import stat
import time
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from mipipe.graphs.errors import InputError, shown

MAX_BYTES = 2**30
MAX_YAML_BYTES = 8 * 2**20
MAX_DEPTH = 60
MAX_YAML_VALUES = 2_000_000
"""Values of a YAML document with its aliases written out."""
PIPE_S = 30.0
"""How long a pipe may say nothing."""

_MERGE = "tag:yaml.org,2002:merge"


def load_json(text: str, where: str, foreign: bool = False) -> Any:
    """The data of a JSON text; ``where`` (a file) opens the error's message.

    Args:
        foreign: it is another program's file: NaN, infinity and integers beyond 64 bits stay as they are.

    Raises:
        InputError: no JSON, a key given twice, too deeply nested, a number that is none.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise InputError(f"{where}: is nested more than {MAX_DEPTH} deep; expected plain data") from None
    except ValueError as error:
        raise InputError(f"{where}: not readable as JSON: {one_line(error)}") from None
    check_plain(data, where, foreign=foreign)
    return data


def load_yaml(text: str, where: str) -> list[Any]:
    """The documents of a YAML text, without empty ones.

    Raises:
        InputError: no YAML, a key given twice in one mapping (says in which line), aliases that multiply, too deeply
            nested, a number that is none.
    """
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"{where}: has {len(text)} characters of YAML, expected at most {MAX_YAML_BYTES}; write it as"
                         " JSON")
    try:
        found = [item for item in yaml.load_all(text, Loader) if item is not None]
    except RecursionError:
        raise InputError(f"{where}: is nested more than {MAX_DEPTH} deep; expected plain data") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise InputError(f"{where}{line}: not readable as YAML: {one_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:  # e.g. of !!int "x"
        raise InputError(f"{where}: not readable as YAML: {one_line(error)}") from None
    for item in found:
        check_plain(item, where, MAX_YAML_VALUES)
    return found


def check_plain(data: Any, where: str, most: int | None = None, foreign: bool = False) -> None:
    """Raise `InputError` unless data is plain, at most `MAX_DEPTH` deep and of at most ``most`` values."""
    pending: list[tuple[Any, int, object]] = [(data, 0, "top level")]
    count = 0
    while pending:
        item, depth, name = pending.pop()
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: is nested more than {MAX_DEPTH} deep; expected plain data")
        pairs = item.items() if isinstance(item, dict) else ((name, value) for value in item) \
            if isinstance(item, list) else ((name, item),)
        count += len(item) if isinstance(item, (dict, list)) else 1
        if most is not None and count > most:
            raise InputError(f"{where}: its aliases stand for more than {most} values; write out what is meant")
        for key, value in pairs:
            fault = _fault(value, foreign)
            if fault:
                raise InputError(f"{where}: {shown(key, quoted=False)}: found {fault}")
            if isinstance(value, (dict, list)):
                pending.append((value, depth + 1, key))
            named = isinstance(key, int) or (isinstance(key, str) and (foreign or not _controls(key)))
            if isinstance(item, dict) and not named:
                raise InputError(f"{where}: found the key {shown(key)}, expected text or a whole number")


def _fault(value: Any, foreign: bool) -> str:
    """What is wrong with one value, and what was expected; empty where it is plain."""
    if value is None or isinstance(value, (dict, list)):
        return ""
    if isinstance(value, str):
        return f"{shown(value)}, expected text without control characters" if not foreign and _controls(value) else ""
    if isinstance(value, (int, float)):
        return "" if foreign or _is_number(value) else f"{shown(value)}, expected a finite number of at most 64 bits"
    return f"a {type(value).__name__}, expected text, a number, true or false, a list or a mapping"


def _is_number(value: float) -> bool:
    return -2**63 <= value < 2**64 if isinstance(value, int) else math.isfinite(value)


def _controls(text: str) -> bool:
    """Whether text has characters that steer a terminal, or halves of characters, which no file can hold."""
    return not text.isprintable() and any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\r\t"
                                          for letter in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are given once, and can be written again."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is given twice")
    return found


class Loader(yaml.SafeLoader):
    """YAML whose mappings give every key once, without dates, and whose merges (``<<``) do bounded work."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._merged = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {shown(key.value)} is given twice",
                                               problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what ``<<`` names, each part flattened first, so that work is counted before it is done."""
        for key, value in list(node.value):
            if key.tag != _MERGE:
                continue
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(part, yaml.MappingNode):
                    self.flatten_mapping(part)
                    self._merged += 1 + len(part.value)
            if self._merged > MAX_YAML_VALUES // 10:
                raise yaml.MarkedYAMLError(problem=f"merges (<<) of more than {MAX_YAML_VALUES // 10} values",
                                           problem_mark=key.start_mark)
        super().flatten_mapping(node)


_AS_READ_HERE = {
    "int": re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    "float": re.compile(r"([-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
                        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")}
"""Numbers of YAML 1.1 without those that YAML 1.2 reads otherwise: 010 (eight there) and 1:30 (ninety) are texts."""

Loader.yaml_implicit_resolvers = {
    first: [(tag, _AS_READ_HERE.get(tag.rpartition(":")[2], pattern)) for tag, pattern in rules
            if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back: a text such as ``1e5`` gets quotes."""


for _kind in (Loader, Dumper):  # YAML 1.2's floats: YAML 1.1 wants a dot and a signed exponent, and makes texts of 1e-8
    _kind.add_implicit_resolver("tag:yaml.org,2002:float",
                                re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$|[-+]\.[0-9]+$"),
                                list("-+.0123456789"))


def one_line(error: object) -> str:
    """The first line of a message, cut."""
    return shown(next(iter(str(error).strip().splitlines()), ""), quoted=False, most=160)


def read_text(path: str | Path) -> str:
    """The text of a file or pipe, or an `InputError` that says why it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read: not a text file") from None


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a regular file, or of a pipe (a shell's ``<(...)``), at most `MAX_BYTES`.

    Raises:
        InputError: unreadable, a device or folder, too large, or a pipe that says nothing for `PIPE_S`.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise InputError(f"{path}: cannot be read: it is a {'folder' if stat.S_ISDIR(mode) else 'device'}, expected"
                             " a file")
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as stream:
            if stat.S_ISREG(mode):
                data = _read_file(stream)
            else:
                data = _read_pipe(stream.fileno(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null character in the name
        raise InputError(f"{shown(str(path))}: cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: has more than {MAX_BYTES // 2**20} MiB, which no file of this kind has")
    return data


def _read_file(stream: Any) -> bytes:
    """What a file holds, at most one byte more than `MAX_BYTES`: room is made for what is there, and one read may give
    less than was asked for."""
    parts: list[bytes] = []
    size, expected = 0, os.fstat(stream.fileno()).st_size
    while size <= MAX_BYTES:
        part = stream.read(min(MAX_BYTES + 1 - size, max(2**16, expected - size + 1)))
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _read_pipe(handle: int, where: str) -> bytes:
    """What a pipe says until it is closed."""
    parts: list[bytes] = []
    size, deadline = 0, time.monotonic() + PIPE_S
    while size <= MAX_BYTES:
        if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise InputError(f"{where}: cannot be read: the pipe said nothing for {PIPE_S:g} s")
        try:
            part = os.read(handle, 2**16)
        except BlockingIOError:
            continue
        if not part and (parts or time.monotonic() > deadline):
            break
        if part:
            deadline = time.monotonic() + PIPE_S
        else:
            time.sleep(0.02)  # no writer has come yet
        parts += [part] if part else []
        size += len(part)
    return b"".join(parts)
