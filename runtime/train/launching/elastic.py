"""Training that goes on with fewer devices: a supervisor outside torchrun, for one host.

torchrun restarts a worker that died as often as ``max_restarts`` says, on all devices. When that is used up, the rank
that was killed again counts as lost for good: the supervisor drops its device, plans the same graph for those that are
left (or drops one data-parallel copy, where a plan of single devices has several), and resumes from the newest
checkpoint, which any plan can read. A plan of teams is made again with other degrees and the same sequences a step. A
run that finds fewer devices when it starts is planned for these. Errors of the program itself (a loss that is not
finite, wrong input) end the run as they do without it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mipipe.graphs.errors import InputError, RunError, StoppedError
from mipipe.graphs.serialize import save
from mipipe.graphs.topology import Topology
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.teams.again import made_again, task_of
from mipipe.planner.teams.as_team import degrees_of
from mipipe.runtime.checkpoints.checkpoint_folder import choose as newest_of
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.checkpoints.data_state import read_loader
from mipipe.runtime.engine.compiling.team import member_graph
from mipipe.runtime.experts.layers import sharers
from mipipe.runtime.ranks.groups import ALONE
from mipipe.runtime.train.data import takes_copies
from mipipe.runtime.train.launching.devices import check_spare, choose, kinds_of, visible_devices, within_reach
from mipipe.runtime.train.launching.failures import exits, is_consequence, killed_ranks, reports
from mipipe.runtime.train.launching.launch import (
    Say,
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
from mipipe.runtime.train.launching.prepare import PreparedRun, check_copies, check_start, check_team, read_job
from mipipe.runtime.train.launching.stages import light_of

Replan = Callable[[PlanningProblem], Plan]
"""A plan of single devices for the same groups on fewer of them."""


@dataclass(frozen=True, slots=True)
class Running:
    """A plan, its file, and how many copies of it run."""

    plan: Plan
    path: Path
    copies: int

    @property
    def each(self) -> int:
        """Devices of a copy."""
        return self.plan.problem.num_ranks * (self.plan.team or ALONE).members

    @property
    def devices(self) -> int:
        return self.each * self.copies

    def text(self) -> str:
        """Its degrees, for people."""
        return degrees_of(self.plan, self.copies).text()


@dataclass(frozen=True, slots=True)
class Supervisor:
    """What a supervisor plans again with, for ``least`` devices or more; ``replan_s`` is for plans of teams."""

    job: PreparedRun
    folder: str
    replan: Replan
    replan_s: float | None
    least: int
    say: Say

    def fitted(self, now: Running, alive: Sequence[int], lost: set[int], error: Exception | None = None) -> Running:
        """What runs on the devices that are ``alive``, after ``error`` has taken some ranks (none: at the start).

        Raises:
            RunError: too few are left.
            InfeasibleError: there is no plan for them.
            TimeUpError: none was found in time.
        """
        who = f"{_names(lost)} lost" if lost else \
            f"plan {now.plan.name} is for {now.devices} devices, {len(alive)} are here"
        least = self.least
        together = sharers(self.job.graph) if now.plan.team is None else 1
        if together > 1:  # experts of a copy less would be nowhere
            who, least = f"{who}, of copies that share experts", max(least, together * now.each)
        if len(alive) < least:
            raise self._too_few(who, len(alive), least, error)
        copies = min(now.copies, len(alive) // now.each) // together * together
        if copies == now.copies:
            self.say(f"{who}: going on with {_devices(len(lost))} that {'were' if len(lost) > 1 else 'was'} spare")
            return now
        if now.plan.team is None and copies:
            if copies * now.each < least:
                raise self._too_few(who, copies * now.each, least, error)
            self.say(f"{who}: going on with {copies} cop{'ies' if copies > 1 else 'y'} of the plan")
            return Running(now.plan, now.path, copies)
        self.say(f"{who}: planning for {_devices(len(alive))}")
        after = self._planned(now, len(alive), lost)
        save(after.plan, after.path)
        idle = len(alive) - after.devices
        self.say(f"degrees were {now.text()}, are {after.text()} from here on"
                 + (f"; {_devices(idle)} idle" if idle else ""))
        return after

    def _planned(self, now: Running, count: int, lost: set[int]) -> Running:
        """Made again for ``count`` devices."""
        if now.plan.team is None:
            problem = now.plan.problem
            made = self.replan(problem.replace(topology=topology_left(problem.topology, now.devices, lost, count)))
        else:
            divides = self._position_divides()
            if not divides:
                self.say(f"the position in the data is not divided anew ({self.job.config.data.source}), so the number"
                         f" of copies stays {now.copies}")
            made = made_again(now.plan, self.job.graph, count, copies=now.copies, least=self.least,
                              seconds=self.replan_s, divides=self.divides,
                              runs=lambda plan: self._trains(plan, None if divides else now.copies))
        after = Running(made, Path(), 1 if made.team is None else made.team.copies)
        return Running(made, Path(self.folder) / f"plan-{after.devices}-devices.json", after.copies)

    def _position_divides(self) -> bool:
        """Whether other copies can continue from the newest checkpoint's position in the data."""
        newest = newest_of(Path(self.folder), Start.RESUME_IF_ANY)
        return newest is None or bool(read_loader(newest / "data-0.pt").get("divides", False))

    def _trains(self, plan: Plan, copies: int | None) -> bool:
        """Whether training takes a plan's team, and its copies (``copies``: as many; None: any number) get data."""
        assert plan.team is not None
        if copies not in (None, plan.team.copies) or (plan.team.copies > 1 and not takes_copies(self.job.config.data)):
            return False
        try:
            check_team(plan, self.job.graph, self.job.config)
            check_copies(plan, self.job.graph, self.job.config, plan.team.copies)
        except InputError:
            return False
        return True

    def divides(self, plan: Plan) -> bool:
        """Whether the graph has members of a plan's team: slow, so it is asked of what is to run alone."""
        try:
            member_graph(plan.team or ALONE, self.job.graph)
        except InputError:
            return False
        return True

    def _too_few(self, who: str, left: int, least: int, error: Exception | None) -> Exception:
        """The error where too few devices are left: the attempt's own where that says that all is saved."""
        if isinstance(error, StoppedError):
            return error
        return RunError(f"{who}, {left} {'can run' if error is None else 'left'}, but at least {least} must run;"
                        f" checkpoints are in {self.folder}")


