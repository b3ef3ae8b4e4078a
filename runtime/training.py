"""The training loop of a worker: data, engine, optimizer, metrics, checkpoints."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from mipipe.graphs.errors import RunError
from mipipe.graphs.serialize import save
from mipipe.planner.timeline import Timeline
from mipipe.runtime.checkpoint import Checkpoints
from mipipe.runtime.config import TrainConfig
from mipipe.runtime.data import Batches
from mipipe.runtime.engine import Engine
from mipipe.runtime.optim import clip_gradients, learning_rate_factor, make_optimizer
from mipipe.runtime.trace import measured_timeline


@dataclass(slots=True)
class Metrics:
    """Numbers of a run, one JSON line for each step, under torchtitan's names. Written by one rank."""

    stream: TextIO | None = None
    board: Any = None
    records: list[dict[str, float]] = field(default_factory=list)

    def write(self, record: dict[str, float]) -> None:
        self.records.append(record)
        if self.stream is not None:
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()
        if self.board is not None:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(record["step"]))


class Trainer:
    """One rank's training run. ``progress`` is called with (step, loss) after every step."""

    def __init__(self, engine: Engine, config: TrainConfig, batches: Batches,
                 progress: Callable[[int, float], None] | None = None, predicted: Timeline | None = None) -> None:
        self.engine, self.config, self.batches = engine, config, batches
        self.progress, self.predicted = progress, predicted
        options = {"lr": config.optimizer.lr, **config.optimizer.options}
        self.optimizer = make_optimizer(config.optimizer.name, engine, options, config.optimizer.shard)
        factor = learning_rate_factor(config.schedule.name, config.schedule.warmup, config.steps)
        self._factor = factor
        self._norm = 0.0
        engine.on_update = self._update
        self.checkpoints: Checkpoints | None = None
        if config.checkpoint is not None:
            self.checkpoints = Checkpoints(config.checkpoint.folder, engine, self.optimizer,
                                           keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous)
        self.first = engine.mesh.rank == 0 and engine.mesh.copy == 0

    def _update(self) -> None:
        """Clip, set the learning rate, step, forget the gradients."""
        self._norm = clip_gradients(self.engine, self.config.clip)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.optimizer.lr * self._factor(self.engine.steps_done)
            self.optimizer.step()
        self.engine.zero_grad()

    def resume(self) -> int:
        """The number of steps done by the checkpoint that was loaded; 0 without one."""
        state = self.checkpoints.resume() if self.checkpoints is not None else None
        if state is None:
            return 0
        self.batches.resume(state["data"])
        return int(state["step"])

    def run(self, start: int = 0) -> list[float]:
        """The losses of the steps from ``start`` to the configured number.

        Raises:
            RunError: a step failed, or the loss is not finite.
        """
        losses = []
        metrics = self._open_metrics(start)
        for step in range(start, self.config.steps):
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
            losses.append(loss)
            timeline = measured_timeline(self.engine) if last else None
            if metrics is not None:
                metrics.write(self._record(step, loss, begin, loaded, timeline))
            if self.progress is not None and self.first:
                self.progress(step + 1, loss)
            if timeline is not None and self.config.timeline:
                save(timeline, self.config.timeline)
            self._checkpoint(step + 1, last)
        if self.checkpoints is not None:
            self.checkpoints.finish()
        return losses

    def _checkpoint(self, done: int, last: bool) -> None:
        if self.checkpoints is None or self.config.checkpoint is None:
            return
        every = self.config.checkpoint.every
        if last or (every and done % every == 0):
            self.checkpoints.save(done, self.batches.state())

    def _open_metrics(self, start: int) -> Metrics | None:
        if not self.first:
            return None
        metrics = Metrics()
        if self.config.metrics:
            path = Path(self.config.metrics)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _records_before(path, start)
            path.write_text("".join(line + "\n" for line in kept))
            metrics.stream = path.open("a")
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            metrics.board = SummaryWriter(self.config.tensorboard)
        return metrics

    def _record(self, step: int, loss: float, begin: float, loaded: float,
                timeline: Timeline | None) -> dict[str, float]:
        took = time.perf_counter() - begin
        record: dict[str, float] = {
            "step": step + 1, "loss_metrics/global_avg_loss": loss, "grad_norm": self._norm,
            "lr": self.config.optimizer.lr * self._factor(step), "time_metrics/end_to_end(s)": took,
            "time_metrics/data_loading(s)": loaded - begin}
        tokens = self._tokens()
        if tokens:
            record["throughput(tps)"] = tokens / took
        if self.engine.mesh.device.type == "cuda":
            record["memory/max_reserved(GiB)"] = torch.cuda.max_memory_reserved() / 2**30
        else:
            record["memory/max_resident(GiB)"] = _resident_bytes() / 2**30
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
        self._path = Path(path).with_suffix(f".rank{engine.mesh.rank}.json") if path else None
        self._profile = torch.profiler.profile() if path else None

    def __enter__(self) -> None:
        if self._profile is not None:
            self._profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)
            self._profile.export_chrome_trace(str(self._path))


def _records_before(path: Path, start: int) -> list[str]:
    """The lines of an earlier run that a resumed one keeps: steps up to ``start``."""
    if not start or not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break  # the line that was being written when the run was killed
    return kept


def _resident_bytes() -> int:
    """The peak resident size of this process."""
    import resource
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
