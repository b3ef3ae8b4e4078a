"""Costs by timing this machine: each distinct group once per phase, with as many processes at once as will train.

The distinct groups run in turn, F of all in order and then I and W from the last to the first, round after round while
all workers compute: each finds caches as a rank's other groups leave them (a group repeated alone finds its own tensors
in the cache and is timed too short). On a CPU a sample is CPU time, multiplied by the workers' shortage of cores (4
workers on 2 cores: 2): the wall clock of a few milliseconds shows the scheduler's time slices (some 20 ms), not the
work. On a GPU it is the time between events, of rounds that follow one another without a wait. A table entry is the
median over workers of the median over rounds; ``spread`` is the relative half-width of the middle half of all rounds.
Results are kept on disk by structure (which fixes shapes and dtypes), device, torch version, workers and threads. Left
out: transfers and the optimizer; batches do not change.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mipipe.graphs.cache import cache_folder
from mipipe.graphs.coarse.graph import CoarseGraph, OpGroup
from mipipe.graphs.coarse.graph_index import GraphIndex, index_graph
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import GraphError, InputError, RunError
from mipipe.graphs.exchange import exchange_note, exchange_ns
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role
from mipipe.graphs.serialize import save, write_text
from mipipe.graphs.topology import Link

DEFAULT_CACHE = cache_folder("profile")
_FORMAT = 3

Samples = dict[str, list[float]]
"""Nanoseconds per phase, one number for each round."""


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """How long to measure: on average ``seconds`` per structure, at least ``samples`` rounds, after ``warmup``."""

    seconds: float = 0.25
    samples: int = 9
    warmup: int = 2
    threads: int = 1
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("seconds", "samples", "warmup", "threads", "timeout_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"profile: {name} is {getattr(self, name)}; expected more than 0")


def profile_groups(graph: OperatorGraph, coarse: CoarseGraph, *, device: str = "cpu", workers: int = 1,
                   device_kind: str | None = None, cache: Path | None = DEFAULT_CACHE,
                   options: ProfileOptions | None = None, link: Link | None = None,
                   progress: Callable[[int, int], None] | None = None) -> CostTable:
    """The measured cost of every group on this machine.

    Args:
        graph: the operator graph.
        coarse: its groups.
        device: ``cpu`` or ``cuda``.
        workers: processes that compute the same group at the same time.
        device_kind: name of the kind in the table; None: the device's type.
        cache: folder of earlier results; None: measure everything anew.
        options: durations and counts.
        link: what all-to-alls of expert parallelism are charged to, on top of what is measured here; such entries are
            marked as estimates. None: their time on the wire is left out, and a note says so.
        progress: called with (structures done, structures to measure).

    Raises:
        InputError: workers below 1, an unknown device.
        RunError: a worker failed or took too long; with its last lines.
    """
    options = options or ProfileOptions()
    if workers < 1:
        raise InputError(f"profile: {workers} workers; expected at least 1")
    hardware = describe_device(device)
    index = index_graph(graph)
    representatives: dict[str, OpGroup] = {}
    for group in coarse.groups:
        representatives.setdefault(_identity(group), group)
    keys = {identity: _key(identity, hardware, workers, options) for identity in representatives}
    found = {identity: samples for identity, key in keys.items() if (samples := _recall(cache, key)) is not None}
    missing = [identity for identity in representatives if identity not in found]
    if missing:
        names = [group.name for group in representatives.values()]  # all: the known ones are the others' neighbours
        measured = _measure(graph, coarse, names, device, workers, options, progress)
        for identity in missing:
            found[identity] = measured[representatives[identity].name]
            _remember(cache, keys[identity], found[identity])
    kind = device_kind or device.partition(":")[0]
    share = _shortage(device, workers, options)
    numbers = {segment.name: number for number, segment in enumerate(graph.segments)}
    entries = tuple(_exchanged(_entry(group, kind, found[_identity(group)], share), index,
                               [numbers[name] for name in group.segments], link) for group in coarse.groups)
    notes = {"workers": str(workers), "threads": str(options.threads), "torch": version("torch"),
             "clock": f"CPU time x {share:g}" if device.startswith("cpu") else "events",
             "measured": f"{len(missing)} of {len(representatives)} distinct groups now, the rest from the cache"}
    if index.shares:
        notes["all_to_all"] = exchange_note(index.shares, link) if link else "without their time on the wire"
    return CostTable(coarse.graph_digest, entries, hardware, coarse.notes | notes)


def describe_device(device: str) -> str:
    """The name of this machine's processor or GPU.

    Raises:
        InputError: the device does not exist here.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{models[0] if models else 'CPU'}, {len(os.sched_getaffinity(0))} cores"
    import torch

    if kind != "cuda" or not torch.cuda.is_available():
        raise InputError(f"profile: device {device!r} is not available on this machine; expected cpu"
                         f"{' or cuda' if torch.cuda.is_available() else ''}")
    return torch.cuda.get_device_name(torch.device(device))


def _identity(group: OpGroup) -> str:
    """What decides a group's time: its structure and the phases it has."""
    return group.structure + "".join(phase.value for phase in Phase if phase in group.flops)


