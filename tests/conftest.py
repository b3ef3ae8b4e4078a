"""What all tests share."""

from __future__ import annotations

import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
"""No test may look anything up at a model hub."""


def pytest_configure() -> None:
    """Let Ctrl-C tests work in CI too: a background job starts with SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests (whole torchrun jobs), so that two workers end at about the same time."""
    items.sort(key=lambda item: "test_torchrun" not in item.nodeid)
