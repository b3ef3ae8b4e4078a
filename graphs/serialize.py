"""Reading and writing mipipe's files: JSON with ``format`` and ``version``, YAML for what people write.

A type that is saved is a dataclass with the class attributes ``FORMAT`` and ``VERSION``; pydantic validates what is
read against its annotations, so an unknown key or a wrong type is an error that names its place in the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mipipe.graphs.errors import InputError

STRICT = ConfigDict(extra="forbid")
"""Set as ``__pydantic_config__`` on every dataclass that is read from a file: unknown keys are errors."""


class Saved(Protocol):
    """A dataclass that is saved as a file of its own."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]


T = TypeVar("T")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_data(value: Any) -> Any:
    """The plain JSON data (dicts, lists, strings, numbers) of a dataclass."""
    kind: Any = type(value)
    return _adapter(kind).dump_python(value, mode="json")


_UNKNOWN = {"extra_forbidden": "unknown key", "unexpected_keyword_argument": "unknown key"}
"""Pydantic's types of errors for a key that no field has, in the user's words."""
_WORDS = {**_UNKNOWN, "tuple_type": "expected a list", "list_type": "expected a list",
          "dict_type": "expected a mapping", "dataclass_type": "expected a mapping",
          "dataclass_exact_type": "expected a mapping", "int_parsing": "expected a whole number",
          "int_type": "expected a whole number", "float_parsing": "expected a number",
          "float_type": "expected a number", "bool_parsing": "expected true or false",
          "bool_type": "expected true or false", "string_type": "expected text"}
"""Pydantic's types of errors in the user's words; of the others its own message is shown."""


def from_data(data: Any, kind: type[T], where: str) -> T:
    """A ``kind`` validated from plain data; ``where`` (a file, an option) opens the error message."""
    try:
        return _adapter(cast(Any, kind)).validate_python(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)  # a mistyped key explains the one that is missing
        first = next((item for item in errors if item["type"] in _UNKNOWN), errors[0])
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        found = "" if isinstance(first["input"], (dict, list)) else f" (found {first['input']!r})"
        more = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise InputError(f"{where}: {place or 'top level'}: {_WORDS.get(first['type'], first['msg'])}"
                         f"{found}{more}") from None


def digest(value: Any) -> str:
    """The SHA-256 of a dataclass's canonical JSON, 16 hex digits: ties plans to problems and problems to graphs."""
    text = json.dumps(to_data(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(value: Saved, path: str | Path) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    data = {"format": value.FORMAT, "version": value.VERSION, **to_data(value)}
    write_text(path, json.dumps(data, separators=(",", ":")) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically: under a temporary name beside it, then renamed.

    Raises:
        InputError: the folder does not exist or is not writable, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def load(path: str | Path, kind: type[T]) -> T:
    """Read a file written by `save`.

    Raises:
        InputError: unreadable, no JSON, another format or version, an unknown key or a wrong type.
    """
    data = load_data(path)
    check_header(data, kind.FORMAT, kind.VERSION, str(path))  # type: ignore[attr-defined]
    return from_data({key: item for key, item in data.items() if key not in ("format", "version")}, kind, str(path))


def load_data(path: str | Path) -> dict[str, Any]:
    """The top-level mapping of a JSON or YAML file, by its ending."""
    if str(path).endswith((".yaml", ".yml")):
        documents = yaml_documents(path)
        if len(documents) > 1:
            raise InputError(f"{path}: found {len(documents)} documents, expected one; remove the lines of ---")
        data = documents[0] if documents else None
    else:
        try:
            data = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: found a {type(data).__name__} at the top level, expected a mapping")
    return data


class _Loader(yaml.SafeLoader):
    """YAML whose mappings give every key once (the last of two would silently win), with YAML 1.2's floats: ``1e-8``
    and ``3.0e4`` are numbers, where YAML 1.1 wants a dot and a signed exponent and makes texts of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice",
                                               problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a text such as ``1e5`` gets quotes."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float",
                                re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
                                list("-+.0123456789"))


def yaml_text(data: Any) -> str:
    """Plain data as YAML, in its own order."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def yaml_value(text: str) -> Any:
    """The value that a text stands for in our YAML files, such as an option's ``true`` or ``1e-8``.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def yaml_documents(path: str | Path) -> list[Any]:
    """The documents of a YAML file, without empty ones.

    Raises:
        InputError: unreadable, no YAML, a key given twice in one mapping; says in which line.
    """
    try:
        return [item for item in yaml.load_all(read_text(path), _Loader) if item is not None]
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise InputError(f"{path}{line}: not readable as YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from None


def read_text(path: str | Path) -> str:
    """The text of a file, or an `InputError` that says why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read: not a text file") from None


def check_header(data: dict[str, Any], expected: str, version: int, where: str) -> None:
    """Raise `InputError` unless ``data`` carries the expected ``format`` and ``version``."""
    if data.get("format") != expected:
        found = data.get("format", "no format at all")
        raise InputError(f"{where}: found {found!r}, expected a file of format {expected!r}")
    if data.get("version") != version:
        raise InputError(f"{where}: {expected} version {data.get('version')!r}, but this mipipe reads version"
                         f" {version}; write the file again with this version of mipipe")
