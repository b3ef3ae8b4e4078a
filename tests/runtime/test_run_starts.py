"""How a run begins: anew in a folder of its own, or from a checkpoint of the same run; anything else is one line."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kill_saves
import pytest
import runtime_cases as cases
import torch

from mipipe.graphs.errors import InputError, RunError
from mipipe.runtime.checkpoints.checkpoint_files import share_out
from mipipe.runtime.checkpoints.checkpoint_folder import complete, forget, latest, read_owner, read_state, write_owner
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.checkpoints.data_state import read_loader
from mipipe.runtime.checkpoints.folder_lock import FolderLock
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import CheckpointConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.launching.prepare import check_start
from mipipe.runtime.train.training import Trainer


def config_of(folder, steps=3, **changes):
    saved = CheckpointConfig(str(folder / "c"), every=1, keep=2, asynchronous=False, accept=changes.pop("accept", ()))
    return TrainConfig(steps, checkpoint=saved, **{"metrics": str(folder / "metrics.jsonl"),
                                                   "optimizer": OptimizerConfig("adamw", 1e-2), **changes})


def trainer(folder, steps=3, layers=2, said=None, loader=None, **changes):
    config = config_of(folder, steps, **changes)
    problem = cases.problem_of(cases.chain_graph(layers), kill_saves.COUNT, 1)
    plan = cases.plan_of(problem, [(list(range(layers + 1)), [0])], [[0, 0]], ["0F0 0B0 0F1 0B1"])
    engine = Engine(plan, cases.chain_graph(layers), cases.chain_state(layers))
    return Trainer(engine, config, Batches(loader or kill_saves.Loader()),
                   say=(said if said is not None else []).append)


def steps_in(folder):
    return [path.name for path in complete(folder / "c")]


def test_a_fresh_run_refuses_a_folder_with_checkpoints(tmp_path):
    """Whoever starts it, with or without restarts; neither checkpoints nor metrics change."""
    trainer(tmp_path).run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    owner = read_owner(tmp_path / "c").id
    with pytest.raises(InputError, match=f"has checkpoints already, up to step-3 of run {owner}; continue it with"):
        trainer(tmp_path).run()
    with pytest.raises(InputError, match="has checkpoints already"):
        check_start(config_of(tmp_path), Start.FRESH)
    for run_id in (None, "another"):  # torchrun's restart of a run that never began
        fresh = trainer(tmp_path)
        if run_id is not None:
            assert fresh.checkpoints.begin(Start.RESTART, run_id) is None
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    after[tmp_path / "c" / "run.json"] = before[tmp_path / "c" / "run.json"]
    assert after == before


def test_resume_needs_a_checkpoint(tmp_path):
    """A mistyped folder is not made; without whole checkpoints nothing is emptied; --resume-if-any starts anew."""
    with pytest.raises(InputError, match="c: no such folder, so --resume has nothing to continue"):
        trainer(tmp_path).begin(Start.RESUME)
    assert not (tmp_path / "c").exists()
    (tmp_path / "c" / "step-4").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for attempt in (lambda: trainer(tmp_path).begin(Start.RESUME),
                    lambda: check_start(config_of(tmp_path), Start.RESUME)):
        with pytest.raises(InputError, match="has no complete checkpoint, so --resume has nothing"):
            attempt()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    with pytest.raises(InputError, match="has no 'checkpoint', so --resume"):
        check_start(TrainConfig(3), Start.RESUME)
    made = trainer(tmp_path)
    assert made.begin(Start.RESUME_IF_ANY) == 0 and made.restored is None
    made.run()
    assert (tmp_path / "metrics.jsonl.previous").read_text() == '{"step": 1}\n'
    again = trainer(tmp_path, 4)
    assert again.begin(Start.RESUME_IF_ANY) == 3 and again.restored.name == "step-3"


@pytest.mark.parametrize("change, message, accepted", [
    ({"seed": 7}, "seed was 0 and is 7 now", "seed"),
    ({"optimizer": OptimizerConfig("sgd", 1e-2)}, "optimizer was adamw and is sgd now", "optimizer"),
    ({"data": DataConfig("else")}, "data.source was stdlib and is else now", "data"),
    ({"data": DataConfig(options={"max_bytes": 9})}, r'data.options was {} and is {"max_bytes": 9} now', "data"),
    ({"layers": 3}, "graph was [0-9a-f]{16} and is [0-9a-f]{16} now", None),
])
def test_another_run_is_not_resumed(tmp_path, change, message, accepted):
    """What differs is named; it can be allowed, but not another graph."""
    trainer(tmp_path).run()
    with pytest.raises(InputError, match=f"step-3: is of another run .*: {message}; give the same") as caught:
        trainer(tmp_path, 4, **change).begin(Start.RESUME)
    assert "\n" not in str(caught.value)
    if accepted is not None:
        assert f"accept: [{accepted}]" in str(caught.value)
        made = trainer(tmp_path, 4, accept=(accepted,), **change)
        assert len(made.run(made.begin(Start.RESUME))) == 1


def test_what_a_resumed_run_may_change_is_said(tmp_path):
    trainer(tmp_path).run()
    said = []
    made = trainer(tmp_path, 4, said=said, optimizer=OptimizerConfig("AdamW", 1e-3), clip=1.0,
                   schedule=ScheduleConfig("constant", warmup=0))
    made.run(made.begin(Start.RESUME))
    owner = read_owner(tmp_path / "c").id
    assert said == [f"resumed run {owner}: optimizer.lr was 0.01 and is 0.001 from here on",
                    f"resumed run {owner}: clip was null and is 1.0 from here on"]
    assert read_state(latest(tmp_path / "c")).run.id == owner


@pytest.mark.parametrize("name, before, now, needed", [
    ("adamw", {}, {"amsgrad": True}, "max_exp_avg_sq"), ("rmsprop", {}, {"centered": True}, "grad_avg"),
    ("rmsprop", {}, {"momentum": 0.9}, "momentum_buffer"), ("adamw", {"amsgrad": True}, {}, ""),
    ("sgd", {}, {"momentum": 0.9}, ""), ("adamw", {}, {"betas": [0.5, 0.6]}, ""),
])
def test_options_that_need_other_state(tmp_path, name, before, now, needed):
    """Found when the run is resumed, not as a KeyError of its first step; those that do not are only said."""
    trainer(tmp_path, optimizer=OptimizerConfig(name, 1e-2, before)).run()
    made = trainer(tmp_path, 4, optimizer=OptimizerConfig(name, 1e-2, now))
    if needed:
        with pytest.raises(InputError, match=f"its options need the state '{needed}', which the checkpoint"):
            made.begin(Start.RESUME)
    else:
        assert len(made.run(made.begin(Start.RESUME))) == 1


def test_two_runs_in_one_folder(tmp_path):
    """Pruning keeps to its own; the folder's own run is resumed; where nobody knows whose it is, both are named."""
    trainer(tmp_path, 9).run()
    old = tmp_path / "c"
    assert steps_in(tmp_path) == ["step-8", "step-9"]
    other = tmp_path / "other"
    trainer(other, 4).run()
    for path in complete(other / "c"):
        shutil.copytree(path, old / path.name)
    mine = read_owner(other / "c")
    forget(old, 1, mine.id)
    assert steps_in(tmp_path) == ["step-4", "step-8", "step-9"]
    (old / "run.json").unlink()
    with pytest.raises(InputError, match="has checkpoints of several runs"):
        trainer(tmp_path, 10).begin(Start.RESUME)
    write_owner(old, mine)
    made = trainer(tmp_path, 6)
    assert made.begin(Start.RESUME) == 4
    made.run(4)
    assert steps_in(tmp_path) == ["step-5", "step-6", "step-8", "step-9"]


