"""A worker whose loop ends as a user's does: steps, a last sum, the groups destroyed, nothing else (`test_ends`)."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mipipe import Engine, EngineOptions, OperatorGraph, Plan, load


def group_threads() -> int:
    """Threads of process groups that this process has."""
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


def work(folder: Path) -> None:
    """Train for two steps with an optimizer of torch's, whose first step imports much."""
    dist.init_process_group("gloo", init_method=sys.argv[3], rank=int(sys.argv[2]), world_size=2)
    plan, graph = load(folder / "plan.json", Plan), load(folder / "graph.json", OperatorGraph)
    engine = Engine(plan, graph, load_file(folder / "weights.safetensors"), options=EngineOptions(timeout_s=60))
    optimizer = torch.optim.AdamW(engine.parameters())
    for _ in range(2):
        engine.step(load_file(folder / "batch.safetensors"))
        optimizer.step()
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def report() -> None:
    """Leave the number of threads as the interpreter begins to end."""
    Path(sys.argv[1], f"threads{sys.argv[2]}").write_text(str(group_threads()))


if __name__ == "__main__":
    atexit.register(report)  # runs after what the engine registers later
    work(Path(sys.argv[1]))
