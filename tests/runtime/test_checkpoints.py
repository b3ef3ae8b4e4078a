"""Checkpoints when things go wrong: killed while saving, full disk, damaged files, a peer that stops, a wild loss."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_saves
import pytest
import runtime_cases as cases
import runtime_equal as equal
import runtime_experts as experts
import runtime_models as models
import torch
from safetensors.torch import load_file

from mipipe.graphs.errors import InputError, RunError
from mipipe.runtime.checkpoints.checkpoint import Checkpoints
from mipipe.runtime.checkpoints.checkpoint_folder import complete, latest, read_state, verify
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.checkpoints.checkpoint_tensors import shared_rows
from mipipe.runtime.checkpoints.data_state import pack_state
from mipipe.runtime.checkpoints.save import Target, save_weights
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.train.config import CheckpointConfig, DataConfig, TrainConfig
from mipipe.runtime.train.data import Batches, make_batches
from mipipe.runtime.train.training import Trainer


def test_a_kill_while_saving_loses_nothing(tmp_path):
    """Three SIGKILLs while checkpoints are written: all that look complete are, and no loss differs in a bit."""
    done = subprocess.run([sys.executable, kill_saves.__file__, str(tmp_path), "3"], capture_output=True, text=True,
                          timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == 0 and found["halves"] > 0
    assert len(found["calm"]) == kill_saves.STEPS and found["killed"] == found["calm"]
    assert found["kept"] == ["step-23", "step-24"]


def damage(file, how):
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "tampered":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "tampered", "missing"])
def test_a_damaged_checkpoint_is_refused(tmp_path, how):
    """By the name of the file and what to do; without the folder, the one before is used."""
    kill_saves.trainer(tmp_path, steps=3).run()
    folder = latest(tmp_path / "checkpoints")
    file = next(path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors")
    damage(file, how)
    with pytest.raises(InputError, match=f"step-3: {file.name} is damaged or incomplete; remove the folder"):
        kill_saves.trainer(tmp_path, steps=4).resume()
    (folder / "state.json").unlink()  # what a kill leaves behind is passed over
    (tmp_path / "checkpoints" / "step-9.partial").mkdir()
    assert kill_saves.trainer(tmp_path, steps=4).resume() == 2


def test_a_loss_that_blows_up_keeps_the_checkpoint_begun(tmp_path):
    """The error names the step; the checkpoint that was being written is finished."""
    class Bad(kill_saves.Loader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                yield {name: tensor * float("nan") for name, tensor in batch.items()} if number == 3 else batch

    with pytest.raises(RunError, match="step 4: the gradient norm is nan; lower the learning rate"):
        kill_saves.trainer(tmp_path, loader=Bad()).run()
    folder = latest(tmp_path / "checkpoints")
    assert folder.name == "step-3"
    verify(folder, read_state(folder))


def limited(folder):
    """Rank 1's disk is full (no file may grow beyond 300 bytes) at the second checkpoint."""
    plan = two_ranks()
    engine = Engine(plan, cases.chain_graph(), cases.chain_state())
    optimizer = torch.optim.Adam(engine.parameters())
    saved = Checkpoints(folder, engine, optimizer, timeout_s=20)
    saved.begin(Start.FRESH)
    engine.step(cases.chain_batch(2))
    optimizer.step()
    saved.save(1, {"taken": 1})
    saved.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        saved.save(2, {"taken": 2})
        saved.finish()
    except RunError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "no error"


def two_ranks():
    problem = cases.problem_of(cases.chain_graph(), 2, 2, [["layer0"], ["layer1", "loss"]])
    return cases.plan_of(problem, [([0], [0]), ([1], [1])], [[0, 0], [1, 1]],
                         ["0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1W0 1F1 1I1 1W1"])


@pytest.mark.distributed
def test_a_full_disk_is_one_clear_error_on_all_ranks(pool, tmp_path):
    """The checkpoint before stays and is whole."""
    for text in pool.run(2, __file__, "limited", tmp_path):
        assert "step-2.partial: cannot be written: " in text and "File too large" in text
        assert text.endswith("earlier checkpoints are untouched")
    assert [path.name for path in complete(tmp_path)] == ["step-1"]
    verify(tmp_path / "step-1", read_state(tmp_path / "step-1"))