def _shortage(device: str, workers: int, options: ProfileOptions) -> float:
    """How many busy threads share one core of a CPU: what a worker's CPU time is multiplied by to get its time."""
    if not device.startswith("cpu"):
        return 1.0
    return max(1.0, workers * options.threads / len(os.sched_getaffinity(0)))


def _entry(group: OpGroup, kind: str, samples: Sequence[Samples], share: float) -> GroupCost:
    """Median over workers of each worker's median; the spread over all samples of whole rounds."""
    times = {phase: round(share * statistics.median(statistics.median(worker[phase]) for worker in samples))
             for phase in Phase if phase in group.flops}
    rounds = sorted(sum(parts) for worker in samples for parts in zip(*worker.values(), strict=True))
    middle = statistics.median(rounds)
    spread = 0.0
    if len(rounds) >= 4 and middle > 0:
        low, _, high = statistics.quantiles(rounds, n=4)
        spread = round((high - low) / 2 / middle, 4)
    return GroupCost(group.name, kind, times, "profiled", spread)


def _exchanged(entry: GroupCost, index: GraphIndex, members: Sequence[int], link: Link | None) -> GroupCost:
    """The cost with the busiest rank's part of the experts, and with the time of all-to-alls: then an estimate."""
    shares = {member: share for member in members if (share := index.shares.get(index.segments[member].name))}
    if not shares:
        return entry
    work = max(share.work if index.segments[member].tags.role is Role.EXPERTS else 1.0
               for member, share in shares.items())
    wire = {phase: sum(exchange_ns(index.traces[member], phase, share, link) for member, share in shares.items())
            for phase in entry.times_ns if link is not None}
    times = {phase: round(spent * work) + wire.get(phase, 0) for phase, spent in entry.times_ns.items()}
    return replace(entry, times_ns=times, origin="roofline" if any(wire.values()) else entry.origin)


def _key(identity: str, hardware: str, workers: int, options: ProfileOptions) -> str:
    parts = [_FORMAT, identity, hardware, version("torch"), workers, options.threads]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _recall(cache: Path | None, key: str) -> list[Samples] | None:
    """Earlier samples of every worker; None where there are none that can be read."""
    if cache is None:
        return None
    try:
        data = json.loads((cache / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, list) and data else None


def _remember(cache: Path | None, key: str, samples: Sequence[Samples]) -> None:
    """Keep samples for the next time; a cache that cannot be written is no error."""
    if cache is None:
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / f".{key}.{os.getpid()}"
        path.write_text(json.dumps(samples))
        path.replace(cache / f"{key}.json")
    except OSError:
        return


def _measure(graph: OperatorGraph, coarse: CoarseGraph, names: Sequence[str], device: str, workers: int,
             options: ProfileOptions, progress: Callable[[int, int], None] | None) -> dict[str, list[Samples]]:
    """Samples of the named groups from every worker: processes that wait for one another before each lot."""
    with tempfile.TemporaryDirectory(prefix="mipipe-profile-") as folder:
        save(graph, Path(folder) / "graph.json")
        save(coarse, Path(folder) / "coarse.json")
        task = {"names": list(names), "device": device, "room": _room(device, workers), "options": asdict(options)}
        write_text(Path(folder) / "task.json", json.dumps(task))
        processes = [_start(rank, options, Path(folder)) for rank in range(workers)]
        try:
            found: dict[str, list[Samples]] = {}
            while len(found) < len(names):
                ready = [_line(process, Path(folder), rank) for rank, process in enumerate(processes)]
                for process in processes:
                    assert process.stdin is not None
                    process.stdin.write("go\n")
                    process.stdin.flush()
                results = [_line(process, Path(folder), rank) for rank, process in enumerate(processes)]
                found |= {name: [result["samples"][name] for result in results] for name in ready[0]["ready"]}
                if progress is not None:
                    progress(len(found), len(names))
            return found
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def _room(device: str, workers: int) -> int | None:
    """Bytes that one worker's groups may hold together: half of what is free, divided; None: not known here."""
    if device.startswith("cpu"):
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
        return free[0] // (2 * workers) if free else None
    import torch

    sharing = -(-workers // torch.cuda.device_count())
    return int(torch.cuda.get_device_properties(torch.device(device)).total_memory) // (2 * sharing)


def _start(rank: int, options: ProfileOptions, folder: Path) -> subprocess.Popen[str]:
    """One worker; it ends by itself after the time limit."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-m", "mipipe.graphs.profiling.profile_worker", str(folder), str(rank)]
    with (folder / f"stderr{rank}").open("w") as errors:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                env=environment)


def _line(process: subprocess.Popen[str], folder: Path, rank: int) -> Mapping[str, Any]:
    """The next message of a worker.

    Raises:
        RunError: it ended without one.
        GraphError: it could not run the group, and says why.
    """
    assert process.stdout is not None
    text = process.stdout.readline()
    if not text:
        process.wait()
        last = " / ".join((folder / f"stderr{rank}").read_text().strip().splitlines()[-3:])
        if process.returncode == -signal.SIGALRM:
            last = "the time limit passed; measure fewer or smaller groups, or raise timeout_s"
        raise RunError(f"profile: worker {rank} ended with status {process.returncode}: {last or 'no output'}")
    message = json.loads(text)
    if "error" in message:
        raise GraphError(message["error"])
    return message
