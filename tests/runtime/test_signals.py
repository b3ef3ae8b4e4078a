"""SIGTERM to whole runs under torchrun, and what else ends them from outside. Few processes, so most are slow tests."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_torchrun import command_of, files, importable, killing, undisturbed, workers_of, write_config

from mipipe.graphs.errors import RunError
from mipipe.runtime.checkpoints.checkpoint_folder import latest, read_state, verify
from mipipe.runtime.train.launching.launch import train
from mipipe.runtime.train.launching.rendezvous import connect

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
__all__ = ["files", "importable"]


def start(folder, config, *flags, temporary=None):
    """``mipipe train`` as a process of its own, once it has trained a few steps."""
    environment = {**os.environ, **({"TMPDIR": str(temporary)} if temporary is not None else {})}
    process = subprocess.Popen([sys.executable, "-m", "mipipe.cli.main", "train", "--plan", str(folder / "plan2.json"),
                                "--graph", str(folder / "graph.json"), "--config", str(config), *flags],
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    metrics = config.with_suffix(".jsonl")
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    return process


def config_of(folder, name, steps=2000, delay=0.1, every=0):
    return write_config(folder, name, steps=steps, data=killing(folder, name, [], delay=delay), timeout_s=60.0,
                        checkpoint={"folder": str(folder / name), "every": every})


def worker(config, rank):
    """The process of a rank."""
    for pid in workers_of(config):
        words = command_of(pid)
        if b"mipipe.runtime.worker\x00" in words and b"mipipe.runtime.train.launching.agent" not in words and \
                f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_sigterm_to_the_command(files, tmp_path):
    """Restarts or not, the run ends after its step with a checkpoint, a line and exit code 130; nothing is left running
    or in the folder of temporary files; --resume goes on with the losses of an undisturbed run."""
    config = config_of(files, "asked")
    process = start(files, config, "--max-restarts", "3", temporary=tmp_path)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    said, last = error.splitlines()
    found = re.fullmatch(r"mipipe: asked to end \(SIGTERM, rank 0, 1\): stopped after step (\d+) of 2000; what was done"
                         rf" is saved in {files}/asked/step-(\d+); go on with --resume", last)
    assert said.startswith("starting with step 1 of 2000") and found is not None, error
    done = int(found[1])
    folder = latest(files / "asked")
    assert folder.name == f"step-{done}" == f"step-{found[2]}"
    verify(folder, read_state(folder))
    assert not workers_of(config) and not list(tmp_path.iterdir())
    config_of(files, "asked", steps=done + 2)
    result = train(files / "plan2.json", files / "graph.json", config, timeout_s=300, resume=True)
    assert result.start == done and len(result.losses) == done + 2
    assert result.losses[:12] == undisturbed(files, 12).losses[:len(result.losses)][:12]


@pytest.mark.slow
def test_sigterm_to_a_worker_alone(files):
    """Nobody said what to do without it, so the run ends as if the command had been asked, with all saved."""
    config = config_of(files, "alone", steps=60, delay=0.2)
    process = start(files, config)
    os.kill(worker(config, 1), signal.SIGTERM)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130, error
    first, last = error.splitlines()
    found = re.fullmatch(r"mipipe: asked to end \(SIGTERM, rank 1\): stopped after step (\d+) of 60; what was done is"
                         rf" saved in {files}/alone/step-(\d+); go on with --resume", last)
    assert first.startswith("starting with step 1 of 60") and found is not None and found[1] == found[2], error
    folder = latest(files / "alone")
    assert folder.name == f"step-{found[1]}" and not workers_of(config)
    verify(folder, read_state(folder))


@pytest.mark.slow
def test_sigterm_to_a_worker(files):
    """It is a worker that goes: the others are started again with it, from the step that was saved."""
    config = config_of(files, "one", steps=60, delay=0.2)
    process = start(files, config, "--max-restarts", "1", "--json")
    os.kill(worker(config, 1), signal.SIGTERM)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    first, second = error.splitlines()
    assert first.startswith("starting with step 1 of 60")
    assert re.match(rf"restart 1 \(rank 1 was asked to end, SIGTERM\): starting with step \d+ of 60 from checkpoint"
                    rf" {files}/one/step-\d+$", second), second
    assert tuple(json.loads(out)["losses"][:12]) == undisturbed(files, 12).losses


@pytest.mark.slow
def test_sigterm_to_a_worker_of_an_elastic_run(files):
    """Its device is taken away, so the run goes on without it."""
    config = config_of(files, "gone", steps=40, delay=0.2)
    process = start(files, config, "--elastic", "--replan-seconds", "1")
    os.kill(worker(config, 1), signal.SIGTERM)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    _, lost, again = error.splitlines()
    assert lost == "rank 1 lost: planning for 1 device"
    assert re.match(r"starting with step \d+ of 40 from checkpoint .*step-\d+$", again), again


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named(files, tmp_path):
    """By rank and signal; the folder of temporary files is empty after a run that failed."""
    config = config_of(files, "shot")
    process = start(files, config, temporary=tmp_path)
    os.kill(worker(config, 0), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 4
    assert "mipipe: error: rank 0 was killed by signal 9 (SIGKILL) (by hand, or by the kernel" in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def listener():
    """A program that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()[1]


def test_a_foreign_listener_on_the_port_of_a_worker(listener, monkeypatch):
    """torch's store would wait for its answer for ever."""
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", listener), ("RANK", 1), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    begin = time.monotonic()
    with pytest.raises(RunError, match=f"rendezvous at 127.0.0.1:{listener}: .*another program may be listening"):
        connect(1.0, grace_s=1.0)
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_a_foreign_listener_on_the_port_of_the_rendezvous(files, listener):
    """The launcher says so within ``timeout_s``, and leaves nothing."""
    config = write_config(files, "foreign-port", timeout_s=4.0)
    before = set(Path(tempfile.gettempdir()).glob("mipipe-*"))
    with pytest.raises(RunError, match=f"torchrun's rendezvous at 127.0.0.1:{listener} did not come about within 4 s"):
        train(files / "plan2.json", files / "graph.json", config, timeout_s=200, num_processes=1,
              torchrun=["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{listener}"])
    assert not workers_of(config)
    assert set(Path(tempfile.gettempdir()).glob("mipipe-*")) <= before