def rehearsed_late(folder):
    """Each rank's thread and its caller come to what they ask the other in another order; the checkpoint's steps."""
    engine = Engine(two_ranks(), cases.chain_graph(), cases.chain_state())
    optimizer = torch.optim.Adam(engine.parameters())
    saved = Checkpoints(folder, engine, optimizer, timeout_s=20)
    saved.begin(Start.FRESH)
    engine.step(cases.chain_batch(2))
    optimizer.step()
    first = engine.mesh.rank == 0
    saved._thread.submit(time.sleep, 0.0 if first else 1.0)  # as on a slow disk: the write begins after it
    saved.save(1, {"taken": 1})
    time.sleep(0.5 if first else 0.0)
    saved.rehearse({"taken": 1})
    saved.finish()
    return [path.name for path in complete(folder)]


@pytest.mark.distributed
def test_what_is_asked_while_a_checkpoint_is_written_waits(pool, tmp_path):
    """On one rank the thread that writes is ahead of the caller, on the other behind; nothing is exchanged between a
    thread and a caller."""
    assert pool.run(2, __file__, "rehearsed_late", tmp_path) == [["step-1"]] * 2


def stopped(folder):
    """Rank 1 stops (SIGSTOP) in its fourth step, for three seconds; both say what they saw."""
    began = []

    class Stopping(kill_saves.Loader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                began.append(time.monotonic())
                if number == 3 and engine.mesh.rank == 1:
                    subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
                    os.kill(os.getpid(), signal.SIGSTOP)
                yield batch

    engine = Engine(two_ranks(), cases.chain_graph(), cases.chain_state(), options=EngineOptions(timeout_s=1.0))
    config = TrainConfig(6, checkpoint=CheckpointConfig(str(folder), every=2, asynchronous=False), timeout_s=1.0)
    try:
        Trainer(engine, config, Batches(Stopping())).run()
    except RunError as error:
        return str(error), time.monotonic() - began[-1]
    return "no error", 0.0


@pytest.mark.distributed
def test_a_peer_that_stops_is_named_within_the_timeout(pool, tmp_path):
    """And what was saved is there."""
    (text, took), _ = pool.run(2, __file__, "stopped", tmp_path)
    assert text.startswith("rank 0, instruction ") and "rank 1" in text and "nothing for 1 s; the peer hangs" in text
    assert took < 3
    assert latest(tmp_path).name == "step-2"
    verify(tmp_path / "step-2", read_state(tmp_path / "step-2"))


def save_shared(plan, graph, state, layout, folder):
    """One step of Adam with experts shared between copies, then a checkpoint and the weights' folder."""
    engine = Engine(plan, graph, state, options=EngineOptions(expert_map=layout))
    optimizer = torch.optim.Adam(engine.parameters(), lr=1e-2, foreach=False)
    engine.step(experts.batch_of(0, engine.mesh.copy, engine.mesh.num_copies))
    optimizer.step()
    saved = Checkpoints(folder, engine, optimizer, timeout_s=20)
    saved.begin(Start.FRESH)
    saved.save(1, {"taken": 1})
    saved.finish()
    save_weights(engine, torch.nn.Module(), Target(folder / "out", 10**9))


def load_shared(plan, graph, state, layout, folder):
    """Parameters and Adam's first moments as a checkpoint gives them, and which experts this rank has."""
    engine = Engine(plan, graph, state, options=EngineOptions(expert_map=layout))
    optimizer = torch.optim.Adam(engine.parameters(), lr=1e-2, foreach=False)
    assert Checkpoints(folder, engine, optimizer, timeout_s=20).begin(Start.RESUME).state.step == 1
    return {name: (item.detach(), optimizer.state[item]["exp_avg"]) for name, item in engine.named_parameters()}, \
        shared_rows(engine)


@pytest.mark.slow
@pytest.mark.distributed
def test_any_layout_of_experts_reads_any_other(pool, tmp_path):
    """Written by two copies with replicated experts, read whole and by halves; written whole, read by halves. All equal
    the single process, Adam's moments included, and so does the folder of weights."""
    module, graph = experts.captured()
    plan, state = experts.plan_for(graph, 1), experts.state_of(module)
    shared, whole = tmp_path / "shared", tmp_path / "whole"
    pool.run(2, __file__, "save_shared", plan, graph, state, experts.replicated_map(2), shared)
    (expected, none), = pool.run(1, __file__, "load_shared", plan, graph, state, None, shared)
    reference = experts.skewed_moe()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2, foreach=False)
    pieces = [piece for copy in range(2) for piece in models.chunked(experts.batch_of(0, copy, 2), experts.COUNT)]
    models.eager(reference, pieces, equal.valid_labels(True, pieces), models.token_losses)
    optimizer.step()
    weights = load_file(shared / "out" / "model.safetensors")
    assert not none and set(weights) == {name for name, _ in reference.named_parameters()}
    for name, item in reference.named_parameters():
        torch.testing.assert_close(expected[name][0], item.detach(), rtol=0, atol=1e-8)
        torch.testing.assert_close(expected[name][1], optimizer.state[item]["exp_avg"], rtol=0, atol=1e-12)
        assert torch.equal(weights[name], expected[name][0])
    pool.run(1, __file__, "save_shared", plan, graph, state, None, whole)
    (again, _), = pool.run(1, __file__, "load_shared", plan, graph, state, None, whole)
    for folder, wanted in ((shared, expected), (whole, again)):
        for found, rows in pool.run(2, __file__, "load_shared", plan, graph, state, None, folder):
            assert rows
            for name, tensors in found.items():
                for tensor, full in zip(tensors, wanted[name], strict=True):
                    assert torch.equal(tensor, full[rows[name]] if name in rows else full), name


