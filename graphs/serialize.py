"""Reading and writing mipipe's files: JSON with ``format`` and ``version``, YAML for what people write.

A type that is saved is a dataclass with the class attributes ``FORMAT`` and ``VERSION``; pydantic validates what is
read against its annotations, so an unknown key or a wrong type is an error that names its place in the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, cast

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError, SchemaValidator, core_schema

from mipipe.graphs.errors import InputError, MipipeError, shown
from mipipe.graphs.read_files import Dumper, load_json, load_yaml
from mipipe.graphs.read_files import read_text as read_text
from mipipe.graphs.write_files import write_text as write_text

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Set as ``__pydantic_config__`` on every dataclass that is read from a file: unknown keys are errors, and so are
numbers that are none."""

Amount = Annotated[int, Field(ge=0, le=2**62)]
"""An integer of a file that counts something (bytes, nanoseconds, operations)."""
Count = Annotated[int, Field(ge=1, le=2**31)]
"""An integer of a file of which there is at least one."""
MOST_SUMMED = 1e15
"""The largest number of a file that is summed in floating point: beyond it, sums lose the small ones."""


class Saved(Protocol):
    """A dataclass that is saved as a file of its own."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]


T = TypeVar("T")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@functools.cache
def _reader(kind: Any) -> SchemaValidator:
    """Pydantic's validator of a kind, for which a number is a number: no text (``010`` would be ten, and is eight in
    one version of YAML), and no ``true`` or ``on`` (which would be one). Keys of mappings are texts in JSON."""
    return SchemaValidator(_of_numbers(_adapter(kind).core_schema))


def _of_numbers(schema: Any, key: bool = False) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_of_numbers(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    made = {name: _of_numbers(value, name == "keys_schema") if name not in ("metadata", "cls", "config") else value
            for name, value in schema.items()}
    if schema.get("type") in ("int", "float"):
        check = _whole_key if key else _NUMBERS[schema["type"]]
        return core_schema.no_info_before_validator_function(check, cast(Any, made))
    return made


def _number(error: Any, value: Any) -> Any:
    if isinstance(value, bool | str):
        raise PydanticKnownError(error)
    return value


def _whole_key(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and not (value.isdecimal() and str(int(value)) == value)):
        raise PydanticKnownError("int_type")
    return value


_NUMBERS: dict[str, Any] = {"int": functools.partial(_number, "int_type"),
                            "float": functools.partial(_number, "float_type")}


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
          "bool_type": "expected true or false", "string_type": "expected text",
          "greater_than_equal": "expected at least {ge}", "less_than_equal": "expected at most {le}"}
"""Pydantic's types of errors in the user's words; of the others its own message is shown."""


def from_data(data: Any, kind: type[T], where: str) -> T:
    """A ``kind`` validated from plain data; ``where`` (a file, an option) opens the error message."""
    try:
        found: T = _reader(cast(Any, kind)).validate_python(data)
        if hasattr(found, "check_read"):  # rules of files that what is made in memory may lack for a while
            found.check_read()
        return found
    except ValidationError as error:
        raise InputError(_explained(error, where)) from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply") from None
    except MipipeError as error:  # of a dataclass's own rules
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from None


def _explained(error: ValidationError, where: str) -> str:
    """The first of the errors in one line, or all unknown keys: a mistyped one explains the one that is missing."""
    errors = error.errors(include_url=False)
    unknown = list(dict.fromkeys(_place(item["loc"]) for item in errors if item["type"] in _UNKNOWN))
    if len(unknown) > 1:
        return f"{where}: {', '.join(shown(place, quoted=False) for place in unknown)}: unknown keys"
    first = next((item for item in errors if item["type"] in _UNKNOWN), errors[0])
    place = _place(first["loc"])
    found = "" if isinstance(first["input"], (dict, list)) else f" (found {shown(first['input'])})"
    missing = list(dict.fromkeys(_place(item["loc"]) for item in errors if item["type"] == "missing"))
    more = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
    if first["type"] in _UNKNOWN and missing:  # perhaps what was meant
        more = f"; missing: {', '.join(shown(item, quoted=False) for item in missing)}"
    expected = _WORDS.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
    return f"{where}: {shown(place, quoted=False) or 'top level'}: {expected}{found}{more}"


def _place(location: tuple[int | str, ...]) -> str:
    """Where in a file: ``hosts[0].links``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def digest(value: Any) -> str:
    """The SHA-256 of a dataclass's canonical JSON, 16 hex digits: ties plans to problems and problems to graphs.

    Fields that the class names in ``DERIVED`` follow from the others and are left out, as are those in ``OPTIONAL``
    where there is nothing in them.
    """
    left_out = {*getattr(value, "DERIVED", ()), *_empty(value, "OPTIONAL")}
    data = {key: item for key, item in to_data(value).items() if key not in left_out}
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _empty(value: Any, names: str) -> set[str]:
    return {name for name in getattr(value, names, ()) if getattr(value, name) is None}


def save(value: Saved, path: str | Path) -> None:
    """Write ``value`` as JSON, whole or not at all; fields in ``DERIVED`` and ``OPTIONAL`` only where they hold
    something."""
    empty = {*_empty(value, "DERIVED"), *_empty(value, "OPTIONAL")}
    data = {"format": value.FORMAT, "version": value.VERSION,
            **{key: item for key, item in to_data(value).items() if key not in empty}}
    write_text(path, json.dumps(data, separators=(",", ":")) + "\n")


def load(path: str | Path, kind: type[T]) -> T:
    """Read a file written by `save`.

    Raises:
        InputError: unreadable, no JSON, another format or version, an unknown key or a wrong type.
    """
    data = load_data(path)
    check_header(data, kind.FORMAT, kind.VERSION, str(path))  # type: ignore[attr-defined]
    return from_data({key: item for key, item in data.items() if key not in ("format", "version")}, kind, str(path))


def load_data(path: str | Path, foreign: bool = False) -> dict[str, Any]:
    """The top-level mapping of a JSON or YAML file, by its ending; ``foreign`` as of `load_json`."""
    if str(path).endswith((".yaml", ".yml")):
        documents = yaml_documents(path)
        if len(documents) > 1:
            raise InputError(f"{path}: found {len(documents)} documents, expected one; remove the lines of ---")
        data = documents[0] if documents else None
    else:
        data = load_json(read_text(path), str(path), foreign)
    if not isinstance(data, dict):
        raise InputError(f"{path}: found a {type(data).__name__} at the top level, expected a mapping")
    return data


def yaml_text(data: Any) -> str:
    """Plain data as YAML, in its own order."""
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def yaml_value(text: str) -> Any:
    """The value that a text stands for in our YAML files, such as an option's ``true`` or ``1e-8``.

    Raises:
        InputError: it is no YAML, or more than one value.
    """
    found = load_yaml(text, shown(text))
    if len(found) > 1:
        raise InputError(f"{shown(text)}: expected one value")
    return found[0] if found else None


def yaml_documents(path: str | Path) -> list[Any]:
    """The documents of a YAML file, without empty ones; errors as of `load_yaml`."""
    return load_yaml(read_text(path), str(path))


def check_header(data: dict[str, Any], expected: str, version: int, where: str) -> None:
    """Raise `InputError` unless ``data`` carries the expected ``format`` and ``version``."""
    if data.get("format") != expected:
        found = data.get("format", "no format at all")
        raise InputError(f"{where}: found {shown(found)}, expected a file of format {expected!r}")
    if data.get("version") != version:
        raise InputError(f"{where}: {expected} version {shown(data.get('version'))}, but this mipipe reads version"
                         f" {version}; write the file again with this version of mipipe")
