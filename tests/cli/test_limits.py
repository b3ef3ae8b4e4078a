"""A time limit holds for a whole command: reading, checking, explaining, drawing and writing included."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import yaml
from rich.console import Console

from mipipe.cli.printing.output import COMPILING, told_of_compiling
from mipipe.graphs.serialize import save
from mipipe.planner import warm
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem

ROOM_S = 2.0
"""Seconds that a command may take beside 1.1 times its limit."""

SIZES = ((8, 20), (32, 256), (64, 1024))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of four kinds in several sizes, loads of experts, workloads to place; all kernels compiled."""
    folder = tmp_path_factory.mktemp("limits")
    for ranks, microbatches in SIZES:
        size = f"{ranks}x{microbatches}"
        plain = uniform_problem(ranks=ranks, microbatches=microbatches, f=1, i=1, w=1, comm="0.1", first="0.2",
                                last="0.6")
        pairs = uniform_problem(ranks=ranks, microbatches=microbatches, f=1, i="1.1", w="0.9", fb="2.55", comm="0.1")
        tight = uniform_problem(ranks=ranks, microbatches=microbatches, f=10, i=12, w=8, copies=1,
                                activations=0.75 * ranks)
        tight = tight.replace(edges=tuple(dataclasses.replace(edge, num_bytes=100, grad_bytes=100)
                                          for edge in tight.edges))
        kinds = {"plain": plain, "pairs": pairs, "flight": tight}
        if ranks <= 32:
            kinds["streams"] = two_stream_problem(ranks=ranks, microbatches=microbatches)
        for name, problem in kinds.items():
            save(problem, folder / f"{name}-{size}.json")
    for layers, experts in ((4, 64), (61, 256)):
        (folder / f"loads-{layers}.json").write_text(json.dumps(
            [[1 + (7 * layer + expert * expert) % 97 for expert in range(experts)] for layer in range(layers)]))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({
        "format": "mipipe.cluster", "version": 1, "hosts": [{"name": "a", "devices": 8, "kind": "h100"}],
        "links": {"within_host": {"latency": "5us", "bandwidth": "300GB/s"}}}))
    nodes = [{"id": n, "fpgaLatency": 1 + n % 7, "cpuLatency": 5, "size": 2, "supportedOnFpga": True,
              "isBackwardNode": False} for n in range(150)]
    edges = [{"sourceId": n, "destId": m, "cost": 1.0} for n in range(150) for m in (n + 1, n + 9) if m < 150]
    (folder / "workload.json").write_text(json.dumps({"maxFPGAs": 4, "maxCPUs": 1, "maxSizePerFPGA": 100,
                                                      "nodes": nodes, "edges": edges}))
    warm.warm()
    return folder


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every verb with a time limit, at many sizes, for every objective."""
    for ranks, microbatches in SIZES:
        for kind in ("plain", "pairs", "flight", "streams"):
            file = f"{kind}-{ranks}x{microbatches}.json"
            if kind == "streams" and ranks > 32:
                continue
            for objective in ("makespan", "memory", "utilisation", "period"):
                yield f"{file} {objective}", ["plan", file, "--objective", objective, "-o", "out.json"]
            yield f"compare {file}", ["compare", "--problem", file, "--schedules", "mipipe"]
    small, middle = "plain-8x20.json", "plain-32x256.json"
    yield "explained", ["plan", small, "--explain"]
    yield "pareto", ["plan", small, "--pareto"]
    yield "exportable", ["plan", small, "--exportable"]
    yield "recompute", ["plan", middle, "--recompute"]
    yield "two-way", ["plan", middle, "--placement", "two-way"]
    for ranks, microbatches in SIZES:
        size = ["--ranks", str(ranks), "--microbatches", str(microbatches)]
        yield f"all rows {ranks}x{microbatches}", ["compare", *size]
    for layers in (4, 61):
        yield f"experts {layers}", ["experts", "--loads", f"loads-{layers}.json", "--cluster", "cluster.yaml",
                                    "--replicas", "8"]
    yield "place", ["place", "workload.json"]
    yield "place contiguous", ["place", "workload.json", "--contiguous"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2, 5])
@pytest.mark.parametrize(("name", "arguments"), [pytest.param(*item, id=item[0]) for item in commands()])
def test_every_command_keeps_its_limit(files: Path, name: str, arguments: list[str], limit: int) -> None:
    began, before = time.monotonic(), used_s()
    ended = subprocess.run([sys.executable, "-m", "mipipe.cli.main", *arguments, "--time-limit", str(limit)],
                           cwd=files, capture_output=True, text=True, timeout=120)
    seconds = min(time.monotonic() - began, used_s() - before)  # others may keep the machine busy
    assert ended.returncode in (0, 6), ended.stderr  # 6: no plan in so short a time
    assert "Traceback" not in ended.stderr and COMPILING not in ended.stderr, ended.stderr
    assert seconds <= 1.1 * limit + ROOM_S


def used_s() -> float:
    """Seconds of computing of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_first_compilation_of_a_kernel_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Once, in a line, and not where nothing is compiled."""
    def fresh() -> Any:
        return numba.njit(lambda number: number + 1)

    with told_of_compiling(Console(stderr=True)):
        assert "compiling" not in capsys.readouterr().err
        assert fresh()(1) == 2 and fresh()(2) == 3
    assert capsys.readouterr().err == COMPILING + "\n"
    fresh()(1)
    assert capsys.readouterr().err == ""
