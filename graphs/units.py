"""Sizes and times as people write them (``141GB``, ``900GB/s``, ``2us``) and as mipipe keeps them: integers.

Decimal prefixes are powers of 1000, binary ones (``GiB``) powers of 1024, as vendors and operating systems use them. A
``B`` is a byte and a ``b`` a bit, as on network cards (``400Gb/s`` is 50 GB/s). What a person writes has its unit: a
bare number could be anything; only 0 is the same in all units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from mipipe.graphs.errors import InputError

Written = str | int | float
"""A quantity as read from a file or an option, before it is understood."""

_PREFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES = {f"{prefix}B": size for prefix, size in _PREFIXES.items()} | {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BITS = {f"{prefix}{name}" for prefix in _PREFIXES for name in ("b", "bit", "bits")}
_RATES = {f"{unit}{per}": float(size) for unit, size in _BYTES.items() for per in ("/s", "ps")} | {
    f"{prefix}{name}": size / 8 for prefix, size in _PREFIXES.items() for name in ("b/s", "bps", "bit/s", "bits/s")}
_SECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9}
_FLOPS = {f"{prefix}{name}": 10**power for prefix, power in (("", 0), ("M", 6), ("G", 9), ("T", 12), ("P", 15))
          for name in ("FLOPS", "FLOP/s")}

GIGABYTE, MILLISECOND_NS = _BYTES["GB"], _SECONDS["ms"]

MOST = 2**62
"""No quantity is as large: 4 exabytes, 146 years, 4.6 exaflops."""


def parse_bytes(text: Written, where: str = "size") -> int:
    """Bytes: ``'141GB'`` -> 141000000000."""
    return _parse(text, _BYTES, where, "a size such as 80GB or 16GiB")


def parse_rate(text: Written, where: str = "bandwidth") -> int:
    """Bytes per second: ``'900GB/s'`` -> 900000000000, ``'400Gb/s'`` (bits) -> 50000000000."""
    return _parse(text, _RATES, where, "a bandwidth such as 900GB/s, or 400Gb/s in bits")


def parse_ns(text: Written, where: str = "time") -> int:
    """Nanoseconds: ``'2us'`` -> 2000."""
    return _parse(text, _SECONDS, where, "a time such as 2us or 1.5ms")


def parse_flops(text: Written, where: str = "flops") -> int:
    """Floating-point operations per second: ``'989TFLOPS'`` -> 989000000000000."""
    return _parse(text, _FLOPS, where, "a rate such as 989TFLOPS")


def _parse(text: Written, units: Mapping[str, float], where: str, expected: str) -> int:
    """The integer meant.

    Raises:
        InputError: no number, a negative or an endless one, one above 0 that rounds to it, no unit or an unknown one;
            the message says which.
    """
    match = None if isinstance(text, bool) else re.fullmatch(
        r"\s*([-+]?[0-9]{1,30}(?:\.[0-9]{0,30})?(?:[eE][+-]?[0-9]{1,3})?)\s*([A-Za-zµμ/]*)\s*",
        str(text) if not isinstance(text, int) or abs(text) < 10**30 else "")
    if match is None:
        raise InputError(f"{where}: found {shown(text)}, expected {expected}")
    number, unit = match[1], match[2]
    exact = re.fullmatch(r"\+?[0-9]+", number) is not None
    value = int(number) if exact else float(number)
    if not unit and value == 0:
        return 0
    if unit not in units:
        raise InputError(f"{where}: found {shown(text)}{_why(unit, units)}; expected {expected}")
    size = units[unit]
    meant = value * size
    if value < 0 or not math.isfinite(meant) or meant >= MOST:
        raise InputError(f"{where}: found {shown(text)}, which is {'negative' if value < 0 else 'too large'}; expected"
                         f" {expected}")
    if exact and size == int(size):
        return int(value) * int(size)
    if value and not round(meant):
        raise InputError(f"{where}: found {shown(text)}, which is too small and would count as 0; expected {expected}")
    return round(meant)


def _why(unit: str, units: Mapping[str, float]) -> str:
    """What is wrong with a unit."""
    if not unit:
        return ", a number without a unit"
    if units is _BYTES and unit in _BITS:
        return f", where {unit} is bits (8 to a byte)"
    if units is _RATES and (unit in _BYTES or unit in _BITS):
        return ", an amount and no amount per second"
    if unit.lower() in {known.lower() for known in units}:
        return f", where {unit} is written in other letters"
    return f", where {unit} is no such unit"


def shown(value: object, most: int = 60) -> str:
    """A value as an error message repeats it: on one line, its end cut off where it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**most else f"a number of over {most} digits"
    return text if len(text) <= most else text[:most - 3] + "..."


def format_bytes(num_bytes: float) -> str:
    """Three digits with a decimal prefix: ``'1.50 GB'``."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def exact_bytes(num_bytes: int) -> str:
    """The size in the largest unit in which it is written exactly in a few digits, as `parse_bytes` reads it."""
    for unit in ("TB", "GB", "MB", "kB"):
        text = f"{num_bytes / _BYTES[unit]:.3f}".rstrip("0").rstrip(".")
        if _BYTES[unit] <= num_bytes < 10_000 * _BYTES[unit] and parse_bytes(f"{text}{unit}") == num_bytes:
            return f"{text}{unit}"
    return f"{num_bytes}B"


def format_ns(ns: float) -> str:
    """Three digits with a unit: ``'12.3 ms'``."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if abs(ns) >= size:
            return f"{ns / size:.4g} {unit}"
    return f"{ns:.0f} ns"
