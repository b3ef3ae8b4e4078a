"""Distributions of two models of different tokenizers, fused for training one of them (FuseChat, arXiv 2408.07990).

`make_fused` runs the pivot and a source over dialogues and keeps, for every token of a response, the better informed
one's most likely tokens in the pivot's vocabulary; `FusedRows` gives them to a run with the loss ``fuse``. A folder
holds ``fused.safetensors``: input_ids and labels [N,S], fused_ids and fused_probs [N,S,K] at the place of the token
that they predict, and ``fused.json``: what it was made of.

Of a response that distribution is taken whose model gives it the larger probability as a whole. The authors compare
mean losses of tokens, which different tokenizers make incomparable.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.operators.vocabulary import IGNORED
from mipipe.graphs.read_files import load_json, read_text
from mipipe.graphs.recipes.rows import batch_inputs
from mipipe.runtime.calibration.tokens import load_tokenizer
from mipipe.runtime.engine.batches import Batch
from mipipe.runtime.recipes.alignment import (
    Distribution,
    align,
    carry,
    count_pairs,
    match_vocabulary,
    pieces,
    shares,
    source_place,
)
from mipipe.runtime.recipes.tables import read_tables

TENSORS, FACTS = "fused.safetensors", "fused.json"


@dataclass(frozen=True, slots=True)
class _Read:
    """A text as a model reads it: tokens, their pieces, the first token of the response, the most likely tokens and
    their logits at the place of every token, and the response's loss in nats."""

    ids: list[int]
    pieces: list[str]
    first: int
    top_ids: list[list[int]]
    top_logits: list[list[float]]
    loss: float


