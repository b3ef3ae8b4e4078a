"""What a training run is: the YAML file of `mipipe train`, validated; unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT, from_data, load_data


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """``name`` of torch.optim in any case, or package.module:Class; ``options`` are its further arguments.

    ``shard`` divides the optimizer's state among data-parallel copies of the plan (ZeRO stage 1).
    """

    __pydantic_config__: ClassVar = STRICT
    name: str = "adamw"
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    shard: bool = False


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Learning rate: linear warm-up over ``warmup`` steps, then constant or decaying to 0 at the last step."""

    __pydantic_config__: ClassVar = STRICT
    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0


@dataclass(frozen=True, slots=True)
class DataConfig:
    """``source``: ``stdlib`` (Python's own source files as bytes), a folder (``suffix`` filters its files), or
    ``package.module:callable`` that gets (graph, rows, seed, **options) and returns an iterable of batches."""

    __pydantic_config__: ClassVar = STRICT
    source: str = "stdlib"
    suffix: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Where checkpoints go and how often; 0: only at the end. ``keep``: how many stay."""

    __pydantic_config__: ClassVar = STRICT
    folder: str
    every: int = 0
    keep: int = 2
    asynchronous: bool = True


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run.

    ``batch`` and ``seq`` are checked against the graph and the plan when given (they are fixed there). ``weights`` is a
    folder of safetensors files, else the model is initialised at random from ``seed``; ``model`` overrides where the
    graph says it came from. ``dtype`` is that of master weights, if another than the graph's. ``metrics`` (JSONL),
    ``timeline`` (measured, of the last step) and ``profile`` (Chrome trace of the last step, one per rank) are files.
    """

    __pydantic_config__: ClassVar = STRICT
    steps: int
    seed: int = 0
    batch: int | None = None
    seq: int | None = None
    model: str | None = None
    weights: str | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    clip: float | None = None
    dtype: Literal["float64", "float32", "bfloat16"] | None = None
    compile: bool = False
    metrics: str | None = None
    tensorboard: str | None = None
    timeline: str | None = None
    profile: str | None = None
    checkpoint: CheckpointConfig | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"train config: {self.steps} steps; expected at least 1")
        if self.timeout_s <= 0:
            raise InputError(f"train config: timeout_s is {self.timeout_s}; expected more than 0")


def read_config(path: str | Path) -> TrainConfig:
    """A training configuration from YAML.

    Raises:
        InputError: unreadable, an unknown key, a wrong type or value.
    """
    return from_data(load_data(path), TrainConfig, str(path))
