"""What a unit of a merge costs a rank: bytes read and written, arithmetic, and memory while it runs.

The rates that turn bytes into seconds are measured where the merge will run, in a fraction of a second; nothing is
assumed. The figures steer the balance between ranks and the estimate of ``--dry-run``, never the result.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mipipe.graphs.merge_graph import MergeGraph, MergeUnit, matrix_shape
from mipipe.graphs.merge_methods import BY_NAME
from mipipe.graphs.serialize import STRICT

SVD_FACTOR = 12
"""Flops of a thin SVD over ``m n min(m, n)``: between 4 and 20 by the share of wide matrices (methods.md 1.6)."""
TEMPORARIES = 6
"""Float32 tensors of a tile's size alive at once beside inputs and task vectors."""
TILE_ENTRIES = 2**18
"""Entries of a tile; the same as `mipipe.runtime.merge.method.TILE_ELEMENTS` (a test compares them)."""


@dataclass(frozen=True, slots=True)
class MergeRates:
    """Measured rates of one rank: bytes per second read, written and passed through elementwise work, and flops."""

    __pydantic_config__: ClassVar = STRICT
    read: float
    write: float
    stream: float
    flops: float


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Bytes read (all passes) and written, nanoseconds of arithmetic, peak bytes while the unit runs."""

    read_bytes: int
    write_bytes: int
    compute_ns: int
    memory_bytes: int
    total_ns: int


def unit_cost(unit: MergeUnit, rates: MergeRates, compute_bytes: int = 4) -> UnitCost:
    """The cost of a unit at measured rates; ``compute_bytes`` per entry (4 for float32)."""
    spec = BY_NAME.get(unit.method)
    passes = spec.passes if spec else 1
    read = unit.read_bytes * passes
    rows, columns = matrix_shape(unit)
    compute = 0.0
    if spec is not None:
        compute = unit.num_entries * len(unit.inputs) * 4 * compute_bytes * passes / rates.stream
        if spec.decompositions and unit.tensor_class in spec.classes and len(unit.shape) > 1:
            matrices = unit.num_entries / max(1, rows * columns)
            work = SVD_FACTOR * rows * columns * min(rows, columns) * spec.decompositions * len(unit.models)
            compute += matrices * work / rates.flops
    compute_ns = round(compute * 1e9)
    total = compute_ns + round((read / rates.read + unit.write_bytes / rates.write) * 1e9)
    return UnitCost(read, unit.write_bytes, compute_ns, memory_of(unit, compute_bytes), total)


def memory_of(unit: MergeUnit, compute_bytes: int = 4) -> int:
    """Peak bytes of a unit: tiles for elementwise methods, whole matrices for the others."""
    spec = BY_NAME.get(unit.method)
    rows, columns = matrix_shape(unit)
    entries = rows * columns
    whole = spec is not None and spec.whole and unit.tensor_class in spec.classes
    if not whole:
        entries = min(entries, max(TILE_ENTRIES, columns))
    tensors = len(unit.inputs) * 2 + len(unit.models) + TEMPORARIES
    factors = sum(adapter.up.num_bytes + adapter.down.num_bytes for item in unit.inputs for adapter in item.adapters)
    counters = 2**15 * 8 * len(unit.models) * 4 if spec is not None and spec.passes > 2 else 0
    return entries * compute_bytes * tensors + factors * 2 + counters


SAMPLE_BYTES = 2**23
"""Rates of reading and writing are measured on at most this much, and on no more than the merge writes."""


def measure_rates(graph: MergeGraph, output: str | Path) -> MergeRates:
    """Rates of reading the inputs, writing beside the output, and arithmetic on one core, from short samples."""
    sample_bytes = max(2**16, min(SAMPLE_BYTES, graph.write_bytes))
    first = graph.units[0].inputs[0]
    source = Path(first.folder) / first.tensor.file
    buffer = bytearray(sample_bytes)
    began = time.perf_counter()
    with source.open("rb", buffering=0) as stream:
        count = max(1, stream.readinto(buffer))
    read = count / max(time.perf_counter() - began, 1e-6)
    parent = next(folder for folder in (Path(output).absolute(), *Path(output).absolute().parents) if folder.is_dir())
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=parent) as scratch:
        scratch.write(buffer)
        scratch.flush()
        os.fsync(scratch.fileno())
    write = sample_bytes / max(time.perf_counter() - began, 1e-6)
    values = np.ones(TILE_ENTRIES, dtype=np.float32)
    began = time.perf_counter()
    for _ in range(16):
        np.add(values, values, out=values)
    stream_rate = 16 * values.nbytes / max(time.perf_counter() - began, 1e-6)
    square = np.ones((256, 256), dtype=np.float32)
    began = time.perf_counter()
    for _ in range(8):
        square @ square
    flops = 8 * 2 * 256**3 / max(time.perf_counter() - began, 1e-6)
    return MergeRates(read, write, stream_rate, flops)
