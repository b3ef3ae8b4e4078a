"""One profiling process: ``python -m mipipe.graphs.profile_worker TASK RANK``, started by `mipipe.graphs.profile`.

Speaks JSON lines on stdout: ``{"ready": group}`` when a group's tensors are there, then, after a line on stdin,
``{"samples": {phase: [ns, ...]}}``; ``{"error": text}`` when a group cannot be run.
"""

from __future__ import annotations

import json
import pickle
import signal
import sys
import time
from pathlib import Path

import torch

from mipipe.graphs.coarse_graph import CoarseGraph
from mipipe.graphs.contract import index_graph
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.profile import ProfileOptions
from mipipe.graphs.rehearse import GroupRun, rehearse


def main(task: str, rank: int) -> None:
    """Measure the task's groups, in step with the other workers."""
    graph, coarse, names, device_name, options = pickle.loads(Path(task).read_bytes())
    signal.alarm(max(1, round(options.timeout_s)))
    torch.set_num_threads(options.threads)
    device = torch.device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    with torch.no_grad():
        serve(graph, coarse, names, device, options)


def serve(graph: OperatorGraph, coarse: CoarseGraph, names: tuple[str, ...], device: torch.device,
          options: ProfileOptions) -> None:
    """Run the named groups in the graph's order; one ``ready`` and one ``samples`` message for each."""
    index = index_graph(graph)
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    groups = [[number_of[name] for name in group.segments] for group in coarse.groups]
    structures = [group.structure for group in coarse.groups]
    wanted = {number for number, group in enumerate(coarse.groups) if group.name in set(names)}
    current = "the model's first group"
    try:
        for number, run in rehearse(index, groups, structures, wanted, device):
            item = coarse.groups[number]
            current = item.name
            phases = [phase for phase in Phase if phase in item.flops]
            rounds = warm_up(run, phases, device, options)
            print(json.dumps({"ready": item.name}), flush=True)
            sys.stdin.readline()
            print(json.dumps({"samples": measure(run, phases, device, options, rounds)}), flush=True)
    except (RuntimeError, IndexError, NotImplementedError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = f"profile: {current}, or the group after it, cannot be run on {device.type}: {line}"
        print(json.dumps({"error": text}), flush=True)


def warm_up(run: GroupRun, phases: list[Phase], device: torch.device, options: ProfileOptions) -> int:
    """Run some rounds; returns how many rounds make one sample."""
    for _ in range(options.warmup):
        for phase in phases:
            run.run(phase)
    _wait(device)
    begin = time.thread_time()
    for phase in phases:
        run.run(phase)
    _wait(device)
    single = max(time.thread_time() - begin, 1e-6)
    return max(1, round(options.seconds / options.samples / single))


def measure(run: GroupRun, phases: list[Phase], device: torch.device, options: ProfileOptions,
            rounds: int) -> dict[str, list[float]]:
    """Nanoseconds of each phase, ``options.samples`` times the mean over ``rounds`` rounds."""
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    found: dict[str, list[float]] = {phase.value: [] for phase in phases}
    for _ in range(options.samples):
        for phase, spent in zip(phases, sample(run, phases, rounds), strict=True):
            found[phase.value].append(spent / rounds)
    return found


def _sample_cpu(run: GroupRun, phases: list[Phase], rounds: int) -> list[float]:
    """CPU time of one thread: unlike the wall clock it does not count the moments in which others ran."""
    total = [0.0] * len(phases)
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    for _ in range(rounds):
        for number, phase in enumerate(phases):
            begin = clock()
            run.run(phase)
            total[number] += clock() - begin
    return total


def _sample_cuda(run: GroupRun, phases: list[Phase], rounds: int) -> list[float]:
    """Between CUDA events, so that launching ahead is possible as in a run."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)] for _ in range(rounds)]
    for events in marks:
        events[0].record()
        for phase, event in zip(phases, events[1:], strict=True):
            run.run(phase)
            event.record()
    torch.cuda.synchronize()
    return [sum(events[number].elapsed_time(events[number + 1]) for events in marks) * 1e6
            for number in range(len(phases))]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