def test_a_restart_goes_on_with_its_own_run_only(tmp_path):
    """What the folder held before, or holds of others, is nothing to it."""
    trainer(tmp_path, 3).run()
    own = read_owner(tmp_path / "c").id
    made = trainer(tmp_path, 5)
    assert made.begin(Start.RESTART, own) == 3 and made.run_id == own
    assert trainer(tmp_path, 5).begin(Start.RESTART, "f" * 12) == 0


@pytest.mark.parametrize("state", [
    "", "[]", "3", "null", "{}", '{"format": "mipipe.checkpoint", "version": 2, "step": 3}', "[" * 50,
    '{"format": "mipipe.checkpoint", "version": 3, "step": "three"}',
    lambda data: {**data, "step": 2}, lambda data: {**data, "step": -1}, lambda data: {**data, "copies": 0},
    lambda data: {**data, "files": {"../../x": [1, "a"]}}, lambda data: {**data, "files": [1]},
    lambda data: {**data, "files": {"..": [1, "a"]}},
    lambda data: {**data, "run": {}}, lambda data: {**data, "more": 1},
    lambda data: {**data, "files": {name: [1] for name in data["files"]}},
])
def test_a_state_of_another_shape_is_one_line(tmp_path, state):
    trainer(tmp_path).run()
    file = latest(tmp_path / "c") / "state.json"
    file.write_text(state if isinstance(state, str) else json.dumps(state(json.loads(file.read_text()))))
    for attempt in (lambda: trainer(tmp_path).begin(Start.RESUME),
                    lambda: check_start(config_of(tmp_path), Start.RESUME)):
        with pytest.raises(InputError, match=r"checkpoint .*step-3.*; remove the folder to use an earlier") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_loaders_state_that_is_not_listed_is_not_read(tmp_path):
    """Nobody says that it is whole."""
    trainer(tmp_path).run()
    file = latest(tmp_path / "c") / "state.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "files": {name: item for name, item in data["files"].items()
                                                  if name != "data-0.pt"}}))
    with pytest.raises(InputError, match=r"step-3: state\.json does not list data-0\.pt; remove the folder"):
        trainer(tmp_path).begin(Start.RESUME)


