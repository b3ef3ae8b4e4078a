"""Whole runs under torchrun: files in, losses out; workers that fail, hang or are killed."""

import argparse
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runtime_equal as equal
import torch
import torch.distributed as dist
import yaml
from runtime_models import ROWS_OF_BYTES
from safetensors.torch import load_file

from mipipe.graphs.capture.model import capture
from mipipe.graphs.errors import InputError, MipipeError, PlanError, RunError, StoppedError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import load, save, to_data
from mipipe.graphs.topology import Link, Topology
from mipipe.planner.options import PlanOptions, options_of
from mipipe.planner.plan import Plan
from mipipe.planner.schedules import BASELINES
from mipipe.planner.team import Team
from mipipe.planner.timeline import Timeline
from mipipe.runtime import worker
from mipipe.runtime.checkpoints.checkpoint_folder import complete, read_state, verify
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import TrainConfig, read_train_config
from mipipe.runtime.train.data import make_batches
from mipipe.runtime.train.launching.elastic import lost_ranks, topology_left, train_elastic
from mipipe.runtime.train.launching.failures import explain_failure
from mipipe.runtime.train.launching.launch import torchrun_command, train
from mipipe.runtime.train.launching.prepare import read_job
from mipipe.runtime.train.launching.telling import announce, report
from mipipe.runtime.train.models import initial_weights
from mipipe.runtime.train.training import Trainer
from mipipe.runtime.weights.stored_weights import stored_places

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
COUNT, STEPS = 4, 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a graph captured by name, and plans for one and two ranks."""
    folder = tmp_path_factory.mktemp("run")
    graph = capture("runtime_models:byte_model", granularity="module")
    save(graph, folder / "graph.json")
    for ranks in (1, 2):
        problem = equal.problem(graph, ranks, COUNT, 8)
        schedule = next(item for item in BASELINES if item.name == ("GPipe" if ranks == 1 else "ZB-H1"))
        save(schedule.plan(problem), folder / f"plan{ranks}.json")
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers find the test's model by name."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def write_config(folder, name, **changes):
    """A train config in a file of its own."""
    data = {"steps": 4, "seed": 0, "model": "runtime_models:byte_model",
            "optimizer": {"name": "adamw", "lr": 0.01}, "data": {"source": "stdlib"},
            "metrics": str(folder / f"{name}.jsonl"), "timeout_s": 30.0, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def killing(folder, name, orders, delay=0.0):
    """A data source that kills ranks as told."""
    path = folder / f"{name}.orders"
    path.write_text("\n".join(orders))
    return {"source": "runtime_models:KillOnce", "options": {"order": str(path), "delay": delay}}


@functools.cache
def undisturbed(files, steps, delay=0.0):
    """The result of a run of two ranks with everything on that writes a file; one launch for several tests."""
    config = write_config(files, f"calm{steps}", steps=steps, data=killing(files, f"calm{steps}", [], delay=delay),
                          timeline=str(files / "measured.json"), profile=str(files / "profile.json"),
                          tensorboard=str(files / "board"),
                          save={"folder": str(files / f"saved{steps}"), "shard": "20KB"})
    return train(files / "plan2.json", files / "graph.json", config, timeout_s=300)


def alone(files, steps):
    """The losses and final weights of the same training on one rank, in this process."""
    config = read_train_config(write_config(files, "alone", steps=steps, metrics=None,
                                            data=killing(files, "alone", [])))
    plan, graph = load(files / "plan1.json", Plan), load(files / "graph.json", OperatorGraph)
    engine = Engine(plan, graph, initial_weights(graph, config))
    trainer = Trainer(engine, config, make_batches(config.data, graph, COUNT * ROWS_OF_BYTES, config.seed))
    return trainer.run(), engine.weights.parameters


def test_two_ranks_train_like_one(files):
    """`train` starts torchrun, the losses fall and equal those of one process; so do the weights that are saved."""
    result = undisturbed(files, STEPS)
    losses, weights = alone(files, STEPS)
    assert len(result.losses) == STEPS and result.losses[-1] < result.losses[0]
    assert result.losses == pytest.approx(losses, rel=1e-5)
    saved = stored_places(files / f"saved{STEPS}")
    assert len(set(saved.values())) > 1 and set(saved) == set(weights)
    for name, file in saved.items():
        torch.testing.assert_close(load_file(file)[name], weights[name].detach(), rtol=1e-3, atol=1e-5)


def test_what_a_run_leaves_behind(files):
    """Metrics under torchtitan's names, TensorBoard scalars, the measured timeline, a profile of each rank."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    result = undisturbed(files, STEPS)
    assert {"step", "loss_metrics/global_avg_loss", "grad_norm", "lr", "throughput(tps)", "memory/max_resident(GiB)",
            "time_metrics/end_to_end(s)", "time_metrics/data_loading(s)"} <= set(result.records[0])
    assert 0 < result.records[-1]["bubble_ratio/predicted"] < 1 and 0 <= result.records[-1]["bubble_ratio/measured"] < 1
    assert load(files / "measured.json", Timeline).origin == "measured"
    board = EventAccumulator(str(files / "board"))
    board.Reload()
    scalars = [event.value for event in board.Scalars("loss_metrics/global_avg_loss")]
    assert scalars == pytest.approx(result.losses, rel=1e-6)
    for rank in range(2):
        assert json.loads((files / f"profile.rank{rank}.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_a_failing_loader_ends_the_run_in_a_line_that_says_where(files, capfd):
    """Within seconds, with the loader's own file; no worker is left."""
    config = write_config(files, "bad", data=killing(files, "bad", ["1 2 fail"]))
    start = time.monotonic()
    with pytest.raises(MipipeError, match=r"step 2: data: runtime_models:KillOnce failed at its batch 2: .*loader that"
                                          r" fails"):
        train(files / "plan2.json", files / "graph.json", config, timeout_s=300)
    assert time.monotonic() - start < 200
    assert "Traceback" not in capfd.readouterr().err
    assert not workers_of(config)


def workers_of(config):
    """Processes that name this config on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(config).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_killed_ranks_resume_and_a_lost_one_is_done_without(files):
    """From the command line. SIGKILL on one rank: torchrun restarts, and no loss differs in a bit. The second, on the
    other, uses up the restarts: the supervisor plans for one rank as the first plan was made, and Adam's state goes on
    there."""
    orders = ["0 5 kill", "1 11 kill"]
    config = write_config(files, "killed", steps=STEPS, data=killing(files, "killed", orders),
                          checkpoint={"folder": str(files / "killed"), "every": 2})
    options = PlanOptions(time_limit_s=1.0, placement="chain", seed=5)
    plan = load(files / "plan2.json", Plan)
    save(dataclasses.replace(plan, provenance={"options": to_data(options)}), files / "made.json")
    command = [sys.executable, "-m", "mipipe.cli.main", "train", "--plan", str(files / "made.json"), "--graph",
               str(files / "graph.json"), "--config", str(config), "--elastic", "--max-restarts", "1", "--timeout",
               "500", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    losses, calm = json.loads(done.stdout)["losses"], undisturbed(files, STEPS).losses
    assert tuple(losses[:8]) == calm[:8]  # step 8 was on disk when the second was killed
    assert losses == pytest.approx(calm, rel=1e-5)
    first, restart, lost, degrees, last = done.stderr.splitlines()
    assert first == "starting with step 1 of 12 from random weights (seed 0)"
    assert re.match(r"restart 1 \(rank 0 was killed by signal 9 \(SIGKILL\) .*\): starting with step [35] of 12 from ",
                    restart), restart  # says why, and from what
    assert lost == "rank 1 lost: planning for 1 device"
    assert degrees == "degrees were ranks=2,copies=1, are ranks=1,copies=1 from here on"
    assert re.match(r"starting with step (9|11) of 12 from checkpoint .*step-(8|10)$", last), last
    again = load(files / "killed" / "plan-1-devices.json", Plan)
    assert again.problem.graph_digest == plan.problem.graph_digest and again.problem.num_ranks == 1
    assert options_of(again) == options
    assert not (files / "killed.orders").read_text()


@pytest.mark.slow
def test_a_killed_member_of_a_team_comes_back(files):
    """Two ranks of two members: one member is killed, all start again from the checkpoint; losses and the folder that
    is saved are those of one process."""
    plan = load(files / "plan2.json", Plan)
    save(dataclasses.replace(plan, team=Team({"tensor": 2})), files / "teams.json")
    config = write_config(files, "member", steps=STEPS, data=killing(files, "member", ["3 6 kill"]),
                          checkpoint={"folder": str(files / "member"), "every": 2},
                          save={"folder": str(files / "parts")})
    said = []
    result = train(files / "teams.json", files / "graph.json", config, max_restarts=1, timeout_s=400, say=said.append)
    assert any("restart 1 (rank 3 was killed by signal 9" in line for line in said), said
    losses, weights = alone(files, STEPS)
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for name, file in stored_places(files / "parts").items():
        torch.testing.assert_close(load_file(file)[name], weights[name].detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_of_three_is_lost_and_two_go_on(files):
    """Three copies of a plan; the first is killed: its survivors are healthy, and nothing is planned anew."""
    config = write_config(files, "three", steps=8, data={**killing(files, "three", ["0 5 kill"]),
                                                       "source": "runtime_models:KillOneCopy"},
                          checkpoint={"folder": str(files / "three"), "every": 2})
    said = []
    result = train_elastic(files / "plan1.json", files / "graph.json", config, lambda problem: pytest.fail("planned"),
                           copies=3, timeout_s=300, say=said.append)
    assert "rank 0 lost: going on with 2 copies of the plan" in said
    assert len(result.losses) == 8 and not (files / "three.orders").read_text()


def leave_exits(folder, codes, times=None):
    """The agent's report."""
    (folder / "failures.json").write_text(json.dumps({
        rank: {"code": code, "time": (times or {}).get(rank, 0)} for rank, code in codes.items()}))


def test_who_is_lost(tmp_path):
    """Those killed; else those that keep silent while all others say that they waited for them; else nobody."""
    def reports(*entries):
        for path in tmp_path.iterdir():
            path.unlink()
        for rank, attempt, message in entries:
            text = json.dumps({"rank": rank, "attempt": attempt, "message": message, "type": "RunError", "time": rank,
                               "traceback": ""})
            (tmp_path / f"error-rank{rank}.json").write_text(text)

    reports((0, 0, "the peer has failed"))
    leave_exits(tmp_path, {"0": 1, "2": -9})
    assert lost_ranks(tmp_path, 4) == {2}
    leave_exits(tmp_path, {"0": 1, "1": 130})  # asked to end by SIGTERM
    assert lost_ranks(tmp_path, 4) == {1}
    leave_exits(tmp_path, {"0": -9, "1": -15, "2": -15})  # torchrun ended the healthy ones
    assert lost_ranks(tmp_path, 3) == {0}
    leave_exits(tmp_path, {"0": -6, "1": -11, "2": -6})  # watchdogs that waited for the one that crashed
    assert lost_ranks(tmp_path, 3) == {1}
    reports()
    leave_exits(tmp_path, {"1": -6, "2": -6})  # they waited for some that did not even report
    assert lost_ranks(tmp_path, 4) == {0, 3}
    leave_exits(tmp_path, {"0": -6, "1": -6, "2": -6}, {"0": 12, "1": 10, "2": 11})  # the first aborted by itself
    assert lost_ranks(tmp_path, 3) == {1}
    reports((0, 0, "the loss is nan"))
    leave_exits(tmp_path, {"1": -6, "2": -15})
    assert lost_ranks(tmp_path, 3) == set()
    reports((0, 1, "nothing for 5 s; the peer hangs"), (2, 1, "the peer has failed"), (1, 0, "the peer has failed"))
    assert lost_ranks(tmp_path, 3) == {1}
    reports((0, 0, "the loss is nan"), (1, 0, "the peer has failed"))
    assert lost_ranks(tmp_path, 3) == set()


@pytest.mark.parametrize("codes, text", [
    ({"1": -9}, r"rank 1 was killed by signal 9 \(SIGKILL\) \(by hand, or by the kernel for want of memory: see"),
    ({"1": -11, "0": 4}, r"rank 1 was killed by signal 11 \(SIGSEGV\); --resume continues"),
    ({"0": -6, "1": -9, "2": -15}, r"rank 1 was killed by signal 9 \(SIGKILL\)"),
    ({"0": -15, "1": -6}, r"rank 1 was killed by signal 6 \(SIGABRT\); --resume continues"),
    ({"1": -99}, "rank 1 was killed by signal 99; --resume continues"),
    ({"1": -2}, r"rank 1 was ended by signal 2 \(SIGINT\); --resume continues"),
    ({"0": -15, "1": -2}, r"rank 1 was ended by signal 2 \(SIGINT\); --resume continues"),
    ({"1": -15}, "rank 0, instruction 3: the connection is closed"),
    ({"1": 4}, "rank 0, instruction 3: the connection is closed; the peer has failed"),
    ({"1": 7}, r"rank 1 ended with exit code 7 and without a word: code of the model's"),
])
def test_a_killed_worker_is_named(tmp_path, codes, text):
    """Not the survivor who only saw its connection close; a survivor with a cause of its own comes first."""
    def leave(rank, message):
        data = {"rank": rank, "attempt": 0, "message": message, "type": "RunError", "time": 1, "traceback": ""}
        (tmp_path / f"error-rank{rank}.json").write_text(json.dumps(data))

    leave(0, "rank 0, instruction 3: the connection is closed; the peer has failed")
    leave_exits(tmp_path, codes)
    error = explain_failure(tmp_path, tmp_path / "log", 1)
    assert type(error) is RunError and re.match(text, str(error)), str(error)
    leave(0, "step 3: the loss is nan")
    assert str(explain_failure(tmp_path, tmp_path / "log", 1)) == "step 3: the loss is nan"


def test_a_worker_that_is_ended_before_it_can_say_so_is_named(tmp_path):
    """SIGTERM while it still imports: nobody has left a report."""
    leave_exits(tmp_path, {"0": -15, "1": -15}, {"0": 12, "1": 11})
    assert str(explain_failure(tmp_path, tmp_path / "log", 1)).startswith("rank 1 was ended by signal 15 (SIGTERM); --")


@pytest.mark.parametrize("codes, text, cause", [
    ({"0": 7, "1": -15}, "rank 0 ended with exit code 7 and without a word", ""),
    ({"0": 1, "1": -15}, "torchrun ended with status 1: ImportError: no such thing", ""),
    ({"0": 7, "1": -1}, "rank 0 ended with exit code 7 and without a word", ""),
    ({"0": -1, "1": -15}, "rank 0 was ended by signal 1 (SIGHUP); --", "rank 0 was ended by signal 1 (SIGHUP)"),
    ({"1": -2}, "rank 1 was ended by signal 2 (SIGINT); --", "rank 1 was ended by signal 2 (SIGINT)"),
    ({"0": 7, "1": -11}, "rank 1 was killed by signal 11 (SIGSEGV); --", "rank 1 was killed by signal 11 (SIGSEGV)"),
])
def test_who_ended_first_is_told_by_error_and_restart(tmp_path, monkeypatch, codes, text, cause):
    """No worker that was ended for another's sake; nobody has left a report, as none is left at a restart."""
    leave_exits(tmp_path, codes)
    (tmp_path / "log").write_text("ImportError: no such thing\n")
    assert str(explain_failure(tmp_path, tmp_path / "log", 1)).startswith(text)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    announce(str(tmp_path), argparse.Namespace(config=TrainConfig(4), restored=None), 0)
    why = f"restart 1 ({cause})" if cause else "restart 1"
    assert (tmp_path / "said.txt").read_text() == f"{why}: starting with step 1 of 4 from random weights (seed 0)\n"


def test_a_restart_before_the_first_checkpoint_keeps_the_metrics_before_the_run(files, tmp_path):
    """Under --resume-if-any, too, what the run itself has written is not another run's."""
    config = write_config(tmp_path, "early", steps=1, checkpoint={"folder": str(tmp_path / "c")})
    metrics = tmp_path / "early.jsonl"
    metrics.write_text('{"step": 9}\n')
    options = worker.parse_arguments(["--plan", str(files / "plan1.json"), "--graph", str(files / "graph.json"),
                                      "--config", str(config), "--resume-if-any", "--progress", "none"])
    store = dist.HashStore()
    for _ in range(2):
        worker.run(read_job(options.plan, options.graph, options.config), torch.device("cpu"), options, store)
        shutil.rmtree(tmp_path / "c")  # as if it had died before its first
    assert metrics.with_name("early.jsonl.previous").read_text() == '{"step": 9}\n'
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1]


@pytest.mark.parametrize("cause, shown", [(None, False), (RunError("0F0: the peer hangs"), False), (OSError(5), True)])
def test_tracebacks_are_for_what_nobody_expected(tmp_path, capsys, cause, shown):
    """The launcher shows one where something from outside has failed; else the message says all."""
    try:
        raise RunError("rank 0, instruction 3: no luck") from cause
    except RunError as error:
        report(str(tmp_path), error)
    error = explain_failure(tmp_path, tmp_path / "log", 1)
    assert type(error) is RunError and str(error) == "rank 0, instruction 3: no luck"
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_flags_for_several_nodes_pass_through():
    """As they are, in place of --standalone."""
    command = torchrun_command("p", "g", "c", 8, torchrun=["--nnodes", "2", "--rdzv-endpoint", "host:29500"])
    assert command[3:9] == ["--nnodes", "2", "--rdzv-endpoint", "host:29500", "--nproc-per-node", "8"]
    assert "--standalone" in torchrun_command("p", "g", "c", 8)


@pytest.mark.parametrize("ran, lost, count, kept", [
    (3, {1}, 2, [0, 2]), (3, set(), 2, [0, 1]), (3, {0, 1}, 2, [0, 1]), (6, {0, 1, 3, 5}, 2, [1, 2]),
    (6, {1, 2, 4, 5}, 2, [0, 1])])
def test_the_devices_of_a_plan_that_are_left(ran, lost, count, kept):
    """Those that some copy did not lose; else (none lost, spare ones, the same one of several copies) as many of the
    first. Links stay theirs."""
    topology = Topology(Topology.uniform(3).devices, Link(1), Link(2), {"0->2": Link(3), "1->2": Link(4)})
    left = topology_left(topology, ran, lost, count)
    assert [device.name for device in left.devices] == [f"device{number}" for number in kept]
    assert left.overrides == {f"{kept.index(a)}->{kept.index(2)}": link for a, link in ((0, Link(3)), (1, Link(4)))
                              if a in kept and 2 in kept}


def test_elastic_needs_checkpoints_and_ranks(files):
    """Said before anything starts."""
    with pytest.raises(InputError, match="has no 'checkpoint'; --elastic resumes from checkpoints"):
        train_elastic(files / "plan2.json", files / "graph.json", write_config(files, "none"), lambda problem: None)


@pytest.mark.parametrize("lost, error, kind, text", [
    ({1}, RunError("rank 1 was killed"), StoppedError, r"asked to end \(SIGTERM\) between two attempts; all that was"),
    ({0, 1}, RunError("the peer has failed"), RunError, "ranks 0, 1 lost, 0 left, but at least 1 must run"),
    ({0, 1}, StoppedError("stopped after step 3"), StoppedError, "stopped after step 3"),
])
def test_an_elastic_run_that_cannot_go_on(files, monkeypatch, lost, error, kind, text):
    """Asked to end while it plans for what is left; nobody is left, by accident or because all were asked to end."""
    config = write_config(files, "ends", checkpoint={"folder": str(files / "ends")})
    attempts, handler = [], signal.getsignal(signal.SIGTERM)

    def attempted(command, watch, devices, timeout_s):
        attempts.append(devices)
        return error, lost, (0, "")

    def replan(problem):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(files / "plan1.json", Plan)

    monkeypatch.setattr("mipipe.runtime.train.launching.elastic.attempt", attempted)
    with pytest.raises(kind, match=text):
        train_elastic(files / "plan2.json", files / "graph.json", config, replan)
    assert attempts == [[0, 1]] and signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_ended(files):
    """The whole tree of processes goes."""
    config = write_config(files, "slow", steps=1000, data=killing(files, "slow", [], delay=0.2))
    with pytest.raises(RunError, match="did not end within"):
        train(files / "plan2.json", files / "graph.json", config, timeout_s=8)
    deadline = time.monotonic() + 10
    while workers_of(config) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not workers_of(config)


def test_no_worker_outlives_the_command(files):
    """Whoever kills ``mipipe train`` has killed the run."""
    config = write_config(files, "orphan", steps=1000, data=killing(files, "orphan", [], delay=0.2))
    process = subprocess.Popen([sys.executable, "-m", "mipipe.cli.main", "train", "--plan", str(files / "plan2.json"),
                                "--graph", str(files / "graph.json"), "--config", str(config)])
    deadline = time.monotonic() + 60
    while len(workers_of(config)) < 4 and time.monotonic() < deadline:  # the command, torchrun, two workers
        time.sleep(0.1)
    process.kill()
    process.wait()
    while workers_of(config) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline


@pytest.mark.parametrize("change, error, message", [
    ({"stepz": 3}, InputError, "stepz"),
    ({"batch": 7}, InputError, "batch is 7, but 4 microbatches of 2 rows make 8"),
    ({"optimizer": {"name": "adamwow"}}, InputError, "optimizer 'adamwow': expected one of"),
    ({"data": {"source": "/nowhere"}}, InputError, "/nowhere is no folder"),
])
def test_wrong_configurations_are_one_line(files, change, error, message):
    """Bad input is refused before any worker starts."""
    config = write_config(files, "wrong", **change)
    with pytest.raises(error, match=message):
        train(files / "plan1.json", files / "graph.json", config, timeout_s=200)


def test_more_ranks_than_the_plan(files):
    """Refused before torchrun starts."""
    with pytest.raises(RunError, match="3 processes were started, but the plan has 2 ranks"):
        train(files / "plan2.json", files / "graph.json", write_config(files, "world"), num_processes=3)


def test_a_foreign_plan_given_to_the_worker_by_hand(files):
    """One clear line, without a traceback, and the error's exit code."""
    config = write_config(files, "foreign")
    plan = load(files / "plan2.json", Plan)
    problem = plan.problem.replace(graph_digest="f" * 16)
    save(Plan(plan.name, problem, plan.placement, plan.schedule), files / "foreign.json")
    command = [sys.executable, "-m", "mipipe.runtime.worker", "--plan", str(files / "foreign.json"), "--graph",
               str(files / "graph.json"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == PlanError.exit_code
    assert done.stderr.strip().splitlines()[-1].startswith("mipipe: error: plan ZB-H1: made for graph ffffffffffffffff")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(10))
def test_kills_at_random_moments(files, round_):
    """SIGKILL whenever, three times: during start, a step, or a checkpoint; the losses of the undisturbed run."""
    name = f"random{round_}"
    calm = undisturbed(files, 20, 0.2)
    config = write_config(files, name, steps=20, data=killing(files, name, [], delay=0.2),
                          checkpoint={"folder": str(files / name), "every": 1})
    rng, stop, kills, said = random.Random(round_), threading.Event(), [], []

    def kill_now_and_then():
        while len(kills) < 3 and not stop.wait(rng.uniform(2, 7)):
            victims = [pid for pid in workers_of(config)
                       if b"mipipe.runtime.train.launching.agent" not in command_of(pid)]
            if victims:
                kills.append(rng.choice(victims))
                os.kill(int(kills[-1]), signal.SIGKILL)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        result = train(files / "plan2.json", files / "graph.json", config, timeout_s=600, max_restarts=4,
                       say=said.append)
    finally:
        stop.set()
        killer.join()
    assert len(kills) == 3
    assert result.losses == calm.losses
    numbers = [int(line.split()[1]) for line in said if line.startswith("restart ")]
    assert numbers and numbers == sorted(set(numbers)) and set(numbers) <= {1, 2, 3}, said  # killed early: no line
    for path in complete(files / name):
        verify(path, read_state(path))


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