def train_elastic(plan: str | Path, graph: str | Path, config: str | Path, replan: Replan, *, resume: bool = False,
                  resume_if_any: bool = False, max_restarts: int = 0, copies: int | None = None, min_ranks: int = 1,
                  num_processes: int | None = None, replan_s: float | None = None, timeout_s: float | None = None,
                  progress: bool | None = None, model: str | None = None, device: str | None = None,
                  say: Say = lambda text: None) -> TrainResult:
    """Train until done, on fewer devices when some are lost; ``say`` is told what happens.

    Args:
        plan, graph, config, resume, resume_if_any, copies, progress, model, device: as for
            `mipipe.runtime.train.launching.launch.train`.
        replan: makes the plan for what is left, where it is of single devices; plans that are made on the way are saved
            as ``plan-N-devices.json`` beside the checkpoints.
        max_restarts: restarts on all devices before a killed rank counts as lost.
        min_ranks: with fewer processes the run ends.
        num_processes: devices that there are; None: all of the plan's, or, of CUDA devices, those that are here. With
            fewer than the plan's it is made again before the start; more are spare ones.
        replan_s: time limit for making a plan of teams again; None: that of the plan.
        timeout_s: for each attempt.

    Raises:
        InputError: the configuration has no checkpoints, or a plan of teams does not say what it was made for.
        RunError: too few ranks are left, or as the worker raised it.
        InfeasibleError: there is no plan for what is left.
        TimeUpError: none was found in time.
        StoppedError: this process was asked to end (SIGTERM).
    """
    job = read_job(plan, graph, config, model)
    folder = check_elastic(job, str(config))
    start, began = start_of(resume, resume_if_any), None
    check_start(job.config, start)
    now = Running(job.plan, Path(plan), copies or (job.plan.team or ALONE).copies)
    check_copies(now.plan, job.graph, job.config, now.copies)
    kinds = kinds_of(job.plan)
    alive = list(range(num_processes or within_reach(device, kinds, now.devices)))
    device = choose(device, kinds, min(now.devices, len(alive)))
    check_spare(device, len(alive))
    supervisor = Supervisor(job, folder, replan, replan_s, max(1, min_ranks), say)
    shown = progress_file(progress)
    with stop_signal() as asked:
        if len(alive) < now.devices:
            now = supervisor.fitted(now, alive, set())
        while not asked.is_set():
            command = functools.partial(torchrun_command, now.path, graph, config, now.devices, start=start,
                                        progress=shown, max_restarts=max_restarts, timeout_s=job.config.timeout_s,
                                        model=model, device=device)
            watch = functools.partial(Watch, say=say, asked=asked, patience_s=job.config.timeout_s)
            error, lost, first = attempt(command, watch, alive[:now.devices], timeout_s)
            began = began or first
            if error is None:
                return TrainResult(tuple(read_records(job.config)), job.config, *began)
            if not lost:
                raise error
            alive = [item for rank, item in enumerate(alive) if rank not in lost]
            start = Start.RESUME_IF_ANY
            now = supervisor.fitted(now, alive, lost, error)
    raise StoppedError(f"asked to end (SIGTERM) between two attempts; all that was done before is in {folder}; go"
                       " on with --resume")


def check_elastic(job: PreparedRun, config: str) -> str:
    """The folder of a run's checkpoints.

    Raises:
        InputError: there is none, or what runs cannot be planned again on the way.
    """
    light = light_of(job)
    if job.branches or (light is not None and job.config.steps != light.steps):
        raise InputError(f"{config}: --elastic makes one plan again, but "
                         + ("every branch has" if job.branches else "both stages of light-peft have")
                         + " a plan; use --max-restarts")
    if job.config.checkpoint is None:
        raise InputError(f"{config}: has no 'checkpoint'; --elastic resumes from checkpoints, so give a folder and"
                         " 'every'")
    if job.plan.team is not None:
        task_of(job.plan)
    return job.config.checkpoint.folder


def topology_left(topology: Topology, ran: int, lost: set[int], count: int) -> Topology:
    """The devices of a plan for ``count`` of the ``ran`` that its copies ran on: those that no copy lost, or, where
    that does not say which (several copies, spare devices, none lost), its first."""
    size = topology.num_devices
    kept = {rank % size for rank in range(ran) if rank not in lost}
    kept = kept if len(kept) == count else set(range(count))
    return topology.without(set(range(size)) - kept)


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


def _names(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


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
