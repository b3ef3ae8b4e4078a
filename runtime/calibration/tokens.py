"""Samples of token ids from a text file, a JSONL file, or a loader that the person who merges has named.

Of a text, windows of consecutive tokens are drawn; of a JSONL file, lines. Which ones depends on the seed alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.models.configuration import first_line
from mipipe.graphs.named_code import import_named, is_named_code
from mipipe.graphs.read_files import load_json

Ids = npt.NDArray[np.int32]
BY_TOKENS = "; give a JSONL file with tokens in every line"
"""What to do without a tokenizer."""
LETTERS = 24
"""Letters read for every token wanted: more than tokens of any usual vocabulary have on average."""


@dataclass(frozen=True)
class Samples:
    """Token ids ``[samples, length]``, padded with zeros on the right, and how many of every row are real."""

    ids: Ids
    lengths: Ids

    @property
    def digest(self) -> str:
        data = self.ids.tobytes() + self.lengths.tobytes() + str(self.ids.shape).encode()
        return hashlib.sha256(data).hexdigest()[:16]

    def save(self, path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, ids=self.ids, lengths=self.lengths)

    @classmethod
    def load(cls, path: Path) -> Samples:
        with np.load(path, allow_pickle=False) as found:
            return cls(found["ids"], found["lengths"])


def draw_samples(source: str, tokenizer_folder: str, samples: int, length: int, seed: int, vocabulary: int,
                 allowed: Collection[str] = (), where: str = "calibration") -> Samples:
    """At most ``samples`` samples of at most ``length`` tokens.

    Args:
        source: a file, or ``package.module:loader``, a function that returns texts or lists of token ids.
        tokenizer_folder: the model whose tokenizer is used.
        vocabulary: token ids are below it.
        allowed: the loaders that the person who merges has named.

    Raises:
        InputError: no such file, no text in it, no tokenizer, tokens beyond the vocabulary, a loader nobody named.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    if is_named_code(source) and not Path(source).exists():
        if source not in allowed:
            raise InputError(f"{where}: data: a recipe calls no code; name the loader on the command line too (--loader"
                             f" {source})")
        # runs code of the person who merges: named by --loader or MergeOptions, not by the recipe alone
        rows = _of_items(import_named(source)(), tokenizer_folder, f"{where}: {source}", samples)
    elif not Path(source).is_file():
        raise InputError(f"{where}: data: {source}: no such file; expected a text or JSONL file, or"
                         " package.module:loader")
    elif Path(source).suffix in (".jsonl", ".ndjson"):
        lines = _lines(Path(source), where)
        chosen = sorted(generator.permutation(len(lines))[:samples])
        rows = _of_items([lines[number] for number in chosen], tokenizer_folder, f"{where}: {source}", samples)
    else:
        rows = _of_text(Path(source), tokenizer_folder, samples, length, generator, where)
    rows = [row[:length] for row in rows if len(row) > 1]
    if not rows:
        raise InputError(f"{where}: data: {source}: has no sample of two tokens or more")
    return _padded(rows, source, vocabulary, where)


def _padded(rows: Sequence[Sequence[int]], source: str, vocabulary: int, where: str) -> Samples:
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int32)
    for number, row in enumerate(rows):
        if min(row) < 0 or max(row) >= vocabulary:
            found = max(row) if max(row) >= vocabulary else min(row)
            raise InputError(f"{where}: data: {source}: has the token {found},"
                             f" expected 0 to {vocabulary - 1}, as the models have")
        ids[number, :len(row)] = row
    return Samples(ids, lengths)


def load_tokenizer(folder: str | Path, where: str = "", hint: str = "") -> Any:
    """The tokenizer of a model's folder.

    Args:
        where: opens the error; ``hint`` ends it.

    Raises:
        InputError: there is none that transformers loads without code of the folder.
    """
    from transformers import AutoTokenizer
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not _encode(found, "any text, 1"):  # what transformers makes of a folder without a tokenizer's files
            raise ValueError("it makes no tokens of a text")
        return found
    except Exception as error:
        raise InputError(f"{where}{folder} has no tokenizer that can be loaded ({first_line(error)}){hint}") from None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _of_text(path: Path, folder: str, samples: int, length: int, generator: np.random.Generator,
             where: str) -> list[list[int]]:
    """Windows of a text: of all of it where it is short, else each from the start of a line drawn at random."""
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: data: {path}: is no UTF-8 text (byte {error.start})") from None
    tokenizer = load_tokenizer(folder, f"{where}: data: ", BY_TOKENS)
    if len(text) <= samples * length * LETTERS:
        tokens = _encode(tokenizer, text)
        windows = [tokens[start:start + length] for start in range(0, len(tokens), length)]
        full = [window for window in windows if len(window) == length] or windows
        return [full[number] for number in sorted(generator.permutation(len(full))[:samples])]
    starts = sorted(int(start) for start in generator.integers(0, len(text) - length * LETTERS, samples))
    return [_encode(tokenizer, text[text.find("\n", start) + 1:][:length * LETTERS])[:length] for start in starts]


def _lines(path: Path, where: str) -> list[Any]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                found.append(load_json(line, f"{path}, line {number}", foreign=True))
            except InputError as error:
                raise InputError(f"{where}: data: {error}") from None
    return found


def _of_items(items: Iterable[Any], folder: str, where: str, samples: int) -> list[list[int]]:
    """Token ids of texts, of prompts with responses, or as they are given."""
    tokenizer: Any = None
    rows: list[list[int]] = []
    for number, item in enumerate(items, 1):
        if len(rows) == samples:
            break
        given = item.get("tokens", item.get("input_ids")) if isinstance(item, dict) else item
        if isinstance(given, (list, tuple, np.ndarray)) and all(isinstance(token, (int, np.integer))
                                                                for token in given):
            rows.append([int(token) for token in given])
            continue
        text = item if isinstance(item, str) else _text_of(item)
        if text is None:
            raise InputError(f"{where}: sample {number}: found {shown(json.dumps(item, default=str))}, expected a text,"
                             " or a mapping with text, prompt and response, or tokens")
        tokenizer = tokenizer or load_tokenizer(folder, f"{where}: data: ", BY_TOKENS)
        rows.append(_encode(tokenizer, text))
    return rows


def _text_of(item: Any) -> str | None:
    if not isinstance(item, dict):
        return None
    parts = [item[key] for key in ("text", "prompt", "response") if isinstance(item.get(key), str)]
    return "".join(parts) if parts else None
