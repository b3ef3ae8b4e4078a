"""Where a run computes: chosen by the user or the plan, refused where that is not here, agreed before anyone waits."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist
from runtime_cases import chain_graph, plan_of, problem_of

from mipipe.graphs.errors import InputError, RunError
from mipipe.runtime.checkpoints.checkpoint_tensors import counted_on_device
from mipipe.runtime.train.launching import devices


@pytest.fixture
def cuda(monkeypatch):
    """A host with so many CUDA devices."""
    def set_count(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return set_count


@pytest.mark.parametrize("here, name, kinds, count, device", [
    (0, None, ["cpu"], 4, "cpu"), (8, None, ["cpu", "cpu"], 4, "cpu"), (8, None, ["h100"], 8, "cuda"),
    (8, None, ["h100", "fast"], 8, "cuda"), (0, None, ["device"], 2, "cpu"), (2, None, ["device"], 2, "cuda"),
    (1, None, ["device"], 2, "cpu"), (8, "cpu", ["h100"], 8, "cpu"), (0, "cpu", ["h100"], 8, "cpu"),
    (4, "cuda", ["cpu"], 4, "cuda"), (0, "cpu", ["cpu", "h100"], 2, "cpu")])
def test_what_is_chosen(cuda, here, name, kinds, count, device):
    cuda(here)
    assert devices.choose(name, kinds, count) == device


@pytest.mark.parametrize("here, name, kinds, count, text", [
    (0, None, ["h100"], 2, "the plan is for h100, but torch sees no CUDA device for 2 workers on this host; say"),
    (1, None, ["h100"], 2, "the plan is for h100, but torch sees 1 CUDA device for 2 workers on this host"),
    (0, None, ["a", "b"], 1, "the plan is for a, b, but torch sees no CUDA device for 1 worker on"),
    (2, "cuda", ["h100"], 3, "cuda asked for, but torch sees 2 CUDA devices for 3 workers on this host; start fewer"),
    (0, "cuda", ["cpu"], 1, "cuda asked for, but torch sees no CUDA device for 1 worker"),
    (8, None, ["h100", "cpu"], 2, "the plan is for devices of kinds cpu, h100, which do not run together"),
    (8, "tpu", ["cpu"], 1, "found 'tpu', expected cpu or cuda")])
def test_what_is_refused(cuda, here, name, kinds, count, text):
    cuda(here)
    with pytest.raises(InputError, match=f"^device: {text}"):
        devices.choose(name, kinds, count)


@pytest.mark.parametrize("here, name, kinds, count, left", [
    (6, None, ["h100"], 8, 6), (8, None, ["h100"], 4, 4), (2, "cuda", ["cpu"], 4, 2), (0, None, ["h100"], 8, 8),
    (2, "cpu", ["h100"], 8, 8), (2, None, ["cpu"], 4, 4), (1, None, ["device"], 2, 2)])
def test_how_many_are_within_reach(cuda, here, name, kinds, count, left):
    """Fewer where CUDA devices of the plan are gone; none at all, or other kinds, are for `choose` to judge."""
    cuda(here)
    assert devices.within_reach(name, kinds, count) == left


def test_the_kinds_of_a_plan():
    problem = problem_of(chain_graph(1), 1, 2)
    plan = plan_of(problem, [([0], [0]), ([1], [1])], [[0], [1]], ["0F0 0B0", "1F0 1I0"])
    assert devices.kinds_of(plan) == {devices.ANY}


def answers(sorts, timeout_s=5.0):
    """What the workers of one store say when theirs are these devices; None for one that never comes."""
    store = dist.HashStore()
    found = ["" for _ in sorts]

    def work(place, sort):
        try:
            devices.agree(store, place, torch.device(sort), timeout_s)
        except RunError as error:
            found[place] = str(error)

    threads = [threading.Thread(target=work, args=(place, sort)) for place, sort in enumerate(sorts) if sort]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_workers_agree_before_there_is_a_group():
    assert answers(["cuda", "cuda", "cuda"]) == ["", "", ""]
    first, second, third = answers(["cuda", "cpu", "cuda"])
    assert not first and not third
    assert "device: rank 1 would compute with cpu on " in second and ", but rank 0 with cuda on " in second
    assert answers([None, "cpu"], 0.3)[1] == "rank 1: nothing from rank 0 for 0.3 s; it hangs or never started"


def test_deterministic_kernels_or_none(monkeypatch):
    """What has no such form raises; and it is said to cuBLAS, unless the user has."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as it was in the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        devices.deterministic()
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), 2)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        devices.deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_worker_binds_its_device(monkeypatch):
    """By its local rank, with what NCCL and CUDA must know first; what the user says stays."""
    bound = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: bound.append((device, dict(os.environ))))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "")
    monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "the user's")
    assert devices.bind("cpu") == torch.device("cpu") and not bound
    assert devices.bind("cuda") == torch.device("cuda", 3)
    (device, environment), = bound
    assert device == torch.device("cuda", 3) and environment["CUDA_MODULE_LOADING"] == "LAZY"
    assert environment["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"


@pytest.mark.parametrize("kind, said, found", [
    ("cpu", "", ""), ("cuda", "", "expandable_segments:True"), ("cuda", "max_split_size_mb:512", "")])
def test_the_allocator_is_told_unless_the_user_has(monkeypatch, kind, said, found):
    """Segments that grow in place, on CUDA; what the user says of the allocator (torch read it long ago) stays."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("NCCL_LAUNCH_ORDER_IMPLICIT", "CUDA_MODULE_LOADING"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", said)
    before = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings("")
    try:
        devices.bind(kind)
        assert torch._C._accelerator_getAllocatorSettings() == found
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


def test_which_counts_of_steps_a_device_reads():
    """A checkpoint's step goes where the optimizer reads it: of fused and capturable groups, not of others."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:2], "fused": True},
              {"params": parameters[2:], "capturable": True}]
    found = counted_on_device(torch.optim.AdamW(groups))
    assert found == {id(item) for item in parameters[1:]}
    assert not counted_on_device(torch.optim.SGD(parameters))