def make_fused(pivot: str | Path, source: str | Path, texts: str | Path, out: str | Path, *, samples: int | None = None,
               length: int = 512, top: int = 10) -> dict[str, Any]:
    """Write a folder of fused rows; what it was made of.

    Args:
        pivot, source: folders of causal language models with fast tokenizers.
        texts: a JSONL file with ``text``, or ``prompt`` and ``response``, in every line.
        samples: how many lines; None: all.
        length: of a row, in tokens of the pivot; what is longer is cut.
        top: entries of a distribution that are kept.

    Raises:
        InputError: a model, a tokenizer or a line that is none, or ``out`` exists.
    """
    folder = Path(out)
    for name, value, least in (("samples", samples, 1), ("length", length, 2), ("top", top, 1)):
        if value is not None and value < least:
            raise InputError(f"make_fused: {name}: found {value}, expected at least {least}")
    if folder.exists():
        raise InputError(f"{folder}: exists already; give another folder, or remove it")
    dialogues = _dialogues(Path(texts))[:samples]
    tokenizers = _tokenizer(Path(pivot)), _tokenizer(Path(source))
    read = [_read_all(Path(given), tokenizer, dialogues, length, top)
            for given, tokenizer in zip((pivot, source), tokenizers, strict=True)]
    counts: Counter[tuple[int, int]] = Counter()
    alignments = [align(one.pieces, other.pieces)[0] for one, other in zip(*read, strict=True)]
    for one, other, alignment in zip(*read, alignments, strict=True):
        count_pairs(counts, one.ids, other.ids, alignment)
    same, matched, unknown = _vocabularies(tokenizers, counts)
    rows = [_fused(one, other, alignment, same, matched, unknown)
            for one, other, alignment in zip(*read, alignments, strict=True)]
    if not any(len(one.ids) > one.first for one in read[0]):
        raise InputError(f"{texts}: no response is left of rows of {length} tokens; give a larger length")
    facts = {"pivot": str(pivot), "source": str(source), "texts": str(texts), "rows": len(rows), "top": top,
             "rows_of_the_source": sum(other.loss < one.loss for one, other in zip(*read, strict=True)),
             "tokens": sum(len(one.ids) - one.first for one in read[0]),
             "tokens_without_a_match": sum(lost for _, lost in rows)}
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(read[0], [row for row, _ in rows], top), partial / TENSORS)
    (partial / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    os.rename(partial, folder)
    return facts


def _dialogues(path: Path) -> list[tuple[str, str]]:
    """(prompt, response) of every line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        item = load_json(line, f"{path}, line {number}", foreign=True)
        given = item if isinstance(item, dict) else {}
        texts = [text for key in ("prompt", "response", "text") if isinstance(text := given.get(key, ""), str)]
        if len(texts) < 3 or not (texts[1] or texts[2]):
            raise InputError(f"{path}, line {number}: expected text, or prompt and response")
        found.append((texts[0], texts[1] or texts[2]))
    if not found:
        raise InputError(f"{path}: has no text")
    return found


def _tokenizer(folder: Path) -> Any:
    found = load_tokenizer(folder)
    if not getattr(found, "is_fast", False):
        raise InputError(f"{folder}: its tokenizer does not say where tokens lie in a text (it is no fast one)")
    return found


def _read_all(folder: Path, tokenizer: Any, dialogues: Sequence[tuple[str, str]], length: int, top: int) -> list[_Read]:
    """Every dialogue as a model reads it; one model is in memory at a time."""
    from mipipe.runtime.calibration.whole_model import load_model
    model = load_model(folder)
    return [_read(model, tokenizer, prompt, response, length, top) for prompt, response in dialogues]


@torch.no_grad()
def _read(model: Any, tokenizer: Any, prompt: str, response: str, length: int, top: int) -> _Read:
    made = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = list(made["input_ids"])[:length], [end for _, end in made["offset_mapping"]][:length]
    first = max(1, sum(end <= len(prompt) for end in ends))  # of the first token there is no distribution
    if len(ids) < 2:
        return _Read(ids, pieces(tokenizer, ids), len(ids), [[] for _ in ids], [[] for _ in ids], 0.0)
    known = model.get_input_embeddings().num_embeddings
    if max(ids) >= known:
        raise InputError(f"{model.name_or_path}: its tokenizer has the token {max(ids)}, its embedding {known} rows")
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    best = logits.topk(min(top, logits.shape[-1]))
    return _Read(ids, pieces(tokenizer, ids), min(first, len(ids)), [[], *best.indices.tolist()],
                 [[], *best.values.tolist()], float(losses[first - 1:].double().sum()))


def _vocabularies(tokenizers: tuple[Any, Any],
                  counts: Counter[tuple[int, int]]) -> tuple[dict[int, int], dict[int, int], int]:
    """Source tokens as the pivot's: by the same text, by what was aligned, and for the rest."""
    pivot, source = tokenizers
    texts = [dict(enumerate(pieces(tokenizer, range(len(tokenizer))))) for tokenizer in tokenizers]
    by_text: dict[str, int] = {}
    for token, text in texts[0].items():
        by_text.setdefault(text, token)
    same = {token: by_text[text] for token, text in texts[1].items() if text in by_text}
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(pivot, name) is not None and getattr(source, name) is not None:
            same[getattr(source, name)] = getattr(pivot, name)
    unknown = next((token for token in (pivot.unk_token_id, pivot.eos_token_id) if token is not None), 0)
    return same, match_vocabulary(counts, *texts), unknown


def _fused(pivot: _Read, source: _Read, alignment: Sequence[Sequence[int]], same: dict[int, int],
           matched: dict[int, int], unknown: int) -> tuple[list[Distribution], int]:
    """A distribution for every token of the pivot's response, and how many tokens had no match in the source."""
    found: list[Distribution] = []
    lost = 0
    for place in range(len(pivot.ids)):
        if place < pivot.first:
            found.append(([], []))
        elif pivot.loss <= source.loss:
            found.append((pivot.top_ids[place], shares(pivot.top_logits[place])))
        else:
            step = source_place(alignment[place], pivot.pieces[place], source.pieces)
            if step is None or not source.top_ids[step]:
                found.append(([pivot.ids[place]], [1.0]))
                lost += 1
            else:
                found.append(carry(source.top_ids[step], source.top_logits[step], same, matched, unknown))
    return found, lost


def _tensors(read: Sequence[_Read], rows: Sequence[Sequence[Distribution]], top: int) -> dict[str, Tensor]:
    sizes = len(read), max(len(one.ids) for one in read)
    ids, labels = torch.zeros(sizes, dtype=torch.int64), torch.full(sizes, IGNORED, dtype=torch.int64)
    fused_ids, probs = torch.zeros(*sizes, top, dtype=torch.int64), torch.zeros(*sizes, top)
    for number, (one, row) in enumerate(zip(read, rows, strict=True)):
        ids[number, :len(one.ids)] = torch.tensor(one.ids)
        labels[number, one.first:len(one.ids)] = torch.tensor(one.ids[one.first:], dtype=torch.int64)
        for place, (tokens, parts) in enumerate(row):
            fused_ids[number, place, :len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            probs[number, place, :len(parts)] = torch.tensor(parts)
    return {"input_ids": ids, "labels": labels, "fused_ids": fused_ids, "fused_probs": probs}


class FusedRows:
    """Endless batches of a folder that `make_fused` wrote: every pass in an order of its own, by the seed; the copies
    of a plan take turns. Rows are padded to the graph's length with what is no response."""

    def __init__(self, graph: OperatorGraph, rows: int, seed: int, folder: str, copy: int = 0, copies: int = 1) -> None:
        path = Path(folder) / TENSORS
        self._tensors = read_tables(path, "make_fused", {"input_ids": 2, "labels": 2, "fused_ids": 3, "fused_probs": 3})
        sizes = {tuple(item.shape[:2]) for item in self._tensors.values()}
        if len(sizes) > 1 or not min(next(iter(sizes))):
            raise InputError(f"data: {path}: has no row, or tensors that do not fit each other; make it again with"
                             " mipipe.runtime.make_fused")
        self._rows, self._seed, self._copy, self._copies = rows, seed, copy, copies
        specs = batch_inputs(graph)
        lost = sorted(set(specs) - set(self._tensors))
        if lost:
            raise InputError(f"data: {path}: has no {lost[0]}, which the graph takes; expected a graph of a language"
                             " model captured with the loss fuse")
        for name, spec in specs.items():
            self._tensors[name] = _fitted(self._tensors[name], tuple(spec.shape[1:]), name, path).to(
                getattr(torch, spec.dtype))
        self._tensors = {name: self._tensors[name] for name in specs}

    def __iter__(self) -> Iterator[Batch]:
        count = len(self._tensors["input_ids"])
        order, passes = torch.empty(0, dtype=torch.int64), 0
        while True:
            while len(order) < self._rows * self._copies:
                draw = torch.Generator().manual_seed((self._seed << 20) + passes)
                order, passes = torch.cat([order, torch.randperm(count, generator=draw)]), passes + 1
            step, order = order[:self._rows * self._copies], order[self._rows * self._copies:]
            own = step[self._copy * self._rows:(self._copy + 1) * self._rows]
            yield {name: item[own] for name, item in self._tensors.items()}


def _fitted(found: Tensor, sizes: tuple[int, ...], name: str, path: Path) -> Tensor:
    """Rows [N,S,...] padded to a graph's sizes."""
    if found.dim() != len(sizes) + 1 or any(have > size for have, size in zip(found.shape[1:], sizes, strict=True)):
        raise InputError(f"data: {path}: {name} has rows of {list(found.shape[1:])}, but the graph takes {list(sizes)};"
                         " capture with a larger --seq or top, or make rows with a smaller length or top")
    made = torch.full((len(found), *sizes), IGNORED if name == "labels" else 0, dtype=found.dtype)
    made[tuple(slice(size) for size in found.shape)] = found
    return made
