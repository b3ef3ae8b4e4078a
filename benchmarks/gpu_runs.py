"""What one GPU can settle of whole runs; the later parts of `gpu_check.py`, which prints and keeps what they return.

Each part is a function of the device and of nothing else, and runs on CPUs as well: a smaller model there, gloo in
NCCL's place, and where a part is about the GPU alone (memory of the driver), nothing for its numbers.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mipipe
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.profiling.rehearse import model_input
from mipipe.graphs.serialize import load, save
from mipipe.graphs.topology import Topology
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks import mesh as meshes
from mipipe.runtime.ranks.groups import GroupSpec, Use
from mipipe.runtime.ranks.options import EngineOptions

Report = dict[str, Any]
MICROBATCHES = 4
SMALL = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
LARGE = SMALL | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16,
                 "num_key_value_heads": 4}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}


@functools.cache
def language_model(kind: str, dtype: str) -> mipipe.OperatorGraph:
    """A causal model of some size for the device: 8 layers of 1,024 on a GPU."""
    cuda = kind == "cuda"
    return mipipe.capture("llama", overrides=LARGE if cuda else SMALL, seq=1024 if cuda else 16, batch=2, dtype=dtype)


@functools.cache
def mixture() -> mipipe.OperatorGraph:
    """A small mixture of experts whose copies share them."""
    return mipipe.capture("qwen3_moe", overrides=SMALL | EXPERTS, seq=64, batch=2, dtype="bfloat16", expert_parallel=2)


@functools.cache
def planned(kind: str) -> tuple[mipipe.Plan, float]:
    """A plan of the model for one device from measured costs, and the seconds of a step that it predicts."""
    graph = language_model(kind, "bfloat16")
    costs = mipipe.profile(graph, groups=8, device=kind, fresh=True)
    found = mipipe.plan(graph, Topology.uniform(1, kind=kind), microbatches=MICROBATCHES, costs=costs, time_limit_s=2)
    assert found.plan is not None and found.makespan_ns is not None, found.reason
    return found.plan, found.makespan_ns / 1e9


def trained(device: torch.device, folder: Path, steps: int, **more: Any) -> Any:
    """A run of `mipipe train`: its result."""
    plan, _ = planned(device.type)
    config = {"steps": steps, "clip": 1.0, "deterministic": True, "checkpoint": {"folder": str(folder), "every": 10},
              "metrics": str(folder) + ".jsonl", "timeline": str(folder) + ".json", "profile": str(folder) + ".trace"}
    return mipipe.train(plan, language_model(device.type, "bfloat16"), config, timeout_s=240, progress=False,
                        **more)


def training(device: torch.device) -> Report:
    """20 steps under ``deterministic: true``, the same again with a halt in the middle: losses equal to the last bit;
    beside it the measured step, the predicted one (also by the quickest step without optimizer and files), and what
    spans of the timeline make of a step."""
    with tempfile.TemporaryDirectory() as folder:
        whole = trained(device, Path(folder) / "whole", 20)
        first = trained(device, Path(folder) / "halves", 10)
        rest = trained(device, Path(folder) / "halves", 20, resume=True)
        timeline = load(Path(folder) / "whole.json", mipipe.Timeline)
    seconds = sorted(record["time_metrics/end_to_end(s)"] for record in whole.records[1:-1])
    _, predicted = planned(device.type)
    last = whole.records[-1]
    held = {"reserved/active": last["memory/max_reserved(GiB)"] / last["memory/max_active(GiB)"]} \
        if device.type == "cuda" else {}
    busy = sum(span.end_ns - span.start_ns for span in timeline.spans) / 1e9
    equal = whole.losses == rest.losses and whole.losses[:10] == first.losses  # a resumed run's records go on
    return {"resumes_bitwise": equal, "falls": whole.losses[-1] < whole.losses[0],
            "step_s": seconds[len(seconds) // 2], "predicted_s": predicted,
            "predicted/step": predicted / seconds[len(seconds) // 2], "predicted/least": predicted / least_step(device),
            "clock": timeline.notes["clock"],
            "spans_s": busy, "measured_step_s": last["time_metrics/end_to_end(s)"], **held}


def least_step(device: torch.device, repeats: int = 20) -> float:
    """The seconds of the engine's quickest step of some, by the clock that `profile` took for what it predicts: on a
    CPU the time of its one thread, which other programs do not lengthen; a step waits for its device."""
    plan, _ = planned(device.type)
    graph, threads = language_model(device.type, "bfloat16"), torch.get_num_threads()
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    weights, batch = example(graph)
    torch.set_num_threads(1)
    try:
        engine, spent = mipipe.Engine(plan, graph, weights, device=device), []
        for _ in range(repeats):
            begin = clock()
            engine.step(batch)
            spent.append(clock() - begin)
            engine.zero_grad()
        return min(spent)
    finally:
        torch.set_num_threads(threads)


def compiled(device: torch.device) -> Report:
    """`compile: true`: graphs compiled while the engine is built, and in its first steps (none); losses beside those of
    a run without; bytes at the peak."""
    from torch._dynamo.utils import counters
    graph, (plan, _) = language_model(device.type, "bfloat16"), planned(device.type)
    weights, batch = example(graph)
    found: Report = {}
    for flag in (False, True):
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        engine = mipipe.Engine(plan, graph, weights, device=device, options=EngineOptions(compile=flag))
        built = counters["stats"]["unique_graphs"]
        losses = [engine.step(batch) for _ in range(2)]
        found["compiled" if flag else "plain"] = losses[-1]
        if flag:
            found |= {"graphs": built, "in_steps": counters["stats"]["unique_graphs"] - built,
                      "left_out": len(engine.compiled.uncompiled)}
        if device.type == "cuda":
            found[f"peak_bytes {'compiled' if flag else 'plain'}"] = torch.cuda.max_memory_allocated()
    return found


def made(graph: mipipe.OperatorGraph, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random weights and one microbatch, on the CPU."""
    generator, state, index = torch.Generator().manual_seed(seed), {}, index_graph(graph)
    for item in graph.parameters:
        shape, dtype = item.spec.shape, getattr(torch, item.spec.dtype)
        value = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else \
            torch.rand(shape, generator=generator) + 0.5
        state[item.fqn] = value.to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    return state, {name: model_input(index, name, generator) for name in graph.inputs}


