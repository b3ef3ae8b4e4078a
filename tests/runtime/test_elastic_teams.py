"""``mipipe train --elastic`` with teams: other degrees after a loss or on fewer devices, the losses of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import runtime_equal as equal
import runtime_experts as ex
import torch
import yaml
from runtime_models import ROWS_OF_BYTES

from mipipe.graphs.capture.model import capture
from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.costs.collectives import Fabric, Level
from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import digest, load, save
from mipipe.graphs.topology import Link
from mipipe.planner.execution.lower import lower
from mipipe.planner.plan import Plan
from mipipe.planner.schedules import BASELINES
from mipipe.planner.team import Team
from mipipe.planner.teams.again import TeamTask, with_task
from mipipe.planner.teams.as_team import degrees_of
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.runtime.checkpoints.checkpoint_folder import CheckpointState
from mipipe.runtime.checkpoints.checkpoint_run import RunIdentity
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import CheckpointConfig, DataConfig, TrainConfig, read_train_config
from mipipe.runtime.train.data import make_batches
from mipipe.runtime.train.launching.elastic import Running, Supervisor, train_elastic
from mipipe.runtime.train.launching.prepare import PreparedRun, check_world, read_job
from mipipe.runtime.train.models import initial_weights
from mipipe.runtime.train.training import Trainer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

MICROBATCHES, STEPS, MORE = 6, 6, 10
"""Microbatches of a step over all copies; steps of the first run, and of the one that goes on."""
MACHINE = Machine(DeviceKind("slow", {"float64": 10**7}, 10**9, 10**9, 0, "made up"),
                  Fabric((Level("host", 8, Link(1000, 10**9)),)), 10**9, "float64")
"""So slow that every device pays."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a graph in float64 that was captured by name, and a plan of two teams of two for it."""
    folder = tmp_path_factory.mktemp("elastic")
    graph = capture("runtime_models:byte_model_64")
    save(graph, folder / "graph.json")
    rows = ROWS_OF_BYTES * MICROBATCHES
    plan = evaluate_teams(Pricer(model_pieces(graph), MACHINE), Degrees(2, 2, microbatch=ROWS_OF_BYTES), rows).plan
    plan = replace(plan, problem=plan.problem.replace(graph_digest=digest(graph)))
    for name, given in (("free", {}), ("fixed", {"tensor": 2})):
        task = TeamTask(MACHINE, TeamOptions(given, time_limit_s=4.0, order=False))
        save(with_task(plan, task), folder / f"{name}.json")
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers find the test's model by name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def write_config(folder, name, steps, orders=()):
    """A train config in a file of its own; its loader kills ranks as told."""
    (folder / "orders").write_text("\n".join(orders))
    data = {"steps": steps, "model": "runtime_models:byte_model_64", "optimizer": {"name": "adamw", "lr": 0.01},
            "data": {"source": "runtime_models:KillInTurn", "options": {"order": str(folder / "orders")}},
            "metrics": str(folder / "metrics.jsonl"), "timeout_s": 60.0,
            "checkpoint": {"folder": str(folder / "kept"), "every": 2}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def alone(files, config, done=None):
    """The losses of the same training in this process; ``done``: those of so many steps, with a checkpoint."""
    graph, settings = load(files / "graph.json", OperatorGraph), read_train_config(config)
    single = next(item for item in BASELINES if item.name == "GPipe").plan(equal.problem(graph, 1, MICROBATCHES, 8))
    settings = replace(settings, checkpoint=None, metrics=None) if done is None else replace(settings, steps=done)
    batches = make_batches(settings.data, graph, MICROBATCHES * ROWS_OF_BYTES, settings.seed)
    return Trainer(Engine(single, graph, initial_weights(graph, settings)), settings, batches).run()


@pytest.mark.slow
def test_a_member_is_lost_and_then_fewer_devices_are_found(files, tmp_path):
    """Two teams of two lose a member by SIGKILL: three workers go on from the checkpoint with other degrees. The next
    command of more steps finds two devices, where the tensor degree that was fixed is kept. All losses are those of one
    process, to 1e-12; every line of the terminal says what happens."""
    def command(plan, config, *more):
        return subprocess.run([sys.executable, "-m", "mipipe.cli.main", "train", "--plan", str(files / f"{plan}.json"),
                               "--graph", str(files / "graph.json"), "--config", str(config), "--device", "cpu",
                               "--elastic", "--timeout", "300", "--json", *more], capture_output=True, text=True,
                              timeout=600)

    first = command("free", write_config(tmp_path, "first", STEPS, ["3 4 kill"]))
    assert first.returncode == 0, first.stderr
    _, lost, degrees, going_on = first.stderr.splitlines()
    assert lost == "rank 3 lost: planning for 3 devices"
    assert degrees == "degrees were ranks=2,tensor=2,copies=1, are ranks=1,copies=3 from here on"
    assert going_on.startswith("starting with step 3 of 6 from checkpoint")
    again = load(tmp_path / "kept" / "plan-3-devices.json", Plan)
    assert degrees_of(again).devices == 3 and again.problem.num_microbatches == 2

    config = write_config(tmp_path, "more", MORE)
    second = command("fixed", config, "--processes", "2", "--resume")
    assert second.returncode == 0, second.stderr
    found, degrees, going_on = second.stderr.splitlines()
    assert found.endswith(" is for 4 devices, 2 are here: planning for 2 devices")
    assert degrees == "degrees were ranks=2,tensor=2,copies=1, are ranks=1,tensor=2,copies=1 from here on"
    assert going_on.startswith("starting with step 7 of 10 from checkpoint")
    losses = json.loads(second.stdout)["losses"]
    assert len(losses) == MORE and losses == pytest.approx(alone(files, config), rel=1e-12)


def supervised(files, folder, monkeypatch, losses, plan="free", steps=STEPS, **options):
    """What a supervisor says and starts (devices, and the degrees of the plan on them) where attempts end with the loss
    of these ranks, one set after the other, the last with success."""
    said, started, left = [], [], iter(losses)

    def attempt(command, watch, devices, timeout_s):
        words = command(report=str(folder))
        started.append((devices, degrees_of(load(words[words.index("--plan") + 1], Plan)).text()))
        lost = next(left, None)
        return (None if lost is None else RunError("killed")), lost or set(), (0, "")

    monkeypatch.setattr("mipipe.runtime.train.launching.elastic.attempt", attempt)
    options = {"device": "cpu", **options}
    train_elastic(files / f"{plan}.json", files / "graph.json", write_config(folder, "run", steps),
                  lambda problem: pytest.fail("planned for single devices"), say=said.append, **options)
    return said, started


def test_what_a_supervisor_of_teams_does(files, tmp_path, monkeypatch):
    """A spare device takes a lost one's place, with one plan; then degrees change, and again. Where fewer devices are
    faster, or what is fixed needs fewer, some are idle, and take a lost one's place."""
    said, started = supervised(files, tmp_path, monkeypatch, [{1}, {3}, {0}], num_processes=5)
    assert said == ["rank 1 lost: going on with 1 device that was spare", "rank 3 lost: planning for 3 devices",
                    "degrees were ranks=2,tensor=2,copies=1, are ranks=1,copies=3 from here on",
                    "rank 0 lost: planning for 2 devices",
                    "degrees were ranks=1,copies=3, are ranks=1,copies=2 from here on"]
    assert started == [([0, 1, 2, 3], "ranks=2,tensor=2,copies=1"), ([0, 2, 3, 4], "ranks=2,tensor=2,copies=1"),
                       ([0, 2, 3], "ranks=1,copies=3"), ([2, 3], "ranks=1,copies=2")]
    said, started = supervised(files, tmp_path, monkeypatch, [{1}, {0}], "fixed")
    assert said == ["rank 1 lost: planning for 3 devices", "degrees were ranks=2,tensor=2,copies=1, are"
                    " ranks=1,tensor=2,copies=1 from here on; 1 device idle",
                    "rank 0 lost: going on with 1 device that was spare"]
    assert [devices for devices, _ in started] == [[0, 1, 2, 3], [0, 2], [2, 3]]


def test_devices_that_are_not_here_are_no_spare_ones(files, tmp_path, monkeypatch):
    """Else a lost GPU would be taken again, as none of those that are told of could be hidden."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(InputError, match="--processes 5: torch sees 4 CUDA devices on this host; give at most as many"):
        supervised(files, tmp_path, monkeypatch, [{1}], num_processes=5, device="cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    _, started = supervised(files, tmp_path, monkeypatch, [{1}], num_processes=5, device="cuda")
    assert [devices for devices, _ in started] == [[0, 1, 2, 3], [0, 2, 3, 4]]


@pytest.mark.parametrize("shared", [1, 2])
def test_copies_that_share_experts_are_fewer(files, tmp_path, shared):
    """Of six devices one is lost: the best degrees of what is left, whatever number the graph was captured with. Plans
    of single devices lose no copy of those that share."""
    copies = 2
    _, graph = ex.captured()
    graph = replace(graph, source={**graph.source, "expert_parallel": shared})
    degrees = Degrees(3, copies=copies, expert=copies, microbatch=equal.ROWS)
    plan = evaluate_teams(Pricer(model_pieces(graph), MACHINE), degrees, 4 * equal.ROWS).plan
    plan = with_task(replace(plan, problem=plan.problem.replace(graph_digest=digest(graph))),
                     TeamTask(MACHINE, TeamOptions({"zero": 1}, time_limit_s=12.0, order=False)))
    config = TrainConfig(4, checkpoint=CheckpointConfig(str(tmp_path), every=1))
    job = PreparedRun(plan, lower(plan), graph, config)
    check_world(job, 6)
    with pytest.raises(InputError, match="were planned to be shared by 2 copies of the plan, but the run has 3; start"):
        check_world(job, 9)
    plain = Running(replace(plan, team=None), tmp_path / "plan.json", copies)
    supervisor = Supervisor(job, str(tmp_path), lambda problem: pytest.fail("of single devices"), None, 1, str)
    assert supervisor.fitted(Running(plan, tmp_path / "plan.json", copies), range(5), {5}).text() == "ranks=1,copies=4"
    if shared == 1:
        assert supervisor.fitted(plain, range(5), {5}).copies == 1
        return
    with pytest.raises(RunError, match="rank 5 lost, of copies that share experts, 5 left, but at least 6 must run"):
        supervisor.fitted(plain, range(5), {5}, RunError("killed"))
    assert supervisor.fitted(replace(plain, copies=4), range(11), {11}).copies == 2


def test_where_a_supervisor_of_teams_gives_up(files, tmp_path, monkeypatch):
    """Too few devices are left, or here; a plan of teams does not say what it was made for."""
    with pytest.raises(RunError, match="ranks 0, 1 lost, 2 left, but at least 3 must run; checkpoints are in"):
        supervised(files, tmp_path, monkeypatch, [{0, 1}], min_ranks=3)
    with pytest.raises(RunError, match="is for 4 devices, 2 are here, 2 can run, but at least 3 must run"):
        supervised(files, tmp_path, monkeypatch, [], num_processes=2, min_ranks=3)
    save(replace(load(files / "free.json", Plan), team=Team({"tensor": 2}), provenance={}), files / "by_hand.json")
    with pytest.raises(InputError, match="does not say what devices it was made for, so that it cannot be made again"):
        supervised(files, tmp_path, monkeypatch, [], "by_hand")


class Own:
    """A loader with a position of its own, which nobody else can divide."""

    def __init__(self, graph, rows, seed, copy=0):
        self._inner = make_batches(DataConfig(), graph, rows, seed, copy)

    def __iter__(self):
        return self._inner

    def state_dict(self):
        return {"taken": self._inner.taken}

    def load_state_dict(self, state):
        self._inner.resume(state)


def one_stream(graph, rows, seed):
    """A loader that knows nothing of copies."""
    return make_batches(DataConfig(), graph, rows, seed)


@pytest.mark.parametrize("source, done, copies, said", [
    pytest.param("stdlib", 2, 3, (), marks=pytest.mark.slow),
    pytest.param("test_elastic_teams:one_stream", 2, 1, ("one_stream",), marks=pytest.mark.slow),
    ("test_elastic_teams:Own", 0, 3, ()), ("test_elastic_teams:Own", 2, 1, ("Own",)),
    ("stdlib", "unsaid", 1, ("stdlib",))])
def test_copies_are_as_many_as_the_data_can_be_divided_among(files, tmp_path, source, done, copies, said):
    """Three devices with three copies, if each of them gets its part of the data from the checkpoint's position on;
    else, or where an older checkpoint does not say, one copy of three."""
    config = write_config(tmp_path, "data", 9)
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "data": {"source": source}}))
    if done == "unsaid":
        folder = tmp_path / "kept" / "step-2"
        folder.mkdir(parents=True)
        torch.save({"taken": 2}, folder / "data-0.pt")
        save(CheckpointState(2, 1, "", RunIdentity("older", 0, "", ""), {}), folder / "state.json")
    elif done:
        alone(files, config, done)
    lines = []
    supervisor = Supervisor(read_job(files / "free.json", files / "graph.json", config), str(tmp_path / "kept"),
                            lambda problem: pytest.fail("planned for single devices"), None, 3, lines.append)
    (tmp_path / "kept").mkdir(exist_ok=True)
    after = supervisor.fitted(Running(load(files / "free.json", Plan), files / "free.json", 1), range(3), set())
    assert (after.copies, after.devices) == (copies, 3)
    assert lines[1:-1] == [f"the position in the data is not divided anew ({source}), so the number of copies stays 1"
                           for _ in said]
    job = read_job(after.path, files / "graph.json", config)
    rows = ROWS_OF_BYTES * job.plan.problem.num_microbatches
    assert rows * after.copies == ROWS_OF_BYTES * MICROBATCHES
