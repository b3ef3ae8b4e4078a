"""The texts of a calibration as rows of token ids."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.converting.recipe import Calibration
from mipipe.graphs.errors import InputError
from mipipe.graphs.named_code import import_named, is_named_code
from mipipe.graphs.read_files import load_json

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def token_rows(calibration: Calibration, folder: str, vocabulary: int, allowed: Collection[str] = ()) -> Tensor:
    """Rows of token ids [samples, length], fewer where the text is short; the same for the same text.

    Args:
        folder: the model whose tokenizer reads the text.
        vocabulary: token ids are below it.
        allowed: loaders that whoever converts has named.

    Raises:
        InputError: no such file, too little text, no tokenizer, ids beyond the vocabulary, a loader nobody named.
    """
    where, length = f"calibration: {calibration.data}", calibration.length
    if is_named_code(calibration.data) and not Path(calibration.data).exists():
        if calibration.data not in allowed:
            raise InputError(f"{where}: a recipe calls no code; name the loader on the command line too (--loader"
                             f" {calibration.data})")
        rows = _given(import_named(calibration.data)(calibration.samples, length), where)
    else:
        ids = torch.tensor(_ids(_text(Path(calibration.data), where), folder, vocabulary, where), dtype=torch.int64)
        pieces = len(ids) // length
        if not pieces:
            raise InputError(f"{where}: has {len(ids)} tokens, expected at least one sample of {length}")
        count = min(pieces, calibration.samples)
        starts = [place * pieces // count * length for place in range(count)]
        rows = torch.stack([ids[start:start + length] for start in starts])
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"{where}: has the token {high if high >= vocabulary else low}, expected 0 to"
                         f" {vocabulary - 1}, as the model has")
    return rows[:calibration.samples]


def _given(found: Any, where: str) -> Tensor:
    try:
        rows = torch.as_tensor(found, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        rows = torch.empty(0)
    if rows.ndim != 2 or not rows.numel():
        raise InputError(f"{where}: returned a {type(found).__name__} of no rows of token ids, expected [samples,"
                         " length]")
    return rows


def _text(path: Path, where: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise InputError(f"{where}: {reason}; expected a text or JSONL file, or package.module:loader") from None
    if path.suffix not in (".jsonl", ".ndjson"):
        return text
    parts = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = load_json(line, f"{where}, line {number}", foreign=True) if line.strip() else {"text": ""}
        part = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(part, str):
            raise InputError(f"{where}, line {number}: found {json.dumps(entry)[:80]}, expected a mapping with a text")
        parts.append(part)
    return "\n".join(parts)


def _ids(text: str, folder: str, vocabulary: int, where: str) -> list[int]:
    if any((Path(folder) / name).exists() for name in TOKENIZER):
        from transformers import AutoTokenizer
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"{where}: the tokenizer of {folder} cannot be loaded ({str(error).splitlines()[0]})"
                             ) from None
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if vocabulary < 256:
        raise InputError(f"{where}: {folder} has no tokenizer, and {vocabulary} tokens are too few for bytes; give"
                         " package.module:loader, which returns token ids")
    return list(text.encode())
