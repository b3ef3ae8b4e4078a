"""The training loop of a worker: data, engine, optimizer, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mipipe.graphs.errors import BatchError, DataEnd, MipipeError, RunError, StoppedError
from mipipe.graphs.recipes.source import recipe_of
from mipipe.planner.experts.balance.maps import ExpertMap
from mipipe.planner.timeline import Timeline
from mipipe.runtime.checkpoints.checkpoint import Checkpoints
from mipipe.runtime.checkpoints.checkpoint_run import Start, changes, run_of
from mipipe.runtime.engine.batches import Batch
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import gather
from mipipe.runtime.recipes.beams import Beams
from mipipe.runtime.recipes.light import Lightening, mask_groups
from mipipe.runtime.train.clip import Clip
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.expert_run import ExpertRun
from mipipe.runtime.train.metrics import forget_memory
from mipipe.runtime.train.optim import check_continues, learning_rate_factor, make_optimizer
from mipipe.runtime.train.prefetch import Prefetched
from mipipe.runtime.train.step_reports import StepDone, StepProfile, StepReports

LAST_CHECKPOINT_S = 60.0
"""How long a run that fails waits at most for the checkpoint it had begun to write."""
SKIPPED_IN_A_ROW = 100
"""After so many invalid batches one after another there is no sense in looking for a valid one."""


class Trainer:
    """One rank's training run: `begin`, then `run`. ``progress`` is called with (step, loss) after every step, ``say``
    with lines for people (on the first rank; on others only where a file of their own cannot be written); ``stop`` is
    asked after every step whether this process is to end."""

    def __init__(self, engine: Engine, config: TrainConfig, batches: Batches | Prefetched,
                 progress: Callable[[int, float], None] | None = None, predicted: Timeline | None = None,
                 maps: Mapping[int, ExpertMap] | None = None, say: Callable[[str], None] = lambda text: None,
                 stop: Callable[[], bool] = lambda: False) -> None:
        self.engine, self.config, self.batches = engine, config, batches
        self.stop = stop
        options = {"lr": config.optimizer.lr, **config.optimizer.options}
        team = engine.plan.team
        shard = bool(config.optimizer.shard) or (team is not None and team.zero > 0)
        adapters = recipe_of(engine.graph).adapters
        watched = adapters is not None and adapters.light is not None and not adapters.light.second
        groups = (*(mask_groups(options["lr"]) if watched else ()), *config.optimizer.groups)
        self.optimizer = make_optimizer(config.optimizer.name, engine, options, shard, groups)
        self._rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer is not None else []
        self._factor = learning_rate_factor(config.schedule, config.steps)
        self._norm = 0.0
        self._late = config.barrier == "none"
        self._clip = Clip(engine, config.clip, self._late)
        self._unsummed: StepDone | None = None
        engine.on_update = self._update
        self.checkpoints: Checkpoints | None = None
        if config.checkpoint is not None:
            self.checkpoints = Checkpoints(config.checkpoint.folder, engine, self.optimizer,
                                           keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous,
                                           timeout_s=config.timeout_s, accept=config.checkpoint.accept,
                                           run=run_of(config, engine.plan.problem.graph_digest))
        self.experts = ExpertRun(engine, config.experts, maps or {}, self.optimizer, config.steps)
        self.light = Lightening(engine, adapters, config.steps) if watched and adapters is not None else None
        self.beams = None if adapters is None or not adapters.period else \
            Beams(engine, adapters, self.optimizer, config.steps, config.seed)
        self.first = engine.mesh.first
        self._say_here, self.say = say, say if self.first else lambda text: None
        self._reports = StepReports(engine, config, self._factor, predicted, progress, self.say)
        self._begun, self._saved, self._again = False, 0, False
        self.restored: Path | None = None
        engine.notice = lambda: self.stop() or bool(self._fault())

    def _update(self) -> None:
        """Clip, set the learning rate, step, forget the gradients."""
        if self.light is not None:
            self.light.before_update()
        self._clip.clip()
        if self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self._factor(self.engine.steps_done)
            self.optimizer.step()
        self.engine.zero_grad()

    @property
    def run_id(self) -> str:
        """The run's id in its checkpoints, once it has begun."""
        return self.checkpoints.run.id if self.checkpoints is not None else "none"

    def begin(self, start: Start = Start.FRESH, run_id: str | None = None, again: bool = False) -> int:
        """Take the run's folder and load the checkpoint that the run starts from, if any; the steps done by it.

        ``run_id``: of the run that a restart is of; ``again``: this run has begun before, so its metrics are its own
        (as after a restart that has its run's id).

        Raises:
            InputError: as `Checkpoints.begin`; or the loader's position cannot be divided among this run's copies.
        """
        self._begun, self._again = True, again or start is Start.RESTART
        restored = self.checkpoints.begin(start, run_id) if self.checkpoints is not None else None
        if restored is None:
            return 0
        if self.optimizer is not None:
            check_continues(self.optimizer)
        mesh = self.engine.mesh
        self.batches.continue_from(restored.loader, restored.state.copies, mesh.copy, mesh.num_copies)
        self.restored, done = restored.folder, restored.state.step
        self._saved = done
        self.experts.resume(done)
        assert self.checkpoints is not None
        for change in changes(restored.state.run, self.checkpoints.run):
            self.say(f"resumed run {restored.state.run.id}: {change}")
        return done

    def resume(self) -> int:
        """Begin with the newest checkpoint, if there is one."""
        return self.begin(Start.RESUME_IF_ANY)

    def run(self, start: int = 0) -> list[float]:
        """The losses of the steps from ``start`` to the configured number.

        Raises:
            RunError: a step failed, or the loss is not finite; a file cannot be written. What was done before is saved
                where that can be.
            StoppedError: this process, or that of another rank, was asked to end.
        """
        if not self._begun:
            self.begin()
        config = self.config
        self._reports.open(start, self._again)
        losses: list[float] = []
        forget_memory(self.engine.mesh.device)
        try:
            for step in range(start, config.steps):
                losses += self._step(step)
                if step == start and self.checkpoints is not None:  # not known before: state begins with a step
                    self.checkpoints.rehearse(self.batches.state())
                self._checkpoint(step + 1, step + 1 == config.steps)
                if self.engine.noticed and step + 1 < config.steps:
                    losses += self._flush()
                    self._end_early(step + 1)
            losses += self._flush()
            if self.checkpoints is not None:
                self.checkpoints.finish()
            if losses:
                self._reports.measure()
            self._reports.write_held()
            if self._fault():
                raise RunError(f"{self._fault()}; all {config.steps} steps are done, and their checkpoints saved")
        except BaseException:
            if self.checkpoints is not None:  # what was begun is saved; where a peer is gone, this fails soon
                with contextlib.suppress(MipipeError):
                    self.checkpoints.finish(min(LAST_CHECKPOINT_S, self.config.timeout_s))
            raise
        finally:
            self._reports.close()
        return losses

    def _fault(self) -> str:
        """Why a file of this rank's could not be written; the run ends for it after a step, like for SIGTERM."""
        return self._reports.fault or self.experts.fault

    def _end_early(self, done: int) -> None:
        """Save what is done and raise; on all ranks, after the same step."""
        asked = gather((self.stop(), self._fault()))
        where = self._keep(done)
        fault = next((text for _, text in asked if text), "")
        if fault:
            raise RunError(f"step {done}: {fault}; {where}")
        ranks = ", ".join(str(number) for number, (stop, _) in enumerate(asked) if stop)
        raise StoppedError(f"asked to end (SIGTERM, rank {ranks}): stopped after step {done} of {self.config.steps};"
                           f" {where}")

    def _keep(self, done: int, before: bool = False) -> str:
        """Save what is done, unless it is saved; where it is, for people. ``before``: see `Batches.state`."""
        if self.checkpoints is None:
            return "no checkpoint is configured, so nothing is saved"
        if not done:
            return "no step was done before it"
        try:
            if self._saved != done:
                self.checkpoints.save(done, self.batches.state(before))
            self.checkpoints.finish()
        except MipipeError as error:
            return f"what was done cannot be saved: {error}"
        self._saved = done
        return f"what was done is saved in {self.checkpoints.saved}; go on with --resume"

    def _step(self, step: int) -> list[float]:
        """One step, and the losses that are known by its end: its own, or without a barrier that of the step before."""
        begin = time.perf_counter()
        last = step == self.config.steps - 1
        self.engine.measuring = last and self._reports.wants_times
        loss, loading, skipped = self._advance(step, last)
        extra = self.experts.after(step + 1) | ({"data/skipped": skipped} if skipped else {})
        if self.beams is not None:
            extra |= {"adapters/grown": self.beams.after(step + 1)}
        done = StepDone(step, time.perf_counter() - begin, loading, extra)
        if self._late:
            before, self._unsummed = self._unsummed, done
            known = [] if before is None else [(before, loss)]
        else:
            known = [(done, loss)]
        return [self._reports.tell(*item, self._norm) for item in known]

    def _flush(self) -> list[float]:
        """The loss of the last step, where it was not waited for."""
        done, self._unsummed = self._unsummed, None
        if done is None or not self._late:
            return []
        loss, self._norm = self.engine.finish(), self._clip.finish()
        return [self._reports.tell(done, loss, self._norm)]

    def _advance(self, step: int, last: bool) -> tuple[float | None, float, int]:
        """The engine's step with the next valid batch: loss, seconds of loading, invalid batches passed over."""
        loading, skipped = 0.0, 0
        while True:
            begin = time.perf_counter()
            batch = self._next_batch()
            loading += time.perf_counter() - begin
            try:
                with StepProfile(self.config.profile if last else None, self.engine, self._say_here):
                    loss = self.engine.step(batch)
                self._norm = self._clip.carried()
                return loss, loading, skipped
            except BatchError as error:
                if isinstance(error, DataEnd) or not self.config.data.skip_invalid or skipped >= SKIPPED_IN_A_ROW:
                    kept = self._keep(step, before=not isinstance(batch, BatchError))
                    raise type(error)(f"{error}; {kept}") from None
                skipped += 1
                self.say(f"{error}; passed over (skip_invalid)")

    def _next_batch(self) -> Batch | BatchError:
        """The next batch; where the data has ended, that, which the engine tells the other copies."""
        try:
            return next(self.batches)
        except BatchError as error:
            return error

    def _checkpoint(self, done: int, last: bool) -> None:
        if self.checkpoints is None or self.config.checkpoint is None:
            return
        every = self.config.checkpoint.every
        if last or (every and done % every == 0):
            self.checkpoints.save(done, self.batches.state())
            self._saved = done
