"""A folder of rollouts as batches: responses with rewards, in groups of one prompt, each with the age of its policy.

Files ``*.jsonl`` in sorted order, a response a line: ``{"prompt": [ids], "response": [ids], "reward": r, "group": n,
"version": v}``, and where the loss takes them ``old_log_probs``, ``teacher_log_probs`` and ``reference_log_probs``
(numbers, one for each response token, or for DPO their sum) and ``foreign`` (0 or 1). ``version`` is the step of the
policy that sampled; the age of a response at a step is that step less its version. Groups stay together and are dealt
to the copies of a plan in turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph, TensorSpec
from mipipe.graphs.recipes.rows import batch_inputs

IGNORED = -100
BY_TOKEN = ("old_log_probs", "teacher_log_probs", "reference_log_probs")
KNOWN = {"prompt", "response", "reward", "group", "version", "foreign", *BY_TOKEN}


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response, read and found to have what the loss asks for."""

    tokens: tuple[int, ...]
    prompt: int
    reward: float
    group: int
    version: int
    more: Mapping[str, Any]


class Rollouts:
    """Endless batches of ``rows`` responses, whole groups in an order drawn from the seed for every pass.

    ``max_age``: groups whose policy is older than that at a step are passed over; an error where all are.
    """

    def __init__(self, graph: OperatorGraph, rows: int, seed: int, folder: str, copy: int = 0, copies: int = 1,
                 max_age: int | None = None) -> None:
        self._specs = batch_inputs(graph)
        if "input_ids" not in self._specs:
            raise InputError(f"data: rollouts are tokens, but {graph.model} has no input 'input_ids'")
        self._length = self._specs["input_ids"].shape[-1]
        if not isinstance(folder, str) or not (max_age is None or (type(max_age) is int and max_age >= 0)):
            raise InputError(f"data: rollouts: folder {folder!r}, max_age {max_age!r}; expected a folder's path, and a"
                             " whole number of steps of at least 0")
        self._rows, self._seed, self._copy, self._copies, self._max_age = rows, seed, copy, copies, max_age
        self._groups = _grouped(read_rollouts(Path(folder), self._length, self._specs))
        sizes = {len(group) for group in self._groups}
        if len(sizes) > 1 or rows % min(sizes):
            raise InputError(f"data: rollouts {folder}: groups of {', '.join(map(str, sorted(sizes)))} responses, but a"
                             f" step has {rows} rows on a copy; expected groups of one size that divides them")
        if len(self._groups) < rows // min(sizes) * copies:
            raise InputError(f"data: rollouts {folder}: {len(self._groups)} groups are fewer than the"
                             f" {rows // min(sizes) * copies} of one step over {copies} copies")
        self._each = rows // min(sizes)
        self._next = 0

    def skip(self, count: int) -> None:
        """Make ``count`` the number of the next batch."""
        self._next = count

    def reshard(self, states: Sequence[dict[str, Any]], copy: int, copies: int) -> None:
        """Go on after the steps done; the copies deal the groups of a pass anew."""
        self.skip(max(int(state["taken"]) for state in states))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            number, self._next = self._next, self._next + 1
            yield self.batch(number)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch ``number``; it depends on nothing but that."""
        fresh = [group for group in self._groups
                 if self._max_age is None or number - group[0].version <= self._max_age]
        wanted = self._each * self._copies
        if len(fresh) < wanted:
            raise InputError(f"data: step {number + 1}: {len(fresh)} groups are at most {self._max_age} steps old,"
                             f" {wanted} are needed; sample again, or raise max_age")
        passes = len(fresh) // wanted
        draw = torch.Generator().manual_seed(self._seed * 1_000_003 + number // passes)
        order = torch.randperm(len(fresh), generator=draw).tolist()
        first = number % passes * wanted + self._copy * self._each
        return self._tensors([item for place in order[first:first + self._each] for item in fresh[place]])

    def _tensors(self, chosen: Sequence[Rollout]) -> dict[str, Tensor]:
        ids = torch.zeros(len(chosen), self._length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        made: dict[str, Tensor] = {"input_ids": ids, "labels": labels, "attention_mask": torch.zeros_like(ids),
                                   "position_ids": torch.arange(self._length).expand(len(chosen), -1).contiguous(),
                                   "rewards": torch.tensor([item.reward for item in chosen], dtype=torch.float64),
                                   "group_ids": torch.tensor([item.group for item in chosen])}
        made["advantages"] = made["rewards"]
        made["foreign"] = torch.tensor([float(item.more.get("foreign", 0)) for item in chosen])
        for name in BY_TOKEN:
            if name in self._specs:
                made[name] = torch.zeros((len(chosen), *self._specs[name].shape[1:]),
                                         dtype=torch.float64)
        for row, item in enumerate(chosen):
            size = len(item.tokens)
            ids[row, :size] = torch.tensor(item.tokens)
            labels[row, item.prompt:size] = ids[row, item.prompt:size]
            made["attention_mask"][row, :size] = 1
            for name in BY_TOKEN:
                if name in self._specs:
                    value = torch.tensor(item.more[name], dtype=torch.float64)
                    made[name][row] = value if not value.dim() else _at(value, item, self._length)
        made["response_mask"] = (labels != IGNORED).long()
        return {name: made[name].to(getattr(torch, spec.dtype)) for name, spec in self._specs.items()}


def _check_numbers(found: Any, where: str, count: int | None) -> None:
    """Raise unless ``found`` is a list of ``count`` finite numbers, or (None) one number."""
    numbers = found if isinstance(found, list) else [found]
    if isinstance(found, list) is (count is None) or not all(
            type(item) in (int, float) and math.isfinite(item) for item in numbers):
        wanted = "one finite number, of the whole response" if count is None else \
            f"a list of finite numbers, one for each of the {count} response tokens"
        raise InputError(f"{where}: expected {wanted}")
    if count is not None and len(numbers) != count:
        raise InputError(f"{where} has {len(numbers)} numbers for {count} response tokens")


def _at(values: Tensor, item: Rollout, length: int) -> Tensor:
    """Numbers of response tokens at their places in the row."""
    row = torch.zeros(length, dtype=torch.float64)
    row[item.prompt:len(item.tokens)] = values
    return row


def _grouped(found: Sequence[Rollout]) -> list[list[Rollout]]:
    groups: dict[int, list[Rollout]] = {}
    for item in found:
        groups.setdefault(item.group, []).append(item)
    return [groups[key] for key in sorted(groups)]


def read_rollouts(folder: Path, length: int, asked: Mapping[str, TensorSpec]) -> list[Rollout]:
    """The responses of a folder; ``asked``: the graph's inputs, of which each must have what the loss reads.

    Raises:
        InputError: there are none, or a line is not what it should be.
    """
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise InputError(f"data: rollouts {folder}: no folder with .jsonl files; expected one response a line")
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                found.append(_parse(line, f"{path}, line {number}", length, asked))
    return found


def _parse(line: str, where: str, length: int, asked: Mapping[str, TensorSpec]) -> Rollout:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON: {error}") from None
    if not isinstance(data, dict) or set(data) - KNOWN:
        odd = next(iter(sorted(set(data) - KNOWN)), "") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{where}: found {odd!r}; expected an object with {', '.join(sorted(KNOWN))}")
    needed = {"prompt", "response", "group"} | ({"reward"} if {"rewards", "advantages"} & set(asked) else set()) \
        | (set(asked) & set(BY_TOKEN))
    missing = sorted(needed - set(data))
    if missing:
        raise InputError(f"{where}: has no {missing[0]!r}, which the loss needs")
    prompt, response = data["prompt"], data["response"]
    for name, ids in (("prompt", prompt), ("response", response)):
        if not isinstance(ids, list) or not all(type(item) is int and item >= 0 for item in ids):
            raise InputError(f"{where}: {name}: expected a list of token ids")
    if not prompt or not response or len(prompt) + len(response) > length:
        raise InputError(f"{where}: {len(prompt)} tokens of prompt and {len(response)} of response, but a row has"
                         f" {length}; both need at least one")
    for name in (name for name in BY_TOKEN if name in asked):
        _check_numbers(data[name], f"{where}: {name}", len(response) if len(asked[name].shape) > 1 else None)
    if data.get("foreign", 0) not in (0, 1):
        raise InputError(f"{where}: foreign: found {data['foreign']!r}, expected 0 or 1")
    reward, group, version = data.get("reward", 0.0), data["group"], data.get("version", 0)
    if type(group) is not int or type(version) is not int or type(reward) not in (int, float) \
            or not math.isfinite(reward):
        raise InputError(f"{where}: expected group and version as whole numbers, reward as a finite number")
    return Rollout((*prompt, *response), len(prompt), float(reward), group, version,
                   {key: data[key] for key in (*BY_TOKEN, "foreign") if key in data})
