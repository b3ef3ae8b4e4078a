"""The recipe's ``calibration`` key: which texts the models are run on, how many samples of which length.

A data source is a text file, a JSONL file (``text``, ``prompt`` and ``response``, or ``tokens`` in every line), or
``package.module:loader``, a function that is named on the command line again before it is called: a file runs no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT


@dataclass(frozen=True, slots=True)
class CalibrationRule:
    """Samples for the methods that run the models.

    ``samples`` of at most ``length`` tokens each from ``data``, ``batch`` at a time. ``parts``: every stream is run in
    so many independent parts, which ranks share; sums over parts are added in their order, so results depend on this
    number (in the last bits) but not on the ranks.
    """

    __pydantic_config__: ClassVar = STRICT
    data: str = ""
    samples: int = 100
    length: int = 512
    batch: int = 4
    parts: int = 1


def check_calibration(rule: CalibrationRule, own: Sequence[str], where: str) -> None:
    """Raises unless every number is in its range, and some data are given.

    Args:
        own: the data that models bring along.
    """
    at = f"{where}: calibration"
    for key, value, least in (("samples", rule.samples, 1), ("length", rule.length, 2), ("batch", rule.batch, 1),
                              ("parts", rule.parts, 1)):
        if value < least:
            raise InputError(f"{at}: {key}: found {value}, expected at least {least}")
    if rule.parts > rule.samples:
        raise InputError(f"{at}: parts: found {rule.parts}, expected at most the {rule.samples} samples")
    if not rule.data and not any(own):
        raise InputError(f"{at}: has no data; expected a text or JSONL file, or package.module:loader")
