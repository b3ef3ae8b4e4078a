"""Starting a planned run: torchrun as a child process, watched, ended and explained.

The library form of ``mipipe train``. The child is torchrun's own launcher (`mipipe.runtime.train.launching.agent`), so
multi-node flags pass through and the same command works by hand. SIGTERM is passed on: the workers finish their step
and save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mipipe.graphs.children import GRACE_S, running
from mipipe.graphs.errors import InputError, RunError, StoppedError
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.launching import devices
from mipipe.runtime.train.launching.failures import DONE, SAID, STARTED, explain_failure, reports
from mipipe.runtime.train.launching.prepare import PreparedRun, check_saving, check_start, check_world, read_job
from mipipe.runtime.train.launching.stages import light_of, run_stages

POLL_S = 0.1
"""How often the launcher looks what its children have to say."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run left: its records (one for each step), its losses, the steps it began after and from what."""

    records: tuple[dict[str, float], ...]
    config: TrainConfig
    start: int = 0
    source: str = ""

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(record["loss_metrics/global_avg_loss"] for record in self.records)


def torchrun_command(plan: str | Path, graph: str | Path, config: str | Path, num_processes: int, *,
                     start: Start = Start.FRESH, progress: str | None = None, max_restarts: int = 0,
                     report: str | None = None, torchrun: Sequence[str] = (), timeout_s: float = 600.0,
                     model: str | None = None, device: str | None = None) -> list[str]:
    """The command line that runs a plan. ``torchrun``: flags that pass through (``--nnodes 2 --rdzv-endpoint ...``).

    ``progress``: the file in which it is shown (``-``: stderr; ``lines``: lines on stdout; None: nowhere). ``report``:
    the folder in which workers and the agent, through which torchrun then runs, leave what went wrong; ``timeout_s``:
    how long the agent waits for the rendezvous. ``device``: ``cpu`` or ``cuda``; None: what the plan was made for.
    """
    flags = list(torchrun) or ["--standalone"]
    agent = ["mipipe.runtime.train.launching.agent", report, f"{timeout_s:g}"]
    launcher = ["torch.distributed.run"] if report is None else agent
    if report is not None and not any(item.startswith(("--log-dir", "--log_dir")) for item in flags):
        flags += ["--log-dir", f"{report}/logs"]  # else torchrun makes a folder in /tmp, and leaves it
    command = [sys.executable, "-m", *launcher, *flags, "--nproc-per-node", str(num_processes), "--max-restarts",
               str(max_restarts), "-m", "mipipe.runtime.worker", "--plan", str(plan), "--graph", str(graph), "--config",
               str(config)]
    command += [] if start is Start.FRESH else [f"--{start.value}"]
    command += ["--model", model] if model is not None else []
    command += ["--device", device] if device is not None else []
    command += ["--progress", progress or "none"]
    return command + (["--report", report] if report else [])


def train(plan: str | Path, graph: str | Path, config: str | Path, *, resume: bool = False,
          resume_if_any: bool = False, max_restarts: int = 0, copies: int | None = None, timeout_s: float | None = None,
          progress: bool | None = None, torchrun: Sequence[str] = (), num_processes: int | None = None,
          model: str | None = None, device: str | None = None, say: Say = lambda text: None) -> TrainResult:
    """Train as the plan says, under torchrun on this host, until done.

    Args:
        plan, graph, config: the files; see `mipipe.runtime.train.config.TrainConfig` for the last.
        resume: continue from the newest checkpoint, which must be there. ``resume_if_any``: else start anew.
        max_restarts: restarts of all workers after one died; they continue from this run's newest checkpoint.
        copies: data-parallel copies of the plan; None: as many as it was made for.
        timeout_s: end the run after this time; None: no limit.
        progress: a line on stderr that is kept up to date; None: where that is a terminal, else now and then a line on
            stdout; False: nothing.
        torchrun: flags that pass through to torchrun, for several nodes.
        num_processes: processes on this host; by default the plan's devices times ``copies``.
        model: the model's source, where the graph names code (``package.module:factory``).
        device: ``cpu`` or ``cuda``; None: what the plan was made for.
        say: is told, in lines for people, from what the run starts, and what happens.

    Raises:
        MipipeError: as the worker raised it, or `RunError` where a worker died without a word or time ran out.
        StoppedError: the run was asked to end (SIGTERM), and did after a step.
    """
    job = read_job(plan, graph, config, model)
    settings = job.config
    count = num_processes if num_processes is not None else job.processes(copies)
    if not torchrun:
        check_world(job, count)
        device = devices.choose(device, devices.kinds_of(job.plan), count)
    start = start_of(resume, resume_if_any)
    light = light_of(job)
    if light is not None and settings.steps != light.steps:
        if torchrun or num_processes is not None:
            raise InputError("light-peft captures and plans between two stages on this host: --torchrun and --processes"
                             " do not go with it")

        def stage(other_plan: Path | None, other_graph: Path | None, file: Path, how: Start) -> None:
            train(other_plan or plan, other_graph or graph, file, resume=how is Start.RESUME,
                  resume_if_any=how is Start.RESUME_IF_ANY, max_restarts=max_restarts, copies=copies,
                  timeout_s=timeout_s, progress=progress, model=model, device=device, say=say)

        check_start(dataclasses.replace(settings, checkpoint=None), Start.FRESH if start is Start.FRESH
                    else Start.RESUME_IF_ANY)
        done = run_stages(job, light, start, stage, say)
        return TrainResult(tuple(read_records(done)), done)
    command = partial(torchrun_command, plan, graph, config, count, start=start, max_restarts=max_restarts,
                      torchrun=torchrun, timeout_s=settings.timeout_s, model=model, device=device)
    return _run(job, start, command, timeout_s, progress_file(progress), say)


