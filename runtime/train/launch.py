"""Starting a planned run: torchrun as a child process, watched, ended and explained.

The library form of ``mipipe train``. The child is torchrun's own launcher, so multi-node flags pass through and the
same command works by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs import errors
from mipipe.graphs.errors import MipipeError, RunError
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.prepare import check_saving, check_world, read_job
from mipipe.runtime.train.processes import die_with_parent

GRACE_S = 10.0
"""How long torchrun gets to end its workers before it is killed; its own patience is 30 s."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run left: its records (one for each step), its losses, and the files."""

    records: tuple[dict[str, float], ...]
    config: TrainConfig

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(record["loss_metrics/global_avg_loss"] for record in self.records)


def torchrun_command(plan: str | Path, graph: str | Path, config: str | Path, num_processes: int, *,
                     resume: bool = False, progress: str | None = None, max_restarts: int = 0,
                     report: str | None = None, torchrun: Sequence[str] = (), agent: bool = False,
                     model: str | None = None) -> list[str]:
    """The command line that runs a plan. ``torchrun``: flags that pass through (``--nnodes 2 --rdzv-endpoint ...``).

    ``progress``: the file in which it is shown (``-``: stderr; ``lines``: lines on stdout; None: nowhere). ``agent``:
    through `mipipe.runtime.train.agent`, which leaves who failed in ``report``.
    """
    flags = list(torchrun) or ["--standalone"]
    start = ["mipipe.runtime.train.agent", str(report)] if agent else ["torch.distributed.run"]
    command = [sys.executable, "-m", *start, *flags, "--nproc-per-node", str(num_processes), "--max-restarts",
               str(max_restarts), "-m", "mipipe.runtime.worker", "--plan", str(plan), "--graph", str(graph), "--config",
               str(config)]
    command += ["--model", model] if model is not None else []
    command += ["--resume"] if resume or max_restarts else []
    command += ["--progress", progress or "none"]
    return command + (["--report", report] if report else [])


def train(plan: str | Path, graph: str | Path, config: str | Path, *, resume: bool = False, max_restarts: int = 0,
          copies: int = 1, timeout_s: float | None = None, progress: bool | None = None, torchrun: Sequence[str] = (),
          num_processes: int | None = None, model: str | None = None) -> TrainResult:
    """Train as the plan says, under torchrun on this host, until done.

    Args:
        plan, graph, config: the files; see `mipipe.runtime.train.config.TrainConfig` for the last.
        resume: continue from the newest checkpoint. ``max_restarts`` implies it for restarted workers.
        copies: data-parallel copies of the plan.
        timeout_s: end the run after this time; None: no limit.
        progress: a line on stderr that is kept up to date; None: where that is a terminal, else now and then a line on
            stdout; False: nothing.
        torchrun: flags that pass through to torchrun, for several nodes.
        num_processes: processes on this host; by default the plan's ranks times ``copies``.
        model: the model's source, where the graph names code (``package.module:factory``).

    Raises:
        MipipeError: as the worker raised it, or `RunError` where a worker died without a word or time ran out.
    """
    job = read_job(plan, graph, config, model)
    settings = job.config
    count = num_processes if num_processes is not None else len(job.program.ranks) * copies
    if not torchrun:
        check_world(job, count)
    check_saving(settings, resume)
    shown = progress_file(progress)
    with tempfile.TemporaryDirectory(prefix="mipipe-") as folder:
        command = torchrun_command(plan, graph, config, count, resume=resume, progress=shown, max_restarts=max_restarts,
                                   report=folder, torchrun=torchrun, model=model)
        log = Path(folder) / "torchrun.log"
        code = run_watched(command, log, timeout_s)
        if code:
            sys.stderr.write("\r\x1b[K" if shown not in (None, "-", "lines") else "")  # the progress line
            raise explain(Path(folder), log, code)
    return TrainResult(tuple(read_records(settings)), settings)


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


def run_watched(command: Sequence[str], log: Path, timeout_s: float | None) -> int:
    """The exit status of a command whose stderr goes to ``log``, or stays where it is if progress is shown there.

    The command and all it started are ended on timeout, on Ctrl-C, and (Linux) when this process is killed.

    Raises:
        RunError: it did not end within ``timeout_s``.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    shown = "-" in command
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=None if shown else stream, env=environment, start_new_session=True,
                                   preexec_fn=lambda: die_with_parent(signal.SIGTERM))
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            end_process(process)
            raise RunError(f"the run did not end within {timeout_s:g} s and was ended; see its checkpoints and"
                           " metrics for how far it came") from None
        except BaseException:
            end_process(process)
            raise


def end_process(process: subprocess.Popen[Any]) -> None:
    """End torchrun: politely, so that it ends its workers, then by force (workers die with it)."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def explain(folder: Path, log: Path, code: int, show: bool = True) -> MipipeError:
    """The error to raise for a failed run: what the first failing rank reported, else what torchrun said.

    ``show``: the traceback of an unexpected error goes to stderr.
    """
    found = [json.loads(path.read_text()) for path in folder.glob("error-rank*.json")]
    if not found:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        tail = next((line for line in reversed(lines) if "Error" in line or "Signal" in line), "".join(lines[-1:]))
        return RunError(f"torchrun ended with status {code}: {tail.strip() or 'no message; see the output above'}")
    first = min(found, key=lambda item: (is_consequence(item), item["time"]))
    if first["type"] in vars(errors):
        kind = vars(errors)[first["type"]]
        text = first["message"]
    else:
        kind, text = RunError, f"rank {first['rank']}: {first['type']}: {first['message']}"
    if show:
        sys.stderr.write(first["traceback"])
    return kind(text)


def is_consequence(item: dict[str, Any]) -> bool:
    """Whether a rank failed only because another had: its connection was closed, or it waited in vain."""
    text = item["message"]
    return "the peer has failed" in text or "Connection closed by peer" in text or "nothing for" in text
