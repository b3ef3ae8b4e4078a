"""The next batch loaded while a step runs, in a thread; on CUDA into pinned memory, from where copies do not wait."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mipipe.graphs.errors import RunError
from mipipe.runtime.engine.batches import Batch
from mipipe.runtime.train.data import Batches

_MORE, _END = True, False


@dataclass(frozen=True, slots=True)
class _Taken:
    """A batch and where the loader was after it and before it; or what the loader raised."""

    batch: Batch | None
    after: dict[str, Any]
    before: dict[str, Any]
    error: BaseException | None = None


class Prefetched:
    """`Batches` one batch ahead. `state` is that of the last batch that was given out, not of the one in waiting.

    The loader runs in a thread beside the step: one that draws from torch's or Python's global random state must not
    be run ahead. ``timeout_s``: how long a batch is waited for.
    """

    def __init__(self, batches: Batches, pin: bool, timeout_s: float) -> None:
        self._batches, self._pin, self._timeout_s = batches, pin, timeout_s
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[_Taken] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given: _Taken | None = None

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self) -> Batch:
        """The next batch; the one after it is begun.

        Raises:
            RunError: the loader gave none within the time limit. What the loader raises is raised here.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="prefetch", daemon=True)
            self._thread.start()
            self._wanted.put(_MORE)
        try:
            taken = self._made.get(timeout=self._timeout_s)
        except queue.Empty:
            raise RunError(f"data: the loader gave no batch within {self._timeout_s:g} s") from None
        self._wanted.put(_END if taken.error is not None else _MORE)
        if taken.error is not None:
            self._thread = None
            raise taken.error
        self._given = taken
        assert taken.batch is not None
        return taken.batch

    def state(self, before: bool = False) -> dict[str, Any]:
        """See `Batches.state`."""
        if self._given is None:
            return self._batches.state(before)
        return self._given.before if before else self._given.after

    def continue_from(self, states: Callable[[int], dict[str, Any]], before: int, number: int, copies: int) -> None:
        """See `Batches.continue_from`; comes before the first batch."""
        assert self._thread is None
        self._batches.continue_from(states, before, number, copies)

    def _serve(self) -> None:
        while self._wanted.get():
            try:
                batch = next(self._batches)
                after, before = self._batches.state(), self._batches.state(before=True)
                self._made.put(_Taken(pinned(batch) if self._pin else batch, copy.deepcopy(after),
                                      copy.deepcopy(before)))  # the loader goes on with what it gave
            except BaseException as error:
                self._made.put(_Taken(None, {}, {}, error))


def pinned(batch: Batch) -> Batch:
    """A batch in page-locked memory; what is no tensor stays, and is refused where batches are checked."""
    if isinstance(batch, dict):
        return {name: item.pin_memory() if isinstance(item, torch.Tensor) else item for name, item in batch.items()}
    if isinstance(batch, list):
        return [pinned(piece) for piece in batch]  # type: ignore[misc]
    return batch