@pytest.mark.parametrize("damage", [b"\xff\xfe{}\n", b"\0" * 40, b"[" * 100_000 + b"\n", b"[1]\n3\n",
                                    b'{"step": "x"}\n'], ids=["bytes", "zeros", "deep", "lists", "text"])
def test_damaged_metrics_end_no_resumed_run(tmp_path, damage):
    """What is readable before the damage stays."""
    trainer(tmp_path).run()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + damage)
    made = trainer(tmp_path, 5)
    made.run(made.begin(Start.RESUME))
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("how", [{"start": Start.RESTART, "run_id": "another"},
                                 {"start": Start.RESUME_IF_ANY, "again": True}])
def test_a_restart_leaves_the_metrics_of_another_run_alone(tmp_path, how):
    """A run that dies before its first checkpoint starts anew: what lies in the file then is its own."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    first = trainer(tmp_path)
    first.run()
    first.checkpoints.close()
    shutil.rmtree(tmp_path / "c")
    again = trainer(tmp_path)
    assert again.begin(**how) == 0
    again.run()
    assert (tmp_path / "metrics.jsonl.previous").read_text() == '{"step": 1}\n'
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["step-4", "step-4.partial"])
@pytest.mark.parametrize("kind", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_lies_in_a_checkpoints_place_makes_way(tmp_path, name, kind):
    trainer(tmp_path).run()
    kind(tmp_path / "c" / name)
    made = trainer(tmp_path, 4)
    made.run(made.begin(Start.RESUME))
    assert steps_in(tmp_path) == ["step-3", "step-4"] and read_state(tmp_path / "c" / "step-4").step == 4


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_checkpoint_runs_no_code(tmp_path):
    """There is nothing to unpickle in it but the loader's state, and torch's restricted reader does that."""
    trainer(tmp_path).run()
    folder, trace = latest(tmp_path / "c"), tmp_path / "ran"
    assert sorted(path.name for path in folder.iterdir()) == ["data-0.pt", "state.json", "tensors-0.safetensors"]
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    assert trainer(tmp_path).begin(Start.RESUME) == 3
    for write in (lambda path: torch.save({"taken": 3, "loader": Hostile(trace)}, path),
                  lambda path: path.write_bytes(pickle.dumps(Hostile(trace))),
                  lambda path: torch.save([1], path), lambda path: path.write_bytes(b"")):
        write(folder / "data-0.pt")
        with pytest.raises(InputError, match=r"data-0\.pt (cannot be read|holds no loader's state)"):
            read_loader(folder / "data-0.pt")
    assert not trace.exists()


HOLDING = """
import sys, time
from pathlib import Path
from mipipe.runtime.checkpoints.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_jobs_in_one_folder(tmp_path):
    """The second is told who the first is; a job that was killed holds nothing, children or not."""
    (tmp_path / "c").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "c")], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        for attempt in (lambda: check_start(config_of(tmp_path), Start.FRESH), lambda: trainer(tmp_path).begin()):
            with pytest.raises(InputError, match=f"another job is using it .process {first.pid} on .*since"):
                attempt()
        first.send_signal(signal.SIGKILL)
    check_start(config_of(tmp_path), Start.FRESH)
    child = os.fork()  # such as a data loader's worker that outlives the job
    if child == 0:
        signal.pause()
    try:
        FolderLock(tmp_path / "c", patience_s=1.0).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("change, message", [
    (lambda file: {"checkpoint": CheckpointConfig(f"{file}/c", every=1000)}, "/c: cannot be written: Not a directory"),
    (lambda file: {"checkpoint": CheckpointConfig(str(file))}, "cannot be written"),
    (lambda file: {"metrics": f"{file}/m.jsonl"}, "metrics: .*cannot be written: File exists"),
    (lambda file: {"metrics": f"{file.parent}/m", "timeline": f"{file.parent}/./m"}, "metrics and timeline both write"),
    (lambda file: {"metrics": str(file.parent)}, "metrics: .* is a folder, expected a file"),
    (lambda file: {"timeline": f"{file}/t.json"}, "timeline: .*cannot be written"),
    (lambda file: {"profile": f"{file}/t.json"}, "profile: .*cannot be written"),
    (lambda file: {"tensorboard": f"{file}/t"}, "tensorboard: .*cannot be written"),
    (lambda file: {"metrics": "/proc/nothing/m.jsonl"}, "metrics: .*cannot be written"),
])
def test_what_cannot_be_written_is_said_before_the_first_step(tmp_path, change, message):
    """Not after 2,000 steps."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=message) as caught:
        check_start(dataclasses.replace(TrainConfig(2000), **change(file)), Start.FRESH)
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == [file]


def test_half_written_checkpoints_go(tmp_path):
    """What a killed run left is removed when the folder's next run begins."""
    (tmp_path / "c" / "step-7.partial").mkdir(parents=True)
    trainer(tmp_path).run()
    left = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert left == [".lock", "run.json", "step-2", "step-3"]


