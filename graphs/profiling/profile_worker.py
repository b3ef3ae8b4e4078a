"""One profiling process, started by `mipipe.graphs.profiling.profile` as ``python -m`` this module ``FOLDER RANK``.

The folder has ``graph.json``, ``coarse.json`` and ``task.json`` (names of groups, device, room in bytes, options).

Speaks JSON lines on stdout: ``{"ready": [group, ...]}`` when these groups' tensors are there, then, after a line on
stdin, ``{"samples": {group: {phase: [ns, ...]}}}``; ``{"error": text}`` when a group cannot be run.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.profiling.profile import ProfileOptions
from mipipe.graphs.profiling.rehearse import GroupRun, rehearse
from mipipe.graphs.serialize import load


@dataclass(frozen=True, slots=True)
class ProfiledGroup:
    """A group that can be run, and the phases it has."""

    name: str
    run: GroupRun
    phases: tuple[Phase, ...]


Steps = list[tuple[ProfiledGroup, Phase]]


def main(folder: str, rank: int) -> None:
    """Measure the task's groups, in step with the other workers."""
    place = Path(folder)
    graph, coarse = load(place / "graph.json", OperatorGraph), load(place / "coarse.json", CoarseGraph)
    task = json.loads((place / "task.json").read_text(encoding="utf-8"))
    names, room, options = task["names"], task["room"], ProfileOptions(**task["options"])
    signal.alarm(max(1, round(options.timeout_s)))
    torch.set_num_threads(options.threads)
    device = torch.device(task["device"])
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    with torch.no_grad():
        serve(graph, coarse, set(names), device, room, options)


def serve(graph: OperatorGraph, coarse: CoarseGraph, names: set[str], device: torch.device, room: int | None,
          options: ProfileOptions) -> None:
    """Run the named groups, as many together as fit into ``room`` bytes; a ``ready`` and a ``samples`` for each lot."""
    current = "the model's first group"

    def note(name: str) -> None:
        nonlocal current
        current = name

    try:
        for lot in _lots(candidates(graph, coarse, names, device, note), room):
            rounds = warm_up(lot, device, options)
            print(json.dumps({"ready": [item.name for item in lot]}), flush=True)
            sys.stdin.readline()
            print(json.dumps({"samples": measure_groups(lot, device, rounds)}), flush=True)
    except (RuntimeError, IndexError) as error:
        # of torch's kernels: no such kernel here (NotImplementedError, a RuntimeError), no memory, an index outside of
        # its table; all else is a fault of ours and ends with its trace
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = f"profile: {current}, or the group after it, cannot be run on {device.type}: {line}"
        print(json.dumps({"error": text}), flush=True)


def candidates(graph: OperatorGraph, coarse: CoarseGraph, names: set[str], device: torch.device,
               note: Callable[[str], None] = lambda name: None) -> Iterator[ProfiledGroup]:
    """The named groups in the graph's order with real inputs, F done; ``note`` hears the name of each."""
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    groups = [[number_of[name] for name in group.segments] for group in coarse.groups]
    structures = [group.structure for group in coarse.groups]
    wanted = {number for number, group in enumerate(coarse.groups) if group.name in names}
    for number, run in rehearse(index_graph(graph), groups, structures, wanted, device):
        item = coarse.groups[number]
        note(item.name)
        yield ProfiledGroup(item.name, run, tuple(phase for phase in Phase if phase in item.flops))


def _lots(found: Iterator[ProfiledGroup], room: int | None) -> Iterator[list[ProfiledGroup]]:
    """All candidates together if their tensors fit into ``room`` bytes, else runs of them that do."""
    lot: list[ProfiledGroup] = []
    held = 0
    for item in found:
        size = sum(tensor.untyped_storage().nbytes() for tensor in item.run.slots.values())
        if lot and room is not None and held + size > room:
            yield lot
            lot, held = [], 0
        lot.append(item)
        held += size
    if lot:
        yield lot