def _run(job: PreparedRun, start: Start, command: Callable[..., list[str]], timeout_s: float | None,
         shown: str | None, say: Say) -> TrainResult:
    """What a run under torchrun left; raises as `train`. ``command``: its command line but for the progress shown and
    the folder of reports."""
    settings = job.config
    check_saving(settings, start is not Start.FRESH)
    for each in job.branches or (job,):
        check_start(each.config, start)
    with tempfile.TemporaryDirectory(prefix="mipipe-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "torchrun.log"
        with stop_signal() as asked:
            code = run_watched(command(progress=shown, report=folder), log, timeout_s,
                               Watch(Path(folder), say, asked, settings.timeout_s))
        error = end_of(Path(folder), log, code, asked.is_set())
        if error is not None:
            sys.stderr.write("\r\x1b[K" if shown not in (None, "-", "lines") else "")  # the progress line
            raise error
        began = read_start(Path(folder))
    if job.branches:
        settings = job.branches[0].config
    return TrainResult(tuple(read_records(settings)), settings, *began)


def start_of(resume: bool, resume_if_any: bool) -> Start:
    """How a run begins, from the user's flags."""
    return Start.RESUME if resume else Start.RESUME_IF_ANY if resume_if_any else Start.FRESH


def end_of(folder: Path, log: Path, code: int, asked: bool, show: bool = True) -> Exception | None:
    """The error that a run under torchrun ended with, if any; ``asked``: this process was asked to end it."""
    stopped = any(item["type"] == StoppedError.__name__ for item in reports(folder))
    done = (folder / DONE).exists()
    if (not code and not stopped and done) or (asked and done):
        return None
    if not code and not stopped:  # os._exit, which nothing can catch
        return RunError("the workers ended with status 0 before the last step was done: code of the model's or"
                        " the loader's ended them; --resume continues from the newest checkpoint, if one was saved")
    if asked and not stopped and code:
        return StoppedError("asked to end (SIGTERM), and ended before the step in hand was done; nothing new is saved")
    return explain_failure(folder, log, code, show)


def read_start(folder: Path) -> tuple[int, str]:
    """Steps that were done before the run, and what it started from."""
    if not (folder / STARTED).exists():
        return 0, ""
    data = json.loads((folder / STARTED).read_text())
    return int(data["step"]), str(data["source"])


def progress_file(wanted: bool | None) -> str | None:
    """Where workers show progress: the terminal that stderr is, else stderr itself (``-``) if wanted, ``lines`` on
    stdout if nothing is said, or nowhere."""
    if sys.stderr.isatty() and wanted is not False:
        return os.ttyname(sys.stderr.fileno())
    return "-" if wanted else "lines" if wanted is None else None


def read_records(config: TrainConfig) -> list[dict[str, float]]:
    """The records of a finished run's metrics file; none where the configuration names no file."""
    if not config.metrics or not Path(config.metrics).is_file():  # a pipe or terminal cannot be read again
        return []
    return [json.loads(line) for line in Path(config.metrics).read_text().splitlines()]


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets meanwhile, where this is the main thread; a second SIGTERM ends the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(slots=True)
class Watch:
    """What the launcher does while a training run goes on: repeats what workers have to say, and passes on that it is
    asked to end; the run then has ``patience_s`` to finish its step and save."""

    folder: Path
    say: Say
    asked: threading.Event
    patience_s: float
    heard: int = 0
    until: float | None = None

    def look(self, process: subprocess.Popen[Any]) -> None:
        """Called again and again."""
        said = self.folder / SAID
        text = said.read_text() if said.exists() else ""
        for line in text[self.heard:text.rfind("\n") + 1].splitlines():
            self.say(line)
        self.heard = max(self.heard, text.rfind("\n") + 1)
        if self.asked.is_set() and self.until is None:
            self.until = time.monotonic() + self.patience_s + 2 * GRACE_S
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


def run_watched(command: Sequence[str], log: Path, timeout_s: float | None, watch: Watch | None = None) -> int:
    """The exit status of a command whose stderr goes to ``log``, or stays where it is if progress is shown there.

    The command and all it started are ended on timeout, on Ctrl-C, and (Linux) when this process is killed.

    Raises:
        RunError: it did not end within ``timeout_s``, or too long after it was asked to.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    if watch is not None:
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(watch.patience_s) + 1)
    shown = "-" in command
    until = None if timeout_s is None else time.monotonic() + timeout_s
    with log.open("w") as stream, running(command, stderr=None if shown else stream, env=environment) as process:
        while (code := _ended(process, POLL_S if watch is not None else timeout_s)) is None:
            if watch is not None:
                watch.look(process)
            late = watch is not None and watch.until is not None and time.monotonic() > watch.until
            if late or (until is not None and time.monotonic() >= until):
                raise RunError(_too_long(log.parent, timeout_s if not late else None))
        if watch is not None:
            watch.look(process)
        return code


def _ended(process: subprocess.Popen[Any], patience_s: float | None) -> int | None:
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        return None


def _too_long(folder: Path, timeout_s: float | None) -> str:
    stopped = next((f": {item['message']}" for item in reports(folder) if item["type"] == StoppedError.__name__),
                   "; see its checkpoints and metrics for how far it came")
    if timeout_s is None:
        return f"the run did not end after SIGTERM and was killed{stopped}"
    return f"the run did not end within {timeout_s:g} s and was ended{stopped}"
