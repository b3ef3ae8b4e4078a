"""What a unit of a merge costs a rank: bytes read and written, arithmetic, and memory while it runs.

The rates that turn bytes into seconds are measured where the merge will run, in a fraction of a second; nothing is
assumed. The figures steer the balance between ranks and the estimate of ``--dry-run``, never the result.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from mipipe.graphs.merging.checkpoints.files import DTYPE_BITS
from mipipe.graphs.merging.graph import MergeGraph, MergeUnit, columns_of, matrix_shape
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.passes import is_whole, num_rounds
from mipipe.graphs.serialize import STRICT
from mipipe.planner.actions import ActionKind
from mipipe.planner.merging.steps import TILE_ENTRIES, MergeStep, reads

Found = TypeVar("Found")

SVD_FACTOR = 12
"""Flops of a thin SVD over ``m n min(m, n)``: between 4 and 20 by the share of wide matrices (Golub and Van
Loan, Matrix Computations, section 8.6)."""
OVERHEAD_BYTES = 2**25
"""What a rank's process takes beyond its tensors: libraries loaded at first use, and what the allocator keeps in
reserve, whatever is merged."""
OTHERS = "others"
WORK = {"passthrough": 5, "linear": 16, "task_arithmetic": 12, "slerp": 8, "nuslerp": 29, "karcher": 9,
        "model_stock": 11, "ties": 37, "dare_linear": 44, "dare_ties": 60, "della": 370, "della_linear": 350,
        "breadcrumbs": 43, "breadcrumbs_ties": 44, "sce": 65, "varm": 17, "frank": 16, "layer_swapping": 9,
        "widen": 105, "onebit": 30, "multislerp": 9, "arcee_fusion": 60, "nearswap": 12, "ram": 16, "ramplus_tl": 20,
        "fisher": 20, "rcp": 16, "sens": 14, OTHERS: 12}
"""Time per entry, input and reading, in units of adding two arrays in place. Of other methods, singular values take the
time."""
TEMPORARIES = 6
"""Float32 tensors of a tile's size alive at once beside inputs and task vectors."""


@dataclass(frozen=True, slots=True)
class MergeRates:
    """Measured rates of one rank: bytes per second read, written and passed through elementwise work, and flops.

    ``cores``: processors the ranks share. Reading ahead pays where there are more of them than ranks. ``loop_s``:
    seconds that the interpreter takes for `_loop`, in which what does not depend on sizes is counted. ``share``: of a
    processor that the measuring process got; ``read_wait`` and ``write_wait``: the parts of reading and writing that
    waited for the disk.
    """

    __pydantic_config__: ClassVar = STRICT
    read: float
    write: float
    stream: float
    flops: float
    cores: int = 1
    loop_s: float = 0.0
    share: float = 1.0
    read_wait: float = 0.0
    write_wait: float = 0.0


BUSY_SHARE = 0.9
"""A process that gets less than this of a processor shares it with others; above, it is taken to be alone on it."""


def shared_rates(rates: MergeRates, num_ranks: int) -> MergeRates:
    """The rates of each of several ranks that work at once, from those of one process alone.

    Ranks share the processors with each other and with whatever else runs: on ``c`` processors a process that gets the
    share ``s`` has ``c / s - 1`` others beside it, and each of ``r`` ranks gets ``c / (c / s - 1 + r)``. All of them
    wait for one disk.
    """
    others = rates.cores / rates.share - 1 if rates.share < BUSY_SHARE else 0.0
    slower = max(1.0, rates.share / min(1.0, rates.cores / (others + num_ranks)))

    def moved(rate: float, wait: float) -> float:
        return rate / (wait * num_ranks + (1 - wait) * slower)

    return replace(rates, read=moved(rates.read, rates.read_wait), write=moved(rates.write, rates.write_wait),
                   stream=rates.stream / slower, flops=rates.flops / slower, loop_s=rates.loop_s * slower)


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Bytes read (all passes) and written, nanoseconds of arithmetic and of everything."""

    read_bytes: int
    write_bytes: int
    compute_ns: int
    total_ns: int


def unit_cost(unit: MergeUnit, rates: MergeRates, compute_bytes: int = 4) -> UnitCost:
    """The cost of a unit at measured rates; ``compute_bytes`` per entry (4 for float32)."""
    passes = num_rounds(unit) + 1
    read = unit.read_bytes * passes
    compute = 0.0
    if unit.method != "copy":
        compute = passes * stream_seconds(unit, unit.num_entries, rates, compute_bytes) + spectral_seconds(unit, rates)
    compute_ns = round(compute * 1e9)
    total = compute_ns + round((read / rates.read + unit.write_bytes / rates.write) * 1e9)
    return UnitCost(read, unit.write_bytes, compute_ns, total)


def stream_seconds(unit: MergeUnit, entries: int, rates: MergeRates, compute_bytes: int) -> float:
    """Seconds of elementwise work on some entries of a unit, for one reading."""
    return entries * len(unit.inputs) * WORK.get(unit.method, WORK[OTHERS]) * compute_bytes / rates.stream


def spectral_seconds(unit: MergeUnit, rates: MergeRates) -> float:
    """Seconds of the singular value decompositions of a unit."""
    spec = BY_NAME.get(unit.method)
    if spec is None or not spec.decompositions or unit.tensor_class not in spec.classes or len(unit.shape) < 2:
        return 0.0
    rows, columns = matrix_shape(unit)
    matrices = unit.num_entries / max(1, rows * columns)
    work = SVD_FACTOR * rows * columns * min(rows, columns) * spec.decompositions * len(unit.models)
    return matrices * work / rates.flops


def held_bytes(unit: MergeUnit, step: MergeStep, graph: MergeGraph) -> int:
    """What a step's LOAD reads and keeps until its FREE."""
    return sum(stop - start for _, start, stop in reads(unit, step, graph))


