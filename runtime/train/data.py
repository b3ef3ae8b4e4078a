"""Batches for training: text files as bytes, or the user's own loader, resumable at any step.

Every rank runs its own loader and gets the same batches (of its copy of the plan), so integer inputs never travel.
"""

from __future__ import annotations

import inspect
import itertools
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import DataEnd, InputError, RunError, shown
from mipipe.graphs.named_code import import_named, in_one_line
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes.rows import batch_inputs
from mipipe.runtime.engine.batches import Batch
from mipipe.runtime.recipes.fused import FusedRows
from mipipe.runtime.recipes.rollouts import Rollouts
from mipipe.runtime.train.config import DataConfig

ROLLOUTS, FUSED = "rollouts", "fused"
"""Sources that read a folder of responses with rewards (`mipipe.runtime.recipes.rollouts`), or of rows with fused
distributions (`mipipe.runtime.recipes.fused`)."""
DEFAULT_BYTES = 4_000_000
"""Text read by default: enough that a few dozen steps repeat nothing, and read in a fraction of a second."""


class Batches:
    """An iterator of batches that knows its position: ``state()`` is saved, ``resume(state)`` continues exactly.

    A loader with ``state_dict`` and ``load_state_dict`` (StatefulDataLoader) is asked for its own state; any other
    iterable is advanced by as many batches as had been taken. A loader that ends is started again.

    With another number of copies of the plan, or other rows in a batch, a position has to be divided anew. A loader
    with ``reshard(states, copy, copies)`` does it itself (``states``: those of all copies before, with ``taken``,
    ``rows`` and ``loader``). One without a state of its own is advanced by its share of the samples taken, where the
    copies take turns in one sequence (``in_turn``), or only the rows differ. Any other is refused.
    """

    def __init__(self, source: Iterable[Batch], rows: int = 0, *, in_turn: bool = False,
                 name: str = "the loader") -> None:
        self._source = source
        self._rows, self._in_turn, self._name = rows, in_turn, name
        self._iterator: Iterator[Batch] | None = None
        self.taken = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataEnd: the loader has no next one, or fails at it; `InputError` where it has not even a first.
        """
        if self._iterator is None:
            self._iterator = _epochs(self._source)
        try:
            with in_one_line(InputError, f"data: {self._name} failed at its batch {self.taken + 1}"):
                batch = next(self._iterator)
        except InputError as error:
            self._iterator = None
            if not self.taken:
                raise
            raise DataEnd(str(error)) from None
        self.taken += 1
        return batch

    def state(self, before: bool = False) -> dict[str, Any]:
        """What `resume` needs; ``before``: to get the last batch once more, where the loader has no state of its own
        (else it goes on after that batch). ``divides``: whether other copies that take as many samples a step can
        continue from it."""
        with in_one_line(RunError, f"data: {self._name} failed in its state_dict()"):
            own = self._source.state_dict() if hasattr(self._source, "state_dict") else None
        return {"taken": self.taken - int(before and own is None), "rows": self._rows, "loader": own,
                "divides": hasattr(self._source, "reshard") or (self._in_turn and own is None)}

    def continue_from(self, states: Callable[[int], dict[str, Any]], before: int, copy: int, copies: int) -> None:
        """Continue, as copy ``copy`` of ``copies``, after what all ``before`` copies of a checkpoint had taken;
        ``states(number)`` is the state of one of those.

        Raises:
            InputError: the position cannot be divided among the copies of this run.
        """
        first = states(min(copy, before - 1))
        rows = first.get("rows") or self._rows
        with in_one_line(InputError, f"data: {self._name} cannot take its position from the checkpoint"):
            self._continue_from(first, rows, states, before, copy, copies)

    def _continue_from(self, first: dict[str, Any], rows: int, states: Callable[[int], dict[str, Any]], before: int,
                       copy: int, copies: int) -> None:
        if before == copies and rows == self._rows:
            self.resume(first)
        elif hasattr(self._source, "reshard"):
            every = [states(number) for number in range(before)]
            self.taken = int(every[0]["taken"])
            self._source.reshard(every, copy=copy, copies=copies)
            self._iterator = _epochs(self._source)
        else:
            self.resume({**first, "taken": self._share(first, rows, before, copies)})

    def _share(self, state: dict[str, Any], rows: int, before: int, copies: int) -> int:
        """How many batches of this run's are what had been taken."""
        had = f"{before} cop{'y' if before == 1 else 'ies'} of {rows} rows a step"
        now = f"{copies} of {self._rows}"
        if state.get("loader") is not None or not (self._in_turn or before == copies):
            raise InputError(f"data: the checkpoint's position is that of {had}, this run has {now}, and {self._name}"
                             " cannot divide it anew; start as many copies and rows as before, or give the loader a"
                             " method reshard(states, copy, copies)")
        samples = int(state["taken"]) * rows * (before if self._in_turn else 1)
        taken, left = divmod(samples, self._rows * (copies if self._in_turn else 1))
        if left:
            raise InputError(f"data: the {samples} samples taken by {had} are no whole number of batches for {now};"
                             " resume from a step where they are, or start as many copies and rows as before")
        return taken

    def resume(self, state: dict[str, Any]) -> None:
        """Continue after the batches taken when ``state`` was made, by as many copies with as many rows."""
        self.taken = int(state["taken"])
        if state.get("loader") is not None and hasattr(self._source, "load_state_dict"):
            self._source.load_state_dict(state["loader"])
            self._iterator = _epochs(self._source)
        elif hasattr(self._source, "skip"):
            self._source.skip(self.taken)
            self._iterator = _epochs(self._source)
        else:
            self._iterator = itertools.islice(_epochs(self._source), self.taken, None)