def example(graph: mipipe.OperatorGraph) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Random weights, and as many microbatches as plans here have."""
    weights, _ = made(graph)
    return weights, [made(graph, seed=number + 1)[1] for number in range(MICROBATCHES)]


def communicators(device: torch.device) -> Report:
    """A world of one: groups are made, opened and used as a run's are; bytes of the driver for 1, 4 and 8 of them."""
    found: Report = {}
    with alone():
        mesh = meshes.Mesh(0, 1, 0, 1, device, {(0, 0, 0): 0})
        for number in range(8):
            spec, before = GroupSpec(Use.EXCHANGE, number, (0,)), driver_bytes(device)
            group = meshes._create(spec, device, timedelta(seconds=60))
            meshes._open(spec, group, mesh, timedelta(seconds=60))
            waits, many = comm.Waits(timedelta(seconds=60), device.type == "cpu"), torch.ones(1 << 20, device=device)
            waits.wait([comm.start_all_reduce(group, many)], lambda: "all-reduce")
            waits.wait([comm.start_all_to_all(group, torch.empty_like(many), many)], lambda: "all-to-all")
            waits.settle()
            assert float(many.sum()) == 1 << 20
            if number in (0, 3, 7):
                found[f"driver_bytes {number + 1}"] = driver_bytes(device) - before
        dist.barrier()
    return found


def driver_bytes(device: torch.device) -> int:
    """What the device has given out beside torch's allocator; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(f"{folder}/store", 1))
        try:
            yield
        finally:
            dist.destroy_process_group()


def together(device: torch.device) -> Report:
    """Two processes on this one device. Two ranks of a plan: loss and gradients beside one process. Two copies of a
    mixture that share its experts, with the collective stream beside the compute stream and without: the same bits.
    Tensors pass through the host: no backend connects two processes on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        graph = language_model(device.type, "float32")
        two = pipeline_of(graph, 2, device.type)
        save(graph, Path(folder) / "graph.json")
        save(two, Path(folder) / "plan.json")
        save(mixture(), Path(folder) / "experts.json")
        save(pipeline_of(mixture(), 1, device.type), Path(folder) / "shared.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
                   folder, device.type]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
        if done.returncode:
            raise RuntimeError("two processes: " + (done.stderr.strip().splitlines() or ["no word"])[-1])
        found: list[Report] = [torch.load(Path(folder) / f"found{rank}.pt", weights_only=True) for rank in range(2)]
    from mipipe.graphs.tracing.compose import run_step
    weights, batches = example(graph)
    from mipipe.graphs.recipes import rows
    total = sum(sum(rows.statistics(graph, [piece])) for piece in batches)
    steps = [run_step(graph, weights, piece) for piece in batches]
    loss = sum(float(step.outputs[graph.loss]) for step in steps) / total
    norm = math.sqrt(sum(float((sum(step.gradients[name].double() for step in steps) / total).square().sum())
                         for name in steps[0].gradients))
    return {"loss_error": max(abs(item["loss"] / loss - 1) for item in found),
            "norm_error": max(abs(item["norm"] / norm - 1) for item in found),
            "streams_agree": all(item["beside"] == item["plain"] for item in found),
            "aside": all(item["aside"] for item in found)}


