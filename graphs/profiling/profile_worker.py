"""One profiling process, started by `mipipe.graphs.profiling.profile` as ``python -m`` this module ``TASK RANK``.

Speaks JSON lines on stdout: ``{"ready": [group, ...]}`` when these groups' tensors are there, then, after a line on
stdin, ``{"samples": {group: {phase: [ns, ...]}}}``; ``{"error": text}`` when a group cannot be run.
"""

from __future__ import annotations

import json
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.profiling.profile import ProfileOptions
from mipipe.graphs.profiling.rehearse import GroupRun, rehearse


@dataclass(frozen=True, slots=True)
class ProfiledGroup:
    """A group that can be run, and the phases it has."""

    name: str
    run: GroupRun
    phases: tuple[Phase, ...]


Steps = list[tuple[ProfiledGroup, Phase]]


def main(task: str, rank: int) -> None:
    """Measure the task's groups, in step with the other workers."""
    # our parent process wrote it a moment ago, into a private temporary folder: no file that a person gives
    graph, coarse, names, device_name, room, options = pickle.loads(Path(task).read_bytes())
    signal.alarm(max(1, round(options.timeout_s)))
    torch.set_num_threads(options.threads)
    device = torch.device(device_name)
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
    except (RuntimeError, IndexError, NotImplementedError) as error:
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


def measure_groups(lot: Sequence[ProfiledGroup], device: torch.device, rounds: int) -> dict[str,
                                                                                            dict[str, list[float]]]:
    """Nanoseconds of each group's phases in each of ``rounds`` rounds over all groups."""
    steps = in_turn(lot)
    found: dict[str, dict[str, list[float]]] = {item.name: {} for item in lot}
    for times in (_time_cuda if device.type == "cuda" else _time_cpu)(steps, rounds):
        for (item, phase), spent in zip(steps, times, strict=True):
            found[item.name].setdefault(phase.value, []).append(spent)
    return found


def _time_cpu(steps: Steps, rounds: int) -> Iterator[list[float]]:
    """By the clock between one phase and the next."""
    clock = _clock(torch.device("cpu"))
    for _ in range(rounds):
        marks = [clock()]
        for item, phase in steps:
            item.run.run(phase)
            marks.append(clock())
        yield [float(end - begin) for begin, end in pairwise(marks)]


def _time_cuda(steps: Steps, rounds: int) -> Iterator[list[float]]:
    """Between CUDA events, so that launching ahead is possible as in a run."""
    for _ in range(rounds):
        marks = [torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                 for _ in range(len(steps) + 1)]
        marks[0].record()
        for (item, phase), mark in zip(steps, marks[1:], strict=True):
            item.run.run(phase)
            mark.record()
        torch.cuda.synchronize()
        yield [begin.elapsed_time(end) * 1e6 for begin, end in pairwise(marks)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
