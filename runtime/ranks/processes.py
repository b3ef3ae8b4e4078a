"""What this process is among those of a run, and what they tell one another. A single process is a run too."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mipipe.graphs.errors import MipipeError

T = TypeVar("T")


def rank() -> int:
    """This process's rank in the world; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(item: T, group: Any = None) -> list[T]:
    """Every process's ``item``, by rank. All processes of the group (by default the world) call it."""
    if world() == 1:
        return [item]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, item, group=group)
    return found


def gather_first(item: T) -> list[T]:
    """Every process's ``item``, by rank, on the first process; nothing on the others. All processes call it."""
    if world() == 1:
        return [item]
    found: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(item, found, 0)
    return found or []


def first_of(texts: list[str | None]) -> str | None:
    """The first text that is not None: of `gather`ed failures, the first rank's."""
    return next((text for text in texts if text is not None), None)


def failure_of(action: Callable[[], object],
               kinds: type[Exception] | tuple[type[Exception], ...] = (MipipeError, OSError)) -> str | None:
    """Do something; the text of the error of these kinds that it ends with (by default the user's or the operating
    system's), else None."""
    try:
        action()
    except kinds as error:
        if isinstance(error, OSError) and error.strerror and error.filename:
            return f"{os.fspath(error.filename)}: {error.strerror}"
        return str(error) if isinstance(error, (MipipeError, OSError)) else f"{type(error).__name__}: {error}"
    return None


BEAT_S = 5.0
"""How often processes that wait for one another's work tell that they are alive."""


def failures_of(action: Callable[[], object], timeout_s: float) -> list[str | None]:
    """Do something that may take any time, such as writing to a slow disk; by rank, the text of what it ended with, or
    None. All processes call it, and return together; ``action`` may use no group that this function does (the default).

    Who is done waits for the others for as long as they live: a thread of every process tells so meanwhile, well within
    ``timeout_s``, so that the limit of a collective holds for processes that hang or are gone, not for their disks.
    """
    if world() == 1:
        return [failure_of(action, Exception)]
    done, mine = threading.Event(), list[str | None]()
    told: list[tuple[Any, ...]] = []
    lost: list[Exception] = []

    def tell() -> None:
        try:
            while not told or not all(ended for ended, *_ in told):
                done.wait(min(BEAT_S, timeout_s / 4))
                told[:] = gather((done.is_set(), *mine))
        except Exception as error:
            lost.append(error)

    thread = threading.Thread(target=tell, name="alive", daemon=True)
    thread.start()
    try:
        mine.append(failure_of(action, Exception))
    finally:
        done.set()
    thread.join()
    if lost:
        raise lost[0]
    return [text for _, *texts in told for text in texts]
