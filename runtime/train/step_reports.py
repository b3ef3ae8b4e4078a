"""What is told of a run's steps: records for its metrics, the timeline of the last step, and its profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import MipipeError, RunError
from mipipe.graphs.serialize import save
from mipipe.planner.timeline import Timeline
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.metrics import Metrics, Record, memory_record, open_metrics
from mipipe.runtime.train.trace import measured_timeline


@dataclass(frozen=True, slots=True)
class StepDone:
    """What is known of a step without its loss: its number from 0, its seconds in all and of loading, and more for its
    record."""

    step: int
    seconds: float
    loading: float
    extra: Record


class StepReports:
    """The reports of one rank's steps; the first rank's become records. ``factor`` of a step is its learning rate's,
    ``predicted`` the plan's timeline; ``progress`` is called with (step, loss) on the first rank, ``say`` with lines
    for people."""

    def __init__(self, engine: Engine, config: TrainConfig, factor: Callable[[int], float],
                 predicted: Timeline | None, progress: Callable[[int, float], None] | None,
                 say: Callable[[str], None]) -> None:
        self.engine, self.config, self._factor = engine, config, factor
        self._predicted, self._progress, self.say = predicted, progress, say
        self._metrics: Metrics | None = None
        self._held: Record | None = None

    @property
    def wants_times(self) -> bool:
        """Whether the last step is to be measured."""
        return bool(self.config.timeline or self.config.metrics or self.config.tensorboard)

    @property
    def fault(self) -> str:
        """Why a record could not be written; empty where all were."""
        return self._metrics.fault if self._metrics is not None else ""

    def open(self, start: int, again: bool = False) -> None:
        """Begin to write records, those of the steps from ``start``; ``again``: as `open_metrics`."""
        if self.engine.mesh.first:
            self._metrics = open_metrics(self.config.metrics, self.config.tensorboard, start, again)

    def close(self) -> None:
        """Write what waits, and close the files."""
        if self._metrics is not None:
            self.write_held()
            self._metrics.close()

    def tell(self, done: StepDone, loss: float | None, norm: float) -> float:
        """A step's loss, checked; its record goes to the metrics."""
        assert loss is not None
        if not math.isfinite(loss):
            raise RunError(f"step {done.step + 1}: the loss is {loss}; lower the learning rate, clip gradients, or look"
                           " for bad data in this step's batch")
        if self._metrics is not None:
            record = {**self._record(done, loss, norm), **done.extra}
            if done.step == self.config.steps - 1:
                self._held = record  # it gets what the timeline says, once all is saved
            else:
                self._write(record)
        if self._progress is not None and self.engine.mesh.first:
            self._progress(done.step + 1, loss)
        return loss

    def measure(self) -> None:
        """The timeline of the last step, for its record and its file; after all is saved, and no failure of it ends the
        run."""
        if not self.wants_times:
            return
        try:
            timeline = measured_timeline(self.engine)
            if timeline is None:
                return
            if self._held is not None and timeline.in_device_time:
                self._held["bubble_ratio/measured"] = timeline.bubble_ratio
                if self._predicted is not None:
                    self._held["bubble_ratio/predicted"] = self._predicted.bubble_ratio
            if self.config.timeline:
                save(timeline, self.config.timeline)
        except (MipipeError, OSError, RuntimeError) as error:
            self.say(f"the timeline of the last step could not be taken: {error}")

    def write_held(self) -> None:
        """Write the last step's record, if it waits for its timeline."""
        record, self._held = self._held, None
        self._write(record)

    def _write(self, record: Record | None) -> None:
        if self._metrics is not None and record is not None:
            self._metrics.write(record)

    def _record(self, done: StepDone, loss: float, norm: float) -> Record:
        record: Record = {
            "step": done.step + 1, "loss_metrics/global_avg_loss": loss, "grad_norm": norm,
            "lr": self.config.optimizer.lr * self._factor(done.step), "time_metrics/end_to_end(s)": done.seconds,
            "time_metrics/data_loading(s)": done.loading,
            "time_metrics/data_loading(%)": 100 * done.loading / done.seconds}
        tokens = self._tokens()
        if tokens:
            record["throughput(tps)"] = tokens / done.seconds
        return record | memory_record(self.engine.mesh.device)

    def _tokens(self) -> int:
        """Tokens of one step over all copies."""
        spec = next((value.spec for value in self.engine.graph.values if value.name == "input_ids"), None)
        if spec is None:
            return 0
        return math.prod(spec.shape) * self.engine.plan.problem.num_microbatches * self.engine.mesh.num_copies


class StepProfile:
    """torch.profiler around one step, written as a Chrome trace for each rank; nothing without a path.

    A trace that cannot be written is said (``say``: this rank's, as each has its own trace), and ends nothing: the step
    is done, and is to be saved.
    """

    def __init__(self, path: str | None, engine: Engine, say: Callable[[str], None]) -> None:
        mesh = engine.mesh
        place = (mesh.copy * mesh.num_ranks + mesh.rank) * mesh.team.members + mesh.member
        self._path = Path(path).with_suffix(f".rank{place}.json") if path else None
        self._profile = torch.profiler.profile() if path else None
        self._say = say

    def __enter__(self) -> None:
        if self._profile is not None:
            self._profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._profile is None or self._path is None:
            return
        self._profile.__exit__(*error)
        try:
            self._profile.export_chrome_trace(str(self._path))
            fault = "" if _is_whole(self._path) else "it is missing or cut off; is the disk full?"
        except (OSError, RuntimeError) as failure:
            fault = str(failure).strip().partition("\n")[0]
        if fault:
            self._say(f"profile {self._path}: cannot be written: {fault}")


_TAIL_BYTES = 8192
"""How much of a trace's end is looked at: more than a file's name, which stands there."""


def _is_whole(path: Path) -> bool:
    """Whether a trace is there, with its end; torch says nothing where it could not write it."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        stream.seek(-min(_TAIL_BYTES, path.stat().st_size), 2)
        tail = stream.read().rstrip()
    return b"]" in tail and tail.endswith(b"}")
