"""Vocabularies of different models joined: which row of whose table holds each token of the output.

The output's first tokens are the base's with their ids. The union appends the added tokens that only others have, then
rows for their ordinary ones: these are no tokens of its tokenizer, because an added token is found before the base's
own rules apply, so that the base's text would change. Tokenizers are read from ``tokenizer.json``, without any
tokenizer library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.serialize import STRICT, load_data

MAX_TOKENS = 2**24
"""Ids are rows of a table; the largest vocabularies have a million."""


@dataclass(frozen=True, slots=True)
class GivenRow:
    """A row that models without it (or all: ``force``) take from row ``origin`` of ``model``; -1 for a row of zeros."""

    __pydantic_config__: ClassVar = STRICT
    row: int
    model: int
    origin: int = 0
    force: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of the output's token tables. ``rows[model][row]`` is that model's row for it, or -1.

    ``size`` rows in all; ``added`` are tokens that the base lacks, other models' added ones or the recipe's, with their
    ids. ``given``: rows whose origin the recipe names.
    """

    __pydantic_config__: ClassVar = STRICT
    size: int
    rows: tuple[tuple[int, ...], ...]
    added: tuple[tuple[str, int], ...] = ()
    given: tuple[GivenRow, ...] = ()


def read_tokens(folder: str) -> dict[str, int]:
    """Token -> id of a model's tokenizer.

    Raises:
        InputError: the folder has no ``tokenizer.json``, or one without a vocabulary.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{folder}: has no tokenizer.json, which joining vocabularies needs")
    data = load_data(path, foreign=True)
    model, added = data.get("model"), data.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]]
    if isinstance(vocabulary, list):  # (token, score) by id
        pairs = [(entry[0] if isinstance(entry, list) and entry else None, index)
                 for index, entry in enumerate(vocabulary)]
    elif isinstance(vocabulary, dict):
        pairs = list(vocabulary.items())
    else:
        raise InputError(f"{path}: has no vocabulary (model.vocab)")
    if not isinstance(added, list):
        raise InputError(f"{path}: added_tokens is a {type(added).__name__}, expected a list")
    pairs += [(entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None) for entry in added]
    for token, index in pairs:
        if not isinstance(token, str) or type(index) is not int or not 0 <= index < MAX_TOKENS:
            raise InputError(f"{path}: found the token {shown(token)} with the id {shown(index)}, expected text and"
                             f" an id from 0 to {MAX_TOKENS - 1}")
    return dict(pairs)


def added_entries(folder: str) -> dict[str, dict[str, Any]]:
    """The entries of a tokenizer's added tokens by their text; empty without a ``tokenizer.json``."""
    path = Path(folder) / "tokenizer.json"
    entries = load_data(path, foreign=True).get("added_tokens") or [] if path.exists() else []
    return {entry["content"]: entry for entry in entries if isinstance(entry, dict) and
            isinstance(entry.get("content"), str)}


def next_added(folder: str) -> int:
    """The id that a tokenizer gives to the next token added to it, whatever its file says.

    As Hugging Face's tokenizers: one more than the last added token's, but no less than the vocabulary has tokens.
    Where a vocabulary leaves ids out this is not beyond its last.
    """
    data = load_data(Path(folder) / "tokenizer.json", foreign=True)
    size = len(data["model"]["vocab"])
    added = [entry["id"] for entry in added_entries(folder).values()]
    return max([size, *(index + 1 for index in added)])


def join(tokens: Sequence[dict[str, int]], sizes: Sequence[int], main: int, union: bool,
         multiple_of: int | None, extra: Sequence[Mapping[str, Any]] = (), wanted: Iterable[str] = (),
         first: int | None = None) -> Vocabulary:
    """The output's rows for each model.

    Args:
        tokens: token -> id of every model.
        sizes: rows of every model's table (tables may be padded beyond the vocabulary).
        main: the model whose ids are kept.
        union: append the tokens that only other models have.
        multiple_of: pad the table to a multiple of this.
        extra: the added tokens of every model.
        wanted: tokens that the output has in any case.
        first: the id of the first token that is added (`next_added`); else the first that is free after all.

    Raises:
        InputError: the main tokenizer would give an added token the id of another.
    """
    slots: dict[str, int] = dict(tokens[main])
    added: list[tuple[str, int]] = []
    last = max(tokens[main].values()) + 1
    following, taken = last if first is None else first, set(tokens[main].values())
    added_there = [token for index, other in enumerate(tokens) if union
                   for token in sorted(other, key=lambda text, other=other: (other[text], text))  # type: ignore[misc]
                   if token in (extra[index] if extra else {})]
    for token in (*added_there, *wanted):  # first of all: a tokenizer numbers them on from its vocabulary
        if token in slots:
            continue
        if following in taken:
            holder = next(text for text, index in tokens[main].items() if index == following)
            raise InputError(f"tokenizer: the token {shown(token)} would be added with the id {following}, which"
                             f" {shown(holder)} has: the vocabulary leaves ids out")
        slots[token] = following
        added.append((token, following))
        following += 1
    size = max(last, following)
    for other in tokens if union else ():
        for token in sorted(other, key=lambda text, other=other: (other[text], text)):  # type: ignore[misc]
            if token not in slots:
                slots[token] = size
                size += 1
    size = max(size, sizes[main])
    if multiple_of:
        size = -(-size // multiple_of) * multiple_of
    rows = []
    for index, other in enumerate(tokens):
        mapped = [-1] * size
        for token, slot in slots.items():
            row = other.get(token, -1)
            mapped[slot] = row if row < sizes[index] else -1
        rows.append(mapped)
    named = set(slots.values())
    for slot in range(size):  # padding rows of the main table keep their values
        if slot not in named and slot < sizes[main]:
            rows[main][slot] = slot
    return Vocabulary(size, tuple(map(tuple, rows)), tuple(added))


def union_tokenizer(folder: str, added: Sequence[tuple[str, int]], folders: Sequence[str] = ()) -> str:
    """The main model's ``tokenizer.json`` with the union's further added tokens.

    Args:
        folders: of the models, whose first that has a token says what it is (special, stripping, normalized).
    """
    data = load_data(Path(folder) / "tokenizer.json", foreign=True)
    entries = data.setdefault("added_tokens", [])
    known: dict[str, dict[str, Any]] = {}
    for other in reversed(folders):
        known |= added_entries(other)
    for token, index in added:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        entries.append({**plain, **known.get(token, {}), "id": index, "content": token})
    return json.dumps(data, ensure_ascii=False, indent=2)