def test_a_loader_with_a_state_of_its_own_continues_exactly():
    """torchdata's StatefulDataLoader, shuffled, in the middle of its second epoch."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        torch.manual_seed(3)
        data = [{"x": torch.tensor(float(number))} for number in range(10)]
        return Batches(loaders.StatefulDataLoader(data, batch_size=2, shuffle=True))

    def values(batches, count):
        return [batch["x"].tolist() for batch in itertools.islice(batches, count)]

    whole = values(make(), 12)
    first = make()
    start = values(first, 7)
    state = first.state()
    pack_state(state)
    torch.manual_seed(99)  # what comes next is in the state, not in the process's generator
    second = make()
    second.resume(state)
    assert start + values(second, 3) == whole[:10]


def plain(graph, rows, seed):
    return [{"x": rows + seed}]


def per_copy(graph, rows, seed, copy, factor=1):
    return [{"x": factor * copy}]


def test_each_copy_has_its_own_data(monkeypatch):
    """A source says which copy it loads for; one that cannot is refused where there are several."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    graph = cases.chain_graph()
    made = make_batches(DataConfig("test_checkpoints:per_copy", options={"factor": 3}), graph, 8, 0, copy=2)
    assert next(made) == {"x": 6}
    assert next(make_batches(DataConfig("test_checkpoints:plain"), graph, 8, 1)) == {"x": 9}
    with pytest.raises(InputError, match="takes no 'copy', so every data-parallel copy"):
        make_batches(DataConfig("test_checkpoints:plain"), graph, 8, 1, copy=1)


def test_what_a_loader_may_save():
    """Only what is read back without running code; and a loader that gives nothing is an error, not an endless loop."""
    with pytest.raises(RunError, match="holds more than tensors, numbers, texts"):
        pack_state({"loader": Path("/tmp")})
    with pytest.raises(InputError, match="gives no batch"):
        next(Batches([]))
    batches = Batches([{"x": 1}, {"x": 2}])
    assert [next(batches)["x"] for _ in range(5)] == [1, 2, 1, 2, 1]
    again = Batches([{"x": 1}, {"x": 2}])
    again.resume(batches.state())
    assert next(again)["x"] == 2