def pipeline_of(graph: mipipe.OperatorGraph, ranks: int, kind: str) -> mipipe.Plan:
    """A plan of some ranks, costs by a roofline."""
    from dataclasses import replace

    from mipipe.graphs.cluster import shipped_kinds
    from mipipe.graphs.coarse.coarsen import coarsen
    from mipipe.graphs.costs.roofline import roofline
    from mipipe.planner.problems.from_graph import build_problem
    coarse = coarsen(graph, num_groups=12)
    topology = Topology.uniform(ranks, latency_ns=1000, bytes_per_s=10**10, kind=kind)
    costs = roofline(coarse, graph, {kind: replace(shipped_kinds()["h100"], name=kind)}, link=topology.within_host)
    found = mipipe.plan(build_problem(coarse, costs, topology, num_microbatches=MICROBATCHES), time_limit_s=2)
    assert found.plan is not None, found.reason
    return found.plan


class Staged:
    """A started work on the host's copy of a tensor, which it brings back when it is waited for."""

    def __init__(self, work: Any, target: torch.Tensor | None = None, host: torch.Tensor | None = None) -> None:
        self.work, self.target, self.host = work, target, host

    def wait(self, *limit: Any) -> None:
        self.work.wait(*limit)
        if self.target is not None and self.host is not None:
            self.target.copy_(self.host)

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())


def through_the_host() -> None:
    """Tensors of a device travel as the host's copies, on gloo."""
    def reduced(group: Any, tensor: torch.Tensor, *op: Any) -> Staged:
        host = tensor.cpu()
        return Staged(dist.all_reduce(host, *op, group=group, async_op=True), tensor, host)

    def exchanged(group: Any, output: torch.Tensor, rows: torch.Tensor, arriving: Any = None,
                  leaving: Any = None) -> Staged:
        host = torch.empty_like(output, device="cpu")
        work = dist.all_to_all_single(host, rows.cpu(), None if arriving is None else list(arriving),
                                      None if leaving is None else list(leaving), group=group, async_op=True)
        return Staged(work, output, host)

    def received(group: Any, tensors: Any, peer: int) -> list[Staged]:
        hosts = [torch.empty_like(item, device="cpu") for item in tensors]
        return [Staged(group.recv([host], peer, 0), item, host) for item, host in zip(tensors, hosts, strict=True)]

    def sent(group: Any, tensors: Any, peer: int) -> list[Staged]:
        hosts = [item.cpu() for item in tensors]
        return [Staged(group.send([host], peer, 0), None, host) for host in hosts]

    changes: dict[str, Callable[..., Any]] = {"start_all_reduce": reduced, "start_all_to_all": exchanged,
                                              "start_receive": received, "start_send": sent}
    for name, function in changes.items():
        setattr(comm, name, function)
    meshes._create = lambda spec, device, timeout: dist.new_group(sorted(spec.members), timeout, "gloo")


def worker(folder: Path, kind: str) -> None:
    """One of the two processes of `together`."""
    from mipipe.runtime.train.clip import gradient_norm
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    through_the_host()
    dist.init_process_group("gloo")
    graph, plan = load(folder / "graph.json", mipipe.OperatorGraph), load(folder / "plan.json", mipipe.Plan)
    weights, batch = example(graph)
    engine = mipipe.Engine(plan, graph, weights, device=device)
    found: Report = {"loss": engine.step(batch), "norm": gradient_norm(engine)}
    graph, plan = load(folder / "experts.json", mipipe.OperatorGraph), load(folder / "shared.json", mipipe.Plan)
    weights, batch = example(graph)
    for name, overlap in (("beside", True), ("plain", False)):
        engine = mipipe.Engine(plan, graph, weights, device=device, options=EngineOptions(overlap=overlap))
        found[name] = [engine.step(batch) for _ in range(3)]
        found["aside"] = engine.compiled.exchanges_aside
    torch.save(found, folder / f"found{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


PARTS: tuple[Callable[[torch.device], Report], ...] = (communicators, together, training, compiled)
"""The parts, in the order of their value for what they take."""


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