def _epochs(source: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader, from its start again when it ends.

    Raises:
        InputError: it gives no batch at all.
    """
    while True:
        empty = True
        for batch in source:
            empty = False
            yield batch
        if empty:
            raise InputError("data: the loader gives no batch, or ended and cannot be iterated again")


class TextBytes:
    """Random windows of a text's bytes as token ids; batch n depends only on (seed, n, copy), so any n can be next."""

    def __init__(self, text: torch.Tensor, rows: int, graph: OperatorGraph, seed: int, copy: int = 0) -> None:
        specs = batch_inputs(graph)
        if "input_ids" not in specs:
            raise InputError(f"data: {graph.model} has no input 'input_ids' (inputs: {', '.join(specs)}); give"
                             " your own loader as package.module:callable")
        unknown = sorted(set(specs) - {"input_ids", "labels", "attention_mask", "position_ids"})
        if unknown:
            raise InputError(f"data: text gives no input {unknown[0]!r} of {graph.model}; give your own loader as"
                             " package.module:callable")
        self._names, self._specs = tuple(specs), specs
        self._length = specs["input_ids"].shape[-1]
        if len(text) < self._length + 1:
            raise InputError(f"data: {len(text)} bytes of text, but one sequence has {self._length} tokens")
        self._text, self._rows, self._seed, self._copy = text, rows, seed, copy
        self._next = 0

    def skip(self, count: int) -> None:
        """Make ``count`` the number of the next batch."""
        self._next = count

    def reshard(self, states: Sequence[dict[str, Any]], copy: int, copies: int) -> None:
        """Go on with the batches that no copy has had: batch n of every copy is a random draw of its own."""
        self.skip(max(int(state["taken"]) for state in states))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number, self._next = self._next, self._next + 1
            yield self.batch(number)

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """Batch ``number``: tensors [rows, sequence length]."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) * 4099 + self._copy)
        starts = torch.randint(len(self._text) - self._length, (self._rows, 1), generator=generator)
        tokens = self._text[starts + torch.arange(self._length)].long()
        made = {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens),
                "position_ids": torch.arange(self._length).expand(self._rows, -1).contiguous()}
        return {name: made[name].to(getattr(torch, self._specs[name].dtype)) for name in self._names}


def check_source(config: DataConfig) -> None:
    """Raise `InputError` unless the source can be found."""
    if ":" in config.source:
        _loader(config.source)
    elif config.source == ROLLOUTS:
        if "folder" not in config.options:
            raise InputError("data: source rollouts needs options: {folder: ...}, a folder of .jsonl files")
    elif config.source == FUSED:
        if set(config.options) != {"folder"}:
            raise InputError("data: source fused needs options: {folder: ...}, which make_fused wrote, and no others")
    elif config.source != "stdlib":
        _folder(config.source)


def _loader(source: str) -> Any:
    """The user's ``package.module:callable``, which must take what a loader is given."""
    found = import_named(source)
    try:
        takes = set(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        takes = set()
    missing = [name for name in ("graph", "rows", "seed") if name not in takes]
    if missing:
        raise InputError(f"data source {source}: takes no {missing[0]!r}; it is called with (graph=, rows=, seed=) and"
                         " the options")
    return found


def takes_copies(config: DataConfig) -> bool:
    """Whether the source loads for one of several copies of a plan."""
    return ":" not in config.source or "copy" in inspect.signature(_loader(config.source)).parameters


def _folder(source: str) -> Path:
    if not Path(source).is_dir():
        raise InputError(f"data: {source} is no folder; expected a folder of text files, 'stdlib', 'rollouts', or"
                         " package.module:callable")
    return Path(source)


def read_text_bytes(folder: Path, suffix: str, max_bytes: int) -> torch.Tensor:
    """The bytes of a folder's files in sorted order, joined, as uint8.

    Raises:
        InputError: the folder has no such file.
    """
    text = bytearray()
    for path in sorted(item for item in folder.rglob(f"*{suffix}") if item.is_file()):
        try:
            with path.open("rb") as stream:
                text += stream.read(max_bytes - len(text)) + b"\n"
        except OSError as error:
            raise InputError(f"data: {path}: cannot be read: {error.strerror}") from None
        if len(text) >= max_bytes:
            break
    if not text:
        raise InputError(f"data: {folder} has no file that ends with {suffix!r}")
    return torch.frombuffer(text, dtype=torch.uint8)


def stdlib_text(max_bytes: int = DEFAULT_BYTES) -> torch.Tensor:
    """The source of Python's own standard library (top-level modules), as bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def make_batches(config: DataConfig, graph: OperatorGraph, rows: int, seed: int, copy: int = 0,
                 copies: int = 1) -> Batches:
    """The batches of a configuration for one copy of the plan: ``rows`` rows each (microbatch rows times microbatches).

    Raises:
        InputError: an unknown option, an unusable source.
    """
    options = dict(config.options)
    if ":" in config.source:
        source = _loader(config.source)
        takes = inspect.signature(source).parameters
        if "copy" in takes:
            options["copy"] = copy
        elif copies > 1 or copy:
            raise InputError(f"data source {config.source}: takes no 'copy', so every data-parallel copy of the plan"
                             " would train on the same batches; give it that parameter")
        if "copies" in takes:
            options["copies"] = copies
        with in_one_line(InputError, f"data source {config.source}, called with (graph=, rows=, seed=) and the options,"
                                     " failed"):
            loader = source(graph=graph, rows=rows, seed=seed, **options)
        return Batches(loader, rows, in_turn={"copy", "copies"} <= set(takes), name=config.source)
    if config.source == ROLLOUTS:
        unknown = sorted(set(options) - {"folder", "max_age"})
        if unknown:
            raise InputError(f"data: unknown option {unknown[0]!r} of rollouts; expected folder, max_age")
        return Batches(Rollouts(graph, rows, seed, copy=copy, copies=copies, **options), rows, name=ROLLOUTS)
    if config.source == FUSED:
        return Batches(FusedRows(graph, rows, seed, copy=copy, copies=copies, **options), rows, in_turn=True,
                       name=FUSED)
    max_bytes = options.pop("max_bytes", DEFAULT_BYTES)
    if type(max_bytes) is float and max_bytes.is_integer():  # 1e6
        max_bytes = int(max_bytes)
    if type(max_bytes) is not int or max_bytes < 1:
        raise InputError(f"data: max_bytes: found {shown(max_bytes)}, expected a whole number of at least 1")
    if options:
        raise InputError(f"data: unknown option {sorted(options)[0]!r}; expected max_bytes")
    text = stdlib_text(max_bytes) if config.source == "stdlib" else \
        read_text_bytes(_folder(config.source), config.suffix, max_bytes)
    return Batches(TextBytes(text, rows, graph, seed, copy), rows)
