"""A user's own loop has ended: no process group may live until the interpreter's end, which may then abort."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mipipe

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x, y):
        return {"loss": (self.layers(x) - y).square().mean()}


@pytest.mark.slow
def test_groups_end_before_the_interpreter(tmp_path):
    module, batch = Net(), {"x": torch.zeros(2, 4), "y": torch.zeros(2, 4)}
    graph = mipipe.capture(module, batch)
    devices = mipipe.Topology.uniform(2, latency_ns=1000, bytes_per_s=10**9, kind="h100")
    plan = mipipe.plan(graph, devices, microbatches=2, placement="chain", time_limit_s=1).plan
    mipipe.save(graph, tmp_path / "graph.json")
    mipipe.save(plan, tmp_path / "plan.json")
    save_file(dict(module.state_dict()), tmp_path / "weights.safetensors")
    save_file({name: item.repeat(2, 1) for name, item in batch.items()}, tmp_path / "batch.safetensors")
    code = Path(__file__).with_name("engine_ends.py")
    store = f"file://{tmp_path / 'store'}"
    workers = [subprocess.Popen([sys.executable, code, tmp_path, str(rank), store], stderr=subprocess.PIPE, text=True)
               for rank in range(2)]
    told = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert [int((tmp_path / f"threads{rank}").read_text()) for rank in range(2)] == [0, 0]
