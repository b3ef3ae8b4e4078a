"""What this process is among those of a run, and what they tell one another. A single process is a run too."""

from __future__ import annotations

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
        return str(error) if isinstance(error, (MipipeError, OSError)) else f"{type(error).__name__}: {error}"
    return None
