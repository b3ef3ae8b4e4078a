"""The training loop of a worker: data, engine, optimizer, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mipipe.graphs.errors import MipipeError, RunError
from mipipe.graphs.serialize import save
from mipipe.planner.experts.maps import ExpertMap
from mipipe.planner.timeline import Timeline
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.run import ExpertRun
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.metrics import Record, memory_record, open_metrics
from mipipe.runtime.train.optim import clip_gradients, learning_rate_factor, make_optimizer
from mipipe.runtime.train.trace import measured_timeline

if TYPE_CHECKING:
    from mipipe.runtime.weights.checkpoint import Checkpoints

LAST_CHECKPOINT_S = 60.0
"""How long a run that fails waits at most for the checkpoint it had begun to write."""


class Trainer:
    """One rank's training run. ``progress`` is called with (step, loss) after every step."""

    def __init__(self, engine: Engine, config: TrainConfig, batches: Batches,
                 progress: Callable[[int, float], None] | None = None, predicted: Timeline | None = None,
                 maps: Mapping[int, ExpertMap] | None = None) -> None:
        self.engine, self.config, self.batches = engine, config, batches
        self.progress, self.predicted = progress, predicted
        options = {"lr": config.optimizer.lr, **config.optimizer.options}
        self.optimizer = make_optimizer(config.optimizer.name, engine, options, config.optimizer.shard,
                                        config.optimizer.groups)
        self._rates = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer is not None else []
        self._factor = learning_rate_factor(config.schedule, config.steps)
        self._norm = 0.0
        engine.on_update = self._update
        self.checkpoints: Checkpoints | None = None
        if config.checkpoint is not None:
            from mipipe.runtime.weights.checkpoint import Checkpoints  # takes more than a second to import
            self.checkpoints = Checkpoints(config.checkpoint.folder, engine, self.optimizer,
                                           keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous,
                                           timeout_s=config.timeout_s)
        self.experts = ExpertRun(engine, config.experts, maps or {}, self.optimizer, config.steps)
        self.first = engine.mesh.rank == 0 and engine.mesh.copy == 0

    def _update(self) -> None:
        """Clip, set the learning rate, step, forget the gradients."""
        self._norm = clip_gradients(self.engine, self.config.clip)
        if self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self._factor(self.engine.steps_done)
            self.optimizer.step()
        self.engine.zero_grad()

    def resume(self) -> int:
        """The number of steps done by the checkpoint that was loaded; 0 without one."""
        state = self.checkpoints.resume() if self.checkpoints is not None else None
        if state is None:
            return 0
        self.batches.resume(state["data"])
        self.experts.resume(int(state["step"]))
        return int(state["step"])

    def run(self, start: int = 0) -> list[float]:
        """The losses of the steps from ``start`` to the configured number.

        Raises:
            RunError: a step failed, or the loss is not finite.
        """
        config = self.config
        metrics = open_metrics(config.metrics, config.tensorboard, start) if self.first else None
        losses = []
        try:
            for step in range(start, config.steps):
                losses.append(self._step(step, metrics.write if metrics is not None else None))
            if self.checkpoints is not None:
                self.checkpoints.finish()
        except BaseException:
            if self.checkpoints is not None:  # what was begun is saved; where a peer is gone, this fails soon
                with contextlib.suppress(MipipeError):
                    self.checkpoints.finish(min(LAST_CHECKPOINT_S, self.config.timeout_s))
            raise
        finally:
            if metrics is not None:
                metrics.close()
        return losses

    def _step(self, step: int, write: Callable[[Record], None] | None) -> float:
        """The loss of one step; its record goes to ``write``."""
        begin = time.perf_counter()
        batch = next(self.batches)
        loaded = time.perf_counter()
        last = step == self.config.steps - 1
        with _profiler(self.config.profile if last else None, self.engine):
            loss = self.engine.step(batch)
        assert loss is not None
        if not math.isfinite(loss):
            raise RunError(f"step {step + 1}: the loss is {loss}; lower the learning rate, clip gradients, or look"
                           " for bad data in this step's batch")
        timeline = measured_timeline(self.engine) if last else None
        extra = self.experts.after(step + 1)
        if write is not None:
            write({**self._record(step, loss, begin, loaded, timeline), **extra})
        if self.progress is not None and self.first:
            self.progress(step + 1, loss)
        if timeline is not None and self.config.timeline:
            save(timeline, self.config.timeline)
        self._checkpoint(step + 1, last)
        return loss

    def _checkpoint(self, done: int, last: bool) -> None:
        if self.checkpoints is None or self.config.checkpoint is None:
            return
        every = self.config.checkpoint.every
        if last or (every and done % every == 0):
            self.checkpoints.save(done, self.batches.state())

    def _record(self, step: int, loss: float, begin: float, loaded: float,
                timeline: Timeline | None) -> Record:
        took = time.perf_counter() - begin
        record: Record = {
            "step": step + 1, "loss_metrics/global_avg_loss": loss, "grad_norm": self._norm,
            "lr": self.config.optimizer.lr * self._factor(step), "time_metrics/end_to_end(s)": took,
            "time_metrics/data_loading(s)": loaded - begin,
            "time_metrics/data_loading(%)": 100 * (loaded - begin) / took}
        tokens = self._tokens()
        if tokens:
            record["throughput(tps)"] = tokens / took
        record |= memory_record(self.engine.mesh.device)
        if timeline is not None:
            record["bubble_ratio/measured"] = timeline.bubble_ratio
            if self.predicted is not None:
                record["bubble_ratio/predicted"] = self.predicted.bubble_ratio
        return record

    def _tokens(self) -> int:
        """Tokens of one step over all copies."""
        spec = next((value.spec for value in self.engine.graph.values if value.name == "input_ids"), None)
        if spec is None:
            return 0
        return math.prod(spec.shape) * self.engine.plan.problem.num_microbatches * self.engine.mesh.num_copies


class _profiler:
    """torch.profiler around one step, written as a Chrome trace for each rank; nothing without a path."""

    def __init__(self, path: str | None, engine: Engine) -> None:
        place = engine.mesh.copy * engine.mesh.num_ranks + engine.mesh.rank
        self._path = Path(path).with_suffix(f".rank{place}.json") if path else None
        self._profile = torch.profiler.profile() if path else None

    def __enter__(self) -> None:
        if self._profile is not None:
            self._profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)
            self._profile.export_chrome_trace(str(self._path))
