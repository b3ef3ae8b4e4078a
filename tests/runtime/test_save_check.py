"""Saving after training: every form of tensor, what is refused before the first step, what is left on failure."""

from __future__ import annotations

import threading
import time

import pytest
import runtime_equal as equal
import safetensors.torch
import torch
from torch import Tensor, nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import InputError, RunError
from mipipe.planner.schedules import BASELINES
from mipipe.runtime.checkpoints import save as save_weights
from mipipe.runtime.checkpoints import save_check
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks import processes
from mipipe.runtime.train.config import SaveConfig, TrainConfig


class Odd(nn.Module):
    """Parameters and buffers of every shape: a scale without dimensions, batch statistics, an empty table, a mask."""

    def __init__(self, complex_weight: bool = False) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.bias_of_nobody = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        if complex_weight:
            self.spectrum = nn.Parameter(torch.ones(4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x)) * self.logit_scale.exp()
        if hasattr(self, "spectrum"):
            x = torch.fft.ifft(torch.fft.fft(x) * self.spectrum).real
        return (x * self.mask).square().mean() + self.bias_of_nobody.sum()


def trained(monkeypatch, **options):
    """An engine after one step, and its module."""
    torch.manual_seed(0)
    module = Odd(**options)
    graph = capture_module(module, {"x": torch.randn(3, 4)})
    problem = equal.problem(graph, 1, 2)
    plan = next(item for item in BASELINES if item.name == "GPipe").plan(problem)
    engine = Engine(plan, graph, module)
    engine.step({"x": torch.randn(6, 4)})
    torch.optim.SGD(engine.parameters(), lr=0.1).step()
    for where in (save_check, save_weights):
        monkeypatch.setattr(where, "empty_module", lambda graph, config: module)
    return engine


def test_tensors_of_any_shape_are_saved(tmp_path, monkeypatch):
    engine = trained(monkeypatch)
    config = TrainConfig(1, save=SaveConfig(str(tmp_path / "out")))
    save_check.check_save(engine, config, None)
    assert not list(tmp_path.iterdir())
    save_check.save_or_rescue(engine, config, None)
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    held = {**engine.weights.parameters, **engine.weights.buffers}
    assert set(found) == set(held) and found["logit_scale"].shape == found["norm.num_batches_tracked"].shape == ()
    assert all(torch.equal(found[name], item) for name, item in held.items())


def test_what_could_not_be_saved_is_refused_before_training(tmp_path, monkeypatch):
    engine = trained(monkeypatch, complex_weight=True)
    config = TrainConfig(1, save=SaveConfig(str(tmp_path / "out")))
    with pytest.raises(InputError, match=r"could not save.*spectrum has dtype torch.complex64"):
        save_check.check_save(engine, config, None)


@pytest.mark.parametrize("place, message", [("file/out", "is no folder"), ("out", r"needs .* are free")])
def test_no_place_to_save_to(tmp_path, monkeypatch, place, message):
    engine = trained(monkeypatch)
    (tmp_path / "file").write_text("")
    if "free" in message:
        monkeypatch.setattr(save_check.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match=message):
        save_check.check_save(engine, TrainConfig(1, save=SaveConfig(str(tmp_path / place))), None)


def test_weights_that_cannot_be_saved_are_rescued(tmp_path, monkeypatch):
    """Whatever goes wrong, every trained tensor is on disk to the last bit."""
    engine = trained(monkeypatch)
    config = TrainConfig(1, save=SaveConfig(str(tmp_path / "out")))

    def fail(*arguments):
        raise RuntimeError("no such view")

    monkeypatch.setattr(save_weights, "byte_slice", fail)
    with pytest.raises(RunError, match=r"RuntimeError: no such view.*out\.rescued"):
        save_check.save_or_rescue(engine, config, None)
    found = torch.load(tmp_path / "out.rescued" / "rank-0.pt", weights_only=True)
    held = {**engine.weights.parameters, **engine.weights.buffers}
    assert set(found) == set(held) and all(torch.equal(found[name], item) for name, item in held.items())


def slow_disk(seconds, timeout_s):
    """What all ranks hear when rank 1 writes for longer than a collective may take, and rank 2 fails at once."""
    def write():
        if processes.rank() == 1:
            time.sleep(seconds)
        if processes.rank() == 2:
            raise OSError(28, "No space left on device")

    begin = time.monotonic()
    found = processes.failures_of(write, timeout_s)
    return found, time.monotonic() - begin, [item.name for item in threading.enumerate() if item.name == "alive"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_disk_slower_than_the_time_limit_ends_nothing(pool):
    """The limit is for processes that hang or are gone: who writes still tells that it is alive."""
    answers = pool.run(3, __file__, "slow_disk", 5.0, 2.0, timeout=2.0)
    assert [found for found, _, _ in answers] == [[None, None, "[Errno 28] No space left on device"]] * 3
    assert all(spent >= 4.5 and not left for _, spent, left in answers)


@pytest.mark.distributed
def test_every_rank_hears_what_failed_where(pool):
    answers = pool.run(3, __file__, "slow_disk", 0.0, 60.0)
    assert [found for found, _, _ in answers] == [[None, None, "[Errno 28] No space left on device"]] * 3
