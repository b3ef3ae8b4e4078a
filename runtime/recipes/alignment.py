"""Token sequences of one text under two tokenizers, aligned; distributions carried from one vocabulary to the other.

As FuseChat does it (arXiv 2408.07990): dynamic time warping with edit distances between the pieces; entries of the
vocabularies matched by their text, else by what was aligned with what over a corpus.

Legend: the pivot is the model that learns, the source the one whose distributions are carried over. A piece is a
token's text, with a space where it begins a word.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Distribution = tuple[list[int], list[float]]
"""Entries of a vocabulary and their shares, which sum to 1."""

WORD_MARKS = "\u0120\u2581"
"""What byte-level and SentencePiece vocabularies write for a space before a word."""
WITHIN = 0.1
"""Factor of the distance where one piece contains the other."""


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token."""
    found = []
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        text = tokenizer.decode([token])
        marked = name is not None and name[:1] in WORD_MARKS and len(name) > 1
        found.append(f" {text.lstrip(' ')}" if marked else text)
    return found


@functools.lru_cache(maxsize=1 << 18)
def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and changes of letters (Levenshtein)."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != other))
    return row[-1]


def align(pivot: Sequence[str], source: Sequence[str]) -> tuple[list[list[int]], int]:
    """For every piece of the pivot the places in the source it is aligned with, and what that costs.

    Of ways that cost the same, steps along both sequences are taken before steps along one.
    """
    if not pivot or not source:
        return [[] for _ in pivot], 0
    total = [[0.0] + [math.inf] * len(source)]
    for one in pivot:
        above, row_of = total[-1], [math.inf]
        for column, other in enumerate(source):
            row_of.append(edit_distance(one, other) + min(above[column], row_of[column], above[column + 1]))
        total.append(row_of)
    found: list[list[int]] = [[] for _ in pivot]
    row, column = len(pivot), len(source)
    while row and column:
        found[row - 1].append(column - 1)
        steps = ((row - 1, column - 1), (row, column - 1), (row - 1, column))
        row, column = min(steps, key=lambda place: total[place[0]][place[1]])  # the first of equals
    return [places[::-1] for places in found], int(total[-1][-1])


def match_vocabulary(counts: Mapping[tuple[int, int], int], pivot: Mapping[int, str],
                     source: Mapping[int, str]) -> dict[int, int]:
    """For source tokens the pivot's token that fits best of those they were aligned with.

    ``counts``: how often (pivot token, source token) were aligned. The pair with the least sigmoid(count) x edit
    distance is taken, a tenth of it where one piece contains the other; of equals the more frequent.
    """
    found: dict[int, tuple[float, int, int]] = {}
    for (one, other), count in sorted(counts.items()):
        near = pivot[one] in source[other] or source[other] in pivot[one]
        score = edit_distance(pivot[one], source[other]) * (WITHIN if near else 1.0) / (1.0 + math.exp(-count))
        key = (score, -count, one)
        if other not in found or key < found[other]:
            found[other] = key
    return {other: one for other, (_, _, one) in found.items()}


def source_place(places: Sequence[int], piece: str, source: Sequence[str]) -> int | None:
    """Which of the aligned source steps speaks for a pivot's piece, if any: where there is one, it or the piece must
    end in the other; of several the last that the piece ends in."""
    if len(places) == 1:
        other = source[places[0]]
        return places[0] if piece.endswith(other) or other.endswith(piece) else None
    fits = [place for place in places if source[place] and piece.endswith(source[place])]
    return fits[-1] if fits else None


def carry(ids: Sequence[int], logits: Sequence[float], same: Mapping[int, int], matched: Mapping[int, int],
          unknown: int) -> Distribution:
    """A source's entries as the pivot's: by the same text (``same``), else as `match_vocabulary` has it, else
    ``unknown``; of entries that become one the first counts. Shares are of the softmax over what is left."""
    kept: dict[int, float] = {}
    for token, logit in zip(ids, logits, strict=True):
        kept.setdefault(same.get(token, matched.get(token, unknown)), float(logit))
    return list(kept), shares(list(kept.values()))


def shares(logits: Sequence[float]) -> list[float]:
    """The softmax of a few logits."""
    most = max(logits)
    powers = [math.exp(item - most) for item in logits]
    total = sum(powers)
    return [item / total for item in powers]


def count_pairs(counts: Counter[tuple[int, int]], pivot: Sequence[int], source: Sequence[int],
                alignment: Sequence[Sequence[int]]) -> None:
    """Add a text's aligned tokens to the counts."""
    for token, places in zip(pivot, alignment, strict=True):
        counts.update((token, source[place]) for place in places)
