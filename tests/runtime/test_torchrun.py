"""Whole runs under torchrun: files in, losses out; workers that fail, hang or are killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runtime_equal as equal
import yaml

from mipipe.graphs.capture import capture
from mipipe.graphs.errors import InputError, PlanError, RunError
from mipipe.graphs.serialize import load, save
from mipipe.planner.plan import Plan
from mipipe.planner.schedules import BASELINES
from mipipe.planner.timeline import Timeline
from mipipe.runtime.launch import train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
COUNT = 4


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
    data = {"steps": 4, "seed": 0, "optimizer": {"name": "adamw", "lr": 0.01}, "data": {"source": "stdlib"},
            "metrics": str(folder / f"{name}.jsonl"), "timeout_s": 30.0, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def killing(folder, name, orders, delay=0.0):
    """A data source that kills ranks as told."""
    path = folder / f"{name}.orders"
    path.write_text("\n".join(orders))
    return {"source": "runtime_models:KillOnce", "options": {"order": str(path), "delay": delay}}


def test_two_ranks_train_like_one(files):
    """`train` starts torchrun, the losses fall and equal those of one process; metrics and timeline are left behind."""
    config = write_config(files, "two", timeline=str(files / "measured.json"))
    result = train(files / "plan2.json", files / "graph.json", config, timeout_s=300)
    alone = train(files / "plan1.json", files / "graph.json", write_config(files, "one"), timeout_s=300)
    assert len(result.losses) == 4 and result.losses[-1] < result.losses[0]
    assert result.losses == pytest.approx(alone.losses, rel=1e-5)
    assert result.records[-1]["bubble_ratio/predicted"] > 0
    assert load(files / "measured.json", Timeline).origin == "measured"


def test_a_failing_rank_ends_the_run_with_its_traceback(files, capfd):
    """Within seconds, by name; no worker is left."""
    config = write_config(files, "bad", data=killing(files, "bad", ["1 2 fail"]))
    start = time.monotonic()
    with pytest.raises(RunError, match="rank 1: ValueError: a loader that fails"):
        train(files / "plan2.json", files / "graph.json", config, timeout_s=300)
    assert time.monotonic() - start < 200
    assert "_obey" in capfd.readouterr().err
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


def test_killed_ranks_resume_bit_for_bit(files):
    """SIGKILL in three different steps and on both ranks: torchrun restarts, and no loss differs in a bit."""
    config = write_config(files, "killed", steps=8, data=killing(files, "killed", ["0 3 kill", "1 5 kill", "0 8 kill"]),
                          checkpoint={"folder": str(files / "killed"), "every": 2})
    reference = write_config(files, "calm", steps=8, data=killing(files, "calm", []))
    calm = train(files / "plan2.json", files / "graph.json", reference, timeout_s=300)
    result = train(files / "plan2.json", files / "graph.json", config, timeout_s=500, max_restarts=3)
    assert len(calm.losses) == 8
    assert result.losses == calm.losses
    assert not (files / "killed.orders").read_text()


def test_a_run_that_takes_too_long_is_ended(files):
    """The whole tree of processes goes."""
    config = write_config(files, "slow", steps=1000, data=killing(files, "slow", [], delay=0.2))
    with pytest.raises(RunError, match="did not end within"):
        train(files / "plan2.json", files / "graph.json", config, timeout_s=25)
    deadline = time.monotonic() + 10
    while workers_of(config) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not workers_of(config)


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
    """SIGKILL whenever: during start, a step, or a checkpoint; in the end, the losses of the undisturbed run."""
    name = f"random{round_}"
    steps = {"steps": 20, "data": killing(files, name, [], delay=0.2)}
    undisturbed = write_config(files, f"calm{round_}", **steps)
    calm = train(files / "plan2.json", files / "graph.json", undisturbed, timeout_s=300)
    config = write_config(files, name, checkpoint={"folder": str(files / name), "every": 1}, **steps)
    rng, stop = random.Random(round_), threading.Event()

    def kill_now_and_then():
        for _ in range(3):
            if stop.wait(rng.uniform(4, 10)):
                return
            victims = [pid for pid in workers_of(config) if b"torch.distributed.run" not in command_of(pid)]
            if victims:
                os.kill(int(rng.choice(victims)), signal.SIGKILL)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        result = train(files / "plan2.json", files / "graph.json", config, timeout_s=600, max_restarts=4)
    finally:
        stop.set()
        killer.join()
    assert result.losses == calm.losses


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
