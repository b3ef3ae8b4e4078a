"""Fixtures of the runtime tests: one pool of gloo workers for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from runtime_pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four worker processes that live as long as the test session."""
    made = Pool()
    yield made
    made.close()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """One thread, as in the workers."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    """No test (and nothing that it runs in this process) may change what later ones compute."""
    yield
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
