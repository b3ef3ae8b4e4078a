"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
"""No test may look anything up at a model hub."""
os.environ.setdefault("OMP_NUM_THREADS", "1")
"""One thread for each process: two workers of pytest and the processes they start share the cores as it is."""


COLLECT = (200_000, 20, 20)
"""Objects between two collections of garbage, as in the command (`mipipe.cli.main`)."""


def pytest_configure() -> None:
    """Let Ctrl-C tests work in CI too: a background job starts with SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests (whole torchrun jobs), so that two workers end at about the same time."""
    items.sort(key=lambda item: "test_torchrun" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Collect garbage as the command does, and never look through what was imported: that is a million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)