def test_each_tensor_is_written_once_and_evenly():
    """By a rank that holds it."""
    held = [{"a": 10, "b": 10, "own0": 5}, {"a": 10, "b": 10, "own1": 7}, {}]
    shares = share_out(held)
    assert sorted(name for names in shares for name in names) == ["a", "b", "own0", "own1"]
    assert all(names <= set(found) for names, found in zip(shares, held, strict=True))
    assert [sum(found[name] for name in names) for names, found in zip(shares, held, strict=True)] == [15, 17, 0]


def test_dtypes_come_back_to_the_last_bit(tmp_path):
    from mipipe.runtime.checkpoints.checkpoint_files import DTYPES, read_tensor, stored_tensors, write_tensors
    kinds = {name: dtype for name, dtype in DTYPES.items() if not dtype.is_complex}
    tensors = {name: torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in kinds.items()}
    tensors |= {"complex": torch.tensor([1 + 2j, 3j])}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).reshape(2, 3).T}
    write_tensors(tmp_path / "tensors-0.safetensors", tensors)
    stored = stored_tensors(tmp_path, ["tensors-0.safetensors"])
    for name, tensor in tensors.items():
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
        read_tensor(tmp_path, stored[name], target)
        assert torch.equal(target if name == "complex" else target.float(),
                           tensor if name == "complex" else tensor.float()), name
    with pytest.raises(RunError, match=r"odd is of torch\.complex128, which safetensors"):
        write_tensors(tmp_path / "x", {"odd": torch.zeros(1, dtype=torch.complex128)})
