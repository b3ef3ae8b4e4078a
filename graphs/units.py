"""Sizes and times as people write them (``141GB``, ``900GB/s``, ``2us``) and as mipipe keeps them: integers.

Decimal prefixes are powers of 1000, binary ones (``GiB``) powers of 1024, as vendors and operating systems use them.
"""

from __future__ import annotations

import re

from mipipe.graphs.errors import InputError

_BYTES = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}
_FLOPS = {"": 1, "FLOPS": 1, "GFLOPS": 10**9, "TFLOPS": 10**12, "PFLOPS": 10**15}


def parse_bytes(text: str | int, where: str = "size") -> int:
    """Bytes: ``'141GB'`` -> 141000000000. A bare number is bytes."""
    return _parse(text, _BYTES, where, "a size such as 80GB or 16GiB")


def parse_rate(text: str | int, where: str = "bandwidth") -> int:
    """Bytes per second: ``'900GB/s'`` -> 900000000000. A bare number is bytes per second."""
    if isinstance(text, str) and text.strip().endswith("/s"):
        text = text.strip()[:-2]
    return _parse(text, _BYTES, where, "a bandwidth such as 900GB/s")


def parse_ns(text: str | int, where: str = "time") -> int:
    """Nanoseconds: ``'2us'`` -> 2000. A bare number is nanoseconds."""
    return _parse(text, {"": 1, **_SECONDS}, where, "a time such as 2us or 1.5ms")


def parse_flops(text: str | int, where: str = "flops") -> int:
    """Floating-point operations per second: ``'989TFLOPS'`` -> 989000000000000."""
    return _parse(text, _FLOPS, where, "a rate such as 989TFLOPS")


def _parse(text: str | int, units: dict[str, int], where: str, expected: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ]*)\s*", str(text))
    if match is None or match[2] not in units:
        raise InputError(f"{where}: found {text!r}, expected {expected}")
    return round(float(match[1]) * units[match[2]]) if not match[1].isdigit() else int(match[1]) * units[match[2]]


def format_bytes(num_bytes: float) -> str:
    """Three digits with a decimal prefix: ``'1.50 GB'``."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_ns(ns: float) -> str:
    """Three digits with a unit: ``'12.3 ms'``."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if abs(ns) >= size:
            return f"{ns / size:.4g} {unit}"
    return f"{ns:.0f} ns"
