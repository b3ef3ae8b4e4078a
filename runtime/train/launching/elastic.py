"""Training that goes on with fewer devices: a supervisor outside torchrun, for one host.

torchrun restarts a worker that died as often as ``max_restarts`` says, on all devices. When that is used up, the rank
that was killed again counts as lost for good: the supervisor drops its device, plans the same graph for those that are
left (or drops one data-parallel copy, where there are several), and resumes from the newest checkpoint, which any plan
can read. Errors of the program itself (a loss that is not finite, wrong input) end the run as they do without it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mipipe.graphs.errors import InputError, RunError, StoppedError
from mipipe.graphs.serialize import save
from mipipe.planner.plan import Plan, check_single_devices
from mipipe.planner.problem import PlanningProblem
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.train.launching.devices import choose, kinds_of
from mipipe.runtime.train.launching.failures import exits, is_consequence, killed_ranks, reports
from mipipe.runtime.train.launching.launch import (
    TrainResult,
    Watch,
    end_of,
    progress_file,
    read_records,
    read_start,
    run_watched,
    start_of,
    stop_signal,
    torchrun_command,
)
from mipipe.runtime.train.launching.prepare import check_start, read_job

Replan = Callable[[PlanningProblem], Plan]
"""A plan for the same groups on fewer devices."""


def train_elastic(plan: str | Path, graph: str | Path, config: str | Path, replan: Replan, *, resume: bool = False,
                  resume_if_any: bool = False, max_restarts: int = 0, copies: int | None = None, min_ranks: int = 1,
                  timeout_s: float | None = None, progress: bool | None = None, model: str | None = None,
                  device: str | None = None,
                  say: Callable[[str], None] = lambda text: None) -> TrainResult:
    """Train until done, on fewer devices when some are lost; ``say`` is told what happens.

    Args:
        plan, graph, config, resume, resume_if_any, copies, progress, model, device: as for
            `mipipe.runtime.train.launching.launch.train`.
        replan: makes the plan for what is left; it is saved as ``plan-N-ranks.json`` beside the checkpoints.
        max_restarts: restarts on all devices before a killed rank counts as lost.
        min_ranks: with fewer processes the run ends.
        timeout_s: for each attempt.

    Raises:
        InputError: the configuration has no checkpoints.
        RunError: too few ranks are left, or as the worker raised it.
        StoppedError: this process was asked to end (SIGTERM).
    """
    job = read_job(plan, graph, config, model)
    check_single_devices(job.plan, "--elastic")
    copies = copies or 1
    if job.config.checkpoint is None:
        raise InputError(f"{config}: has no 'checkpoint'; --elastic resumes from checkpoints, so give a folder and"
                         " 'every'")
    start, began = start_of(resume, resume_if_any), None
    check_start(job.config, start)
    current, path = job.plan, Path(plan)
    devices = list(range(current.problem.num_ranks * copies))
    device = choose(device, kinds_of(current), len(devices))
    shown = progress_file(progress)
    with stop_signal() as asked:
        while True:
            command = functools.partial(torchrun_command, path, graph, config, len(devices), start=start,
                                        progress=shown, max_restarts=max_restarts, timeout_s=job.config.timeout_s,
                                        model=model, device=device)
            watch = functools.partial(Watch, say=say, asked=asked, patience_s=job.config.timeout_s)
            error, lost, first = attempt(command, watch, devices, timeout_s)
            began = began or first
            if error is None:
                return TrainResult(tuple(read_records(job.config)), job.config, *began)
            if not lost:
                raise error
            copies, devices = remaining(current.problem.num_ranks, devices, lost)
            check_left(lost, devices, min_ranks, job.config.checkpoint.folder, error)
            start = Start.RESUME_IF_ANY
            say(lost_line(lost, copies, len(devices)))
            if not copies:
                current = replan(current.problem.replace(topology=current.problem.topology.without(lost)))
                path = Path(job.config.checkpoint.folder) / f"plan-{len(devices)}-ranks.json"
                save(current, path)
            if asked.is_set():
                raise StoppedError("asked to end (SIGTERM) between two attempts; all that was done before the loss is"
                                   f" in {job.config.checkpoint.folder}; go on with --resume")


def attempt(command: Callable[..., list[str]], watch: Callable[[Path], Watch], devices: Sequence[int],
            timeout_s: float | None) -> tuple[Exception | None, set[int], tuple[int, str]]:
    """One run under torchrun on these devices: the error it ended with, the ranks it lost, and where it began.

    ``command`` is given the report's folder, ``watch`` too.
    """
    with tempfile.TemporaryDirectory(prefix="mipipe-", ignore_cleanup_errors=True) as name, visible_devices(devices):
        folder, log = Path(name), Path(name) / "torchrun.log"
        watching = watch(folder)
        code = run_watched(command(report=name), log, timeout_s, watching)
        asked = watching.asked.is_set()
        lost = set() if asked else lost_ranks(folder, len(devices))
        return end_of(folder, log, code, asked, show=not lost), lost, read_start(folder)


def check_left(lost: set[int], devices: Sequence[int], min_ranks: int, folder: str, error: Exception) -> None:
    """Raise `RunError` where too few devices are left, or the attempt's own error where that says that all is saved."""
    least = max(1, min_ranks)
    if len(devices) >= least:
        return
    if isinstance(error, StoppedError):
        raise error
    raise RunError(f"{_names(lost)} lost, {len(devices)} left, but at least {least} must run; the newest checkpoint is"
                   f" in {folder}")


def lost_line(lost: set[int], copies: int, count: int) -> str:
    """What is done about lost ranks, for people."""
    if copies:
        return f"{_names(lost)} lost: going on with {copies} cop{'ies' if copies > 1 else 'y'} of the plan"
    return f"{_names(lost)} lost: planning for {count} device{'s' if count > 1 else ''}"


def _names(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def lost_ranks(folder: Path, world: int) -> set[int]:
    """The processes that are gone for good: killed by a signal, or asked to end (SIGTERM); or, where all others only
    waited for them, silent."""
    gone = killed_ranks(folder, world)
    gone |= {rank for rank, item in exits(folder).items() if item.code == StoppedError.exit_code}
    if gone:
        return gone
    found = reports(folder)
    if found and all(is_consequence(item) for item in found):
        return set(range(world)) - {item["rank"] for item in found}
    return set()


def remaining(num_ranks: int, devices: Sequence[int], lost: set[int]) -> tuple[int, list[int]]:
    """How many whole copies of a plan still fit (0: it must be made anew) and the devices to use."""
    left = [device for rank, device in enumerate(devices) if rank not in lost]
    copies = len(left) // num_ranks
    return copies, left[:copies * num_ranks] if copies else left


class visible_devices(contextlib.AbstractContextManager[None]):
    """Let child processes see only these CUDA devices, where there are any."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = devices
        self._before = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            known = self._before.split(",") if self._before else [str(i) for i in range(torch.cuda.device_count())]
            if max(self._devices) < len(known):
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(known[device] for device in self._devices)

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self._before
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
