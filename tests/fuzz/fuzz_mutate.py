"""Mutants of files: structure-aware changes of the data, and damage to the text."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import yaml

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 10**6, 2**31, 2**62, 2**63, 10**30, -2**63, 0.5, -0.5, 1e-300, 1e308, 1e18,
    float("nan"), float("inf"), "", " ", "0", "-1", "nan", "1e9", "x" * 5000, "a.b", "../../../etc/passwd",
    "/etc/passwd", "os:system", "import_module", "torch.ops.import_module", "aten.from_file.default",
    "__import__('os').system('id')",
    "[/bold]", "[red]", "%DATA%", "<!--<script>", "</script>", "\x1b[31m", "a\nb", "\ud800", "0F0", "0F0 0F0", "9F9",
    "(0F1;0B0)OVERLAP_F_B", "1" * 5000 + "F0", [], {}, [[]], [None], [0], ["x"], {"ref": "x"}, {"": ""},
    {"a": {"a": 1}}, [1] * 1000)


def deep(depth: int) -> Any:
    """Lists inside lists."""
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a document."""
    found, pending = [], [data]
    while pending:
        item = pending.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item))
        for key in keys:
            found.append((item, key))
            if isinstance(item[key], (dict, list)):
                pending.append(item[key])
    return found


def mutate(data: Any, chance: random.Random) -> Any:
    """The document with one to three changes of its structure or values."""
    made = copy.deepcopy(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = places(made)
        if not found:
            return chance.choice(NASTY)
        container, key = chance.choice(found)
        _change(made, container, key, found, chance)
    return made


def _change(made: Any, container: Any, key: Any, found: list[tuple[Any, Any]], chance: random.Random) -> None:
    """Change one place: half of the times to something of the same type, which gets further than the type check."""
    value = container[key]
    if chance.random() < 0.55 and value is not None and not isinstance(value, (dict, bool)):
        container[key] = _alike(value, found, chance)
        return
    way = chance.randrange(7)
    if way == 0:
        container[key] = copy.deepcopy(chance.choice(NASTY))
    elif way == 1 and isinstance(container, dict):
        container.pop(key)
        if chance.random() < 0.3:
            container[chance.choice((f"{key}_", "name", "format", key, "x" * 300))] = value
    elif way in (1, 2) and isinstance(container, list):
        if chance.random() < 0.5:
            container.pop(key)
        else:
            container.insert(key, copy.deepcopy(value))
    elif way == 3:
        other, place = chance.choice(found)  # a part of the same document in another place
        container[key] = copy.deepcopy(other[place]) if (isinstance(other, dict) and place in other) or \
            (isinstance(other, list) and place < len(other)) else None
    elif way == 4 and isinstance(container, list):
        chance.shuffle(container)
    elif way == 5:
        container[key] = deep(chance.choice((3, 70, 200)))
    elif isinstance(value, bool):
        container[key] = not value
    else:  # the same key's value elsewhere: another item's name, shape, index
        others = [item[key] for item, place in found if place == key and isinstance(item, dict) and key in item] \
            if isinstance(container, dict) else [copy.deepcopy(chance.choice(NASTY))]
        container[key] = copy.deepcopy(chance.choice(others or [None]))


def _alike(value: Any, found: list[tuple[Any, Any]], chance: random.Random) -> Any:
    """Another number, text or list of the same kind."""
    if isinstance(value, list):
        made = copy.deepcopy(value)
        if made and chance.random() < 0.5:
            made.pop(chance.randrange(len(made)))
        else:
            chance.shuffle(made)
        return made
    if isinstance(value, (int, float)):
        kind = type(value)
        return chance.choice((value + 1, value - 1, 0, 1, 2, 3, value * 2, value * 100, value * 10**6, value * 10**12,
                              kind(value / 3) if abs(value) < 1e300 else value, -value))
    words = [item[place] for item, place in found
             if ((isinstance(item, dict) and place in item) or (isinstance(item, list) and place < len(item)))
             and isinstance(item[place], str)]
    parts = value.split(" ")
    if len(parts) > 2:  # an order of actions
        a, b = chance.randrange(len(parts)), chance.randrange(len(parts))
        near = min(a + 1, len(parts) - 1)
        way = chance.randrange(5)
        if way == 0:
            parts[a], parts[near] = parts[near], parts[a]
        elif way == 1:
            parts[a], parts[b] = parts[b], parts[a]
        elif way == 2:
            parts[a] = parts[b]
        elif way == 3:
            parts.insert(b, parts.pop(a))
        else:
            letters = list(parts[a])
            letters[chance.randrange(len(letters))] = chance.choice("0123FIWBR")
            parts[a] = "".join(letters)
        return " ".join(parts)
    return chance.choice((chance.choice(words or [""]), chance.choice(words or [""]), value + "x", value[:-1]))


def damage(text: str, chance: random.Random) -> bytes:
    """The text cut, with bytes changed, or with something put in."""
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    way = chance.randrange(6)
    if way == 0:
        return bytes(raw[:chance.randrange(len(raw) + 1)])
    if way == 1:
        for _ in range(chance.choice((1, 5, 50))):
            if raw:
                raw[chance.randrange(len(raw))] = chance.randrange(256)
    elif way == 2:
        place = chance.randrange(len(raw) + 1)
        raw[place:place] = chance.choice((b"[" * 50_000, b'{"a":' * 50_000, b"\x00", b"\xff\xfe", b"\r\n", b"NaN",
                                          b"1e999", b"9" * 6000, b'"', b"{", b"}", b",", b"- ", b"&a *a", b"<<: *a",
                                          b"!!python/x y", b"\xef\xbb\xbf", b"---\n", b"\t", b"!!int x"))
    elif way == 3:
        start = chance.randrange(len(raw) + 1)
        raw += raw[start:start + 200]
    elif way == 4 and len(raw) > 2:
        start = chance.randrange(len(raw))
        del raw[start:start + chance.choice((1, 2, 20))]
    else:
        return chance.choice((b"", b"null", b"[]", b"{}", b"0", b'"x"', b"\x80", b"a: &a [*a]", b"{" * 10, BOMB))
    return bytes(raw)


BOMB = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12))
"""Nine times nine times nine ...: 3e10 values by aliases."""


def write_json(data: Any) -> bytes:
    """As JSON, whatever is in it."""
    return json.dumps(data).encode("utf-8", "surrogatepass")


def write_yaml(data: Any) -> bytes:
    """As YAML, whatever is in it."""
    try:
        return str(yaml.safe_dump(data, sort_keys=False)).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return write_json(data)