def written_bytes(unit: MergeUnit, step: MergeStep) -> int:
    """What a step writes, in the output's dtype."""
    if unit.method == "copy":
        return step.stop - step.start
    return (step.stop - step.start) * columns_of(unit, unit.shape) * DTYPE_BITS[unit.dtype] // 8 * (step.round is None)


def work_bytes(unit: MergeUnit, compute_bytes: int = 4) -> int:
    """Peak bytes of computing on a tile, or on a whole matrix where the method needs one."""
    if unit.method == "copy":
        return 0
    rows, columns = matrix_shape(unit)
    entries = rows * columns
    if not is_whole(unit):
        entries = min(entries, max(TILE_ENTRIES, columns))
    tensors = len(unit.inputs) * 2 + len(unit.models) + TEMPORARIES
    factors = sum(adapter.num_bytes for item in unit.inputs for adapter in item.adapters)
    counters = 2**15 * 8 * len(unit.models) * 4 if num_rounds(unit) > 1 else 0
    return entries * compute_bytes * tensors + factors * 2 + counters


def step_bytes(unit: MergeUnit, step: MergeStep, graph: MergeGraph, compute_bytes: int = 4) -> int:
    """Peak bytes of a step by itself: what was read, what is computed on, what will be written."""
    return held_bytes(unit, step, graph) + written_bytes(unit, step) + work_bytes(unit, compute_bytes)


UNKNOWN_RATE = 1e8
"""Bytes per second where neither could be measured: a plain hard disk's."""
SAMPLE_BYTES = 2**23
"""Rates of reading and writing are measured on at most this much, and on no more than the merge writes."""


def rates_to_run(num_ranks: int) -> MergeRates | None:
    """Rates that do to run a plan of one rank, whose order they do not change; None where they have to be measured."""
    return None if num_ranks > 1 else MergeRates(UNKNOWN_RATE, UNKNOWN_RATE, UNKNOWN_RATE, UNKNOWN_RATE, _num_cores())


def measure_rates(graph: MergeGraph, output: str | Path) -> MergeRates:
    """Rates of reading the inputs, writing beside the output, and arithmetic on one core, from short samples.

    Of recipes planned before those they build on have run, some inputs do not exist yet, and a full disk takes no
    sample: then reading is taken to be as fast as writing, or writing as reading.
    """
    loops = [_loop() for _ in range(10)]
    share = processor_share(loops)
    sample_bytes = max(2**16, min(SAMPLE_BYTES, graph.write_bytes))
    files = (Path(item.folder) / item.tensor.file for unit in graph.units for item in unit.inputs)
    source = next((file for file in files if file.is_file()), None)
    buffer = bytearray(sample_bytes)
    read, read_wait = 0.0, 0.0
    if source is not None:
        with source.open("rb", buffering=0) as stream:
            seconds, computed, count = timed(lambda: stream.readinto(buffer), share)
        read, read_wait = max(1, count or 0) / seconds, waited(seconds, computed, share)
    write, write_wait = _write_rate(Path(output), buffer, share)
    values = np.ones(TILE_ENTRIES, dtype=np.float32)
    added, *_ = timed(lambda: [np.add(values, values, out=values) for _ in range(16)], share)
    square = np.ones((256, 256), dtype=np.float32)
    multiplied, *_ = timed(lambda: [square @ square for _ in range(8)], share)
    return MergeRates(read or write or UNKNOWN_RATE, write or read or UNKNOWN_RATE, 16 * values.nbytes / added,
                      8 * 2 * 256**3 / multiplied, _num_cores(), loop_seconds(loops), share, read_wait, write_wait)


