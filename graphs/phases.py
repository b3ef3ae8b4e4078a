"""The three parts of a training step, named as everywhere in mipipe."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """The three parts of a training step of one segment (names as in zero-bubble schedules, torch's letters)."""

    F = "F"
    I = "I"  # noqa: E741
    W = "W"
