"""transformers kept quiet while it makes a model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_MAKING = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no reports on what a checkpoint has beyond the model; one thread at a time.

    transformers sets torch's default dtype while it makes a model, and this sets its logging: both are the process's.
    """
    from transformers.utils import logging
    with _MAKING:
        yield from _quietly(logging)


def _quietly(logging: Any) -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