def waited(seconds: float, computed: float, share: float) -> float:
    """The part of some seconds that a process waited for a device, and not for its turn on a processor."""
    return max(0.0, 1 - computed / share / seconds)


def timed(work: Callable[[], Found], share: float) -> tuple[float, float, Found]:
    """Seconds that a piece of work takes at this process's share of a processor, those it computed, and what it
    returns.

    What passed, or what it computed over the share, whichever is more: others take turns of milliseconds, which spare a
    short piece of work or hit it.
    """
    began, computed = time.perf_counter(), time.thread_time()
    found = work()
    computed, passed = time.thread_time() - computed, time.perf_counter() - began
    return max(passed, computed / share, 1e-6), computed, found


def _loop() -> tuple[float, float]:
    """Seconds of a loop of 100,000 rounds in the interpreter: passed, and computed."""
    began, computed = time.perf_counter(), time.process_time()
    sum(number * number for number in range(100_000))
    return time.perf_counter() - began, time.process_time() - computed


def processor_share(samples: Sequence[tuple[float, float]]) -> float:
    """This process's share of a processor, in (0, 1], from (passed, computed) seconds of several loops."""
    passed, computed = (sum(column) for column in zip(*samples, strict=True))
    return min(1.0, computed / passed) if passed > 0 and computed > 0 else 1.0


def loop_seconds(samples: Sequence[tuple[float, float]]) -> float:
    """Seconds that a loop takes on average beside whatever else the machine does, from (passed, computed) of several.

    A single loop may be spared by others or hit, all of them get this process's share.
    """
    passed = sum(loop for loop, _ in samples)
    return min((cpu for _, cpu in samples if cpu > 0), default=passed / len(samples)) / processor_share(samples)


STARTING, VERIFYING, FORKING = 215, 340, 5
"""Loops of what a merge does once: starting the command and importing torch, importing transformers (which verifies the
result), starting a rank."""

LOOPS = {ActionKind.LOAD: 0.012, ActionKind.MEASURE: 0.04, ActionKind.COMBINE: 0.012, ActionKind.SAVE: 0.006}
"""Loops of an instruction however small its tensor is."""

COUNTING = 0.12
"""Loops of a round of counting magnitudes, in place of what MEASURE takes else: its histograms have one size."""


def start_ns(rates: MergeRates, num_ranks: int = 1) -> int:
    """Nanoseconds of a merge's command before the merge itself."""
    loops = STARTING + FORKING * (num_ranks if num_ranks > 1 else 0)
    return round(loops * rates.loop_s * 1e9)


def verify_ns(rates: MergeRates, merging_ns: int, num_ranks: int = 1) -> int:
    """Nanoseconds that are waited for the verification after a merge: transformers is imported while it runs, beside
    it where a processor is free, in turns with its ranks where none is."""
    work = round(VERIFYING * rates.loop_s * 1e9)
    return max(0, work - merging_ns) if rates.cores > num_ranks else work


def step_overhead(unit: MergeUnit, kind: ActionKind, rates: MergeRates) -> float:
    """Seconds of an instruction on a unit that do not depend on its size."""
    counts = kind is ActionKind.MEASURE and num_rounds(unit) > 1
    return (COUNTING if counts else LOOPS.get(kind, 0.0)) * rates.loop_s


def _write_rate(output: Path, sample: bytearray, share: float) -> tuple[float, float]:
    """Bytes per second written beside the output, down to the disk, and the part of that time which waited for it; 0
    where the disk is full."""
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())

    def write() -> None:
        with tempfile.TemporaryFile(dir=parent) as scratch:
            scratch.write(sample)
            scratch.flush()
            os.fsync(scratch.fileno())

    try:
        seconds, computed, _ = timed(write, share)
        return len(sample) / seconds, waited(seconds, computed, share)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return 0.0, 0.0  # whether the result has room is for those who reserve it to say


def _num_cores() -> int:
    """Processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