def in_turn(lot: Sequence[ProfiledGroup]) -> Steps:
    """What one round runs: F of all groups in order, then I and W from the last to the first, as a rank does."""
    backward = [(item, phase) for item in reversed(lot) for phase in item.phases if phase is not Phase.F]
    return [(item, Phase.F) for item in lot] + backward


def warm_up(lot: Sequence[ProfiledGroup], device: torch.device, options: ProfileOptions) -> int:
    """Run some rounds; returns how many fill the time that the options give the lot's groups."""
    clock = _clock(device)
    single = 0
    for _ in range(options.warmup + 1):
        begin = clock()
        for item, phase in in_turn(lot):
            item.run.run(phase)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        single = max(clock() - begin, 1000)
    return max(options.samples, round(options.seconds * 1e9 * len(lot) / single))


def _clock(device: torch.device) -> Callable[[], int]:
    """Nanoseconds: CPU time of one thread, which unlike the wall clock leaves out the moments in which others ran."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time_ns if alone else time.perf_counter_ns


class Moments(Protocol):
    """What phases are timed with. ``mark`` is a moment of the device, ``spans`` the nanoseconds between marks that
    follow one another, once the device is done; ``together``: rounds that are launched before it is waited for."""

    together: int

    def mark(self) -> Any: ...
    def spans(self, marks: Sequence[Any]) -> list[float]: ...


class HostMoments:
    """The clock of a CPU, where a call is done when it returns."""

    together = 1

    def __init__(self) -> None:
        self.mark = _clock(torch.device("cpu"))

    def spans(self, marks: Sequence[int]) -> list[float]:
        return [float(end - begin) for begin, end in pairwise(marks)]


class EventMoments:
    """Events of a device that the host runs ahead of. ``new_event`` and ``synchronize`` are torch.cuda's."""

    together = 10

    def __init__(self, new_event: Callable[[], Any], synchronize: Callable[[], object]) -> None:
        self._new_event, self._synchronize = new_event, synchronize

    def mark(self) -> Any:
        event = self._new_event()
        event.record()
        return event

    def spans(self, marks: Sequence[Any]) -> list[float]:
        self._synchronize()
        return [begin.elapsed_time(end) * 1e6 for begin, end in pairwise(marks)]


def measure_groups(lot: Sequence[ProfiledGroup], device: torch.device, rounds: int) -> dict[str,
                                                                                            dict[str, list[float]]]:
    """Nanoseconds of each group's phases in each of ``rounds`` rounds over all groups."""
    moments: Moments = HostMoments()
    if device.type == "cuda":
        moments = EventMoments(
            lambda: torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
            lambda: torch.cuda.synchronize(device))
    steps = in_turn(lot)
    found: dict[str, dict[str, list[float]]] = {item.name: {} for item in lot}
    for times in timed_rounds([functools.partial(item.run.run, phase) for item, phase in steps], rounds, moments):
        for (item, phase), spent in zip(steps, times, strict=True):
            found[item.name].setdefault(phase.value, []).append(spent)
    return found


def timed_rounds(calls: Sequence[Callable[[], object]], rounds: int, moments: Moments) -> Iterator[list[float]]:
    """Nanoseconds of each of the calls, for each of ``rounds`` rounds.

    Where a host runs ahead of its device, rounds follow one another without a wait, as steps of a run do, and the first
    of those launched together, which finds the device idle and waits for its launches, does not count.
    """
    done = 0
    while done < rounds:
        many = min(moments.together, rounds - done)
        lead = int(moments.together > 1)
        marks = [moments.mark()]
        for _ in range(many + lead):
            for call in calls:
                call()
                marks.append(moments.mark())
        spans = moments.spans(marks)
        for number in range(lead, many + lead):
            yield spans[number * len(calls):(number + 1) * len(calls)]
        done += many


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
