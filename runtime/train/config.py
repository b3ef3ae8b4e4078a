"""What a training run is: the YAML file of `mipipe train`, validated; unknown keys are errors.

It is the one file whose names become code (``data.source``, ``optimizer.name``, ``model``): whoever starts a run with
it names them. Python's own library is refused, and a loader and an optimizer must look like some.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from mipipe.graphs.errors import InputError
from mipipe.graphs.expressions import check_expression
from mipipe.graphs.operator_graph import Role
from mipipe.graphs.recipes.adapters import AdapterConfig
from mipipe.graphs.recipes.expansion import ExpandConfig
from mipipe.graphs.recipes.options import LossConfig, RecipeConfig, ReferenceConfig, loss_config
from mipipe.graphs.recipes.routers import RouterConfig
from mipipe.graphs.serialize import STRICT, from_data, load_data
from mipipe.graphs.units import parse_bytes
from mipipe.runtime.train.policy_branches import BranchesConfig, apart


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """Parameters whose name matches ``match`` (a regular expression), or whose ``role`` in the graph is that, take
    these ``options`` of the optimizer, such as ``{weight_decay: 0.0}`` for norms, or another ``lr``. The first group
    that fits counts; with both, both must fit."""

    __pydantic_config__: ClassVar = STRICT
    match: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    role: Role | None = None

    def __post_init__(self) -> None:
        if self.match is None and self.role is None:
            raise InputError("train config, optimizer.groups: a group has neither match nor role; give one of them")
        if self.match is not None:
            check_expression(self.match, "train config, optimizer.groups")


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """``name`` of torch.optim in any case, ``reg`` or ``muon`` (`mipipe.runtime.recipes.optimizers`), or
    package.module:Class; ``options`` are its further arguments.

    ``groups`` give some parameters other options. ``shard`` divides the optimizer's state among data-parallel copies of
    the plan and their members along a context axis (ZeRO stage 1); ``gradients``: gradients as well (stage 2);
    ``parameters``: these and parameters (stage 3).
    """

    __pydantic_config__: ClassVar = STRICT
    name: str = "adamw"
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    groups: tuple[GroupConfig, ...] = ()
    shard: bool | Literal["gradients", "parameters"] = False


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Learning rate: linear warm-up over ``warmup`` steps, then constant, or decaying at the end.

    The decay takes the last ``decay`` steps (None: all after the warm-up; fewer: warm-up, stable, decay) and ends at
    ``minimum`` times the rate.
    """

    __pydantic_config__: ClassVar = STRICT
    name: Literal["constant", "linear", "cosine", "sqrt"] = "constant"
    warmup: int = 0
    decay: int | None = None
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or (self.decay is not None and self.decay < 1) or not 0 <= self.minimum <= 1:
            raise InputError(f"train config, schedule: warmup {self.warmup}, decay {self.decay}, minimum"
                             f" {self.minimum}; expected warmup >= 0, decay >= 1, minimum from 0 to 1")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """``source``: ``stdlib`` (Python's own source files as bytes), a folder (``suffix`` filters its files),
    ``rollouts`` (responses with rewards, `mipipe.runtime.recipes.rollouts`), or
    ``package.module:callable`` that gets (graph, rows, seed, **options) and returns an iterable of batches. With
    several copies of the plan it needs a parameter ``copy`` too, the number of the copy that it loads for; with
    ``copies`` as well, the copies take the batches of one sequence in turn. ``skip_invalid``: pass over batches that
    are short or have no labels, with a warning. ``prefetch``: load the next batch in a thread while a step runs; not
    for loaders that draw from the process's global random state, which steps draw from too."""

    __pydantic_config__: ClassVar = STRICT
    source: str = "stdlib"
    suffix: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    skip_invalid: bool = False
    prefetch: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Where checkpoints go and how often; 0: only at the end. ``keep``: how many stay. ``accept``: in what a resumed
    run may differ from the one that was saved (``seed``, ``optimizer``, whose state is then made anew, ``data``)."""

    __pydantic_config__: ClassVar = STRICT
    folder: str
    every: int = 0
    keep: int = 2
    asynchronous: bool = True
    accept: tuple[Literal["seed", "optimizer", "data"], ...] = ()

    def __post_init__(self) -> None:
        if self.keep < 1 or self.every < 0:
            raise InputError(f"train config, checkpoint: keep {self.keep}, every {self.every}; expected keep >= 1 and"
                             " every >= 0")


@dataclass(frozen=True, slots=True)
class SaveConfig:
    """The trained weights as a Hugging Face folder, after the last step: files of at most ``shard``, in ``dtype``
    (None: the graph's)."""

    __pydantic_config__: ClassVar = STRICT
    folder: str
    shard: str | int = "5GB"
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if parse_bytes(self.shard, "train config, save.shard") < 1:
            raise InputError(f"train config, save.shard: found {self.shard}, expected a size above 0, such as 5GB")


@dataclass(frozen=True, slots=True)
class ReplanConfig:
    """Experts are placed again every so many steps, by the loads of the last window, where that pays off.

    ``replicas`` per layer. ``cluster``: a cluster file with one device for each that shares experts (none: equal
    devices, and moving is free); ``horizon``: the steps over which a move must pay off (none: until the next time).
    """

    __pydantic_config__: ClassVar = STRICT
    every: int
    replicas: int = 0
    cluster: str | None = None
    horizon: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.replicas < 0:
            raise InputError(f"train config, experts.replan: every {self.every} steps, {self.replicas} replicas;"
                             " expected every >= 1, replicas >= 0")


@dataclass(frozen=True, slots=True)
class ElasticExperts:
    """Elastic MoE: with ``probability``, a token's experts are drawn from the ``pool`` best ones, so that more of them
    work together at inference than in training (`mipipe.runtime.experts.elastic`)."""

    __pydantic_config__: ClassVar = STRICT
    pool: int
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.pool < 1 or not 0 <= self.probability <= 1:
            raise InputError(f"train config, experts.elastic: pool {self.pool}, probability {self.probability};"
                             " expected pool >= 1, probability from 0 to 1")


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The experts of a MoE model: what is recorded of their loads, and where they live.

    ``loads``: the file `mipipe experts --loads` takes, tokens per step and expert averaged over the last ``window``
    steps, written every ``window`` steps and at the end. ``history``: the counts of every step, one JSON line each. For
    graphs captured with ``--expert-parallel`` whose experts several devices of a rank share, copies or members of its
    team: ``map`` places the experts on them (none: equal blocks), ``moves`` are maps to change to after so many steps,
    ``replan`` makes them on the way, and ``load_factor`` caps the rows a device accepts in one layer and microbatch, as
    a multiple of an even share. ``elastic`` draws some tokens' experts from a larger pool.
    """

    __pydantic_config__: ClassVar = STRICT
    loads: str | None = None
    history: str | None = None
    window: int = 100
    map: str | None = None
    moves: dict[int, str] = field(default_factory=dict)
    replan: ReplanConfig | None = None
    load_factor: float | None = None
    elastic: ElasticExperts | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or min(self.moves, default=1) < 1 or (self.load_factor or 1.0) < 1.0:
            raise InputError(f"train config, experts: window {self.window}, moves after steps {list(self.moves)},"
                             f" load_factor {self.load_factor}; expected window >= 1, steps >= 1, load_factor >= 1")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run.

    ``batch`` and ``seq`` are checked against the graph and the plan when given (they are fixed there). ``weights`` is a
    folder of safetensors files of which each rank reads its own tensors, else the model is initialised at random from
    ``seed``; ``save`` writes such a folder at the end. ``model`` overrides where the graph says it came from. ``dtype``
    is that of master weights, if another than the graph's. ``deterministic``: only kernels that give the same bits in
    every run (see `mipipe.runtime.train.launching.devices.deterministic`). ``metrics`` (JSONL), ``timeline`` (measured,
    of the last step) and ``profile`` (Chrome trace of the last step, one per rank) are files; ``tensorboard`` is a
    folder.

    ``barrier: none``: no step waits for the last rank's end (what plans made for the period are for). Losses, norms and
    requests to stop are then known a step later, and ``clip`` goes by the norm of the step before (the first step of a
    process by its own).

    ``loss`` (a name, or `LossConfig`), ``reference``, ``adapters``, ``router`` (losses of a MoE model's routers, or
    none of their training) and ``expand`` (a stage of APEX) are part of the graph: `mipipe capture --config` reads them
    from the same file, and a run is refused where its graph has others. ``branches``: several runs side by side that
    teach each other, under a plan with as many branches; their rollouts take the place of ``data``.
    """

    __pydantic_config__: ClassVar = STRICT
    steps: int
    seed: int = 0
    batch: int | None = None
    seq: int | None = None
    model: str | None = None
    weights: str | None = None
    loss: str | LossConfig | None = None
    reference: ReferenceConfig | None = None
    adapters: AdapterConfig | None = None
    router: RouterConfig | None = None
    expand: ExpandConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    clip: float | None = None
    barrier: Literal["step", "none"] = "step"
    dtype: Literal["float64", "float32", "bfloat16"] | None = None
    compile: bool = False
    deterministic: bool = False
    metrics: str | None = None
    tensorboard: str | None = None
    timeline: str | None = None
    profile: str | None = None
    checkpoint: CheckpointConfig | None = None
    save: SaveConfig | None = None
    experts: ExpertsConfig | None = None
    branches: BranchesConfig | None = None
    timeout_s: float = 600.0

    @property
    def recipe(self) -> RecipeConfig:
        """What of this run is part of its graph."""
        return RecipeConfig(None if self.loss is None else loss_config(self.loss), self.reference, self.adapters,
                            self.router, self.expand)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"train config: {self.steps} steps; expected at least 1")
        if not 0 < self.timeout_s <= 10**7:
            raise InputError(f"train config: timeout_s is {self.timeout_s}; expected more than 0, and at most 10000000")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"train config: clip is {self.clip}; expected more than 0")
        if self.barrier == "none" and self.experts is not None:
            raise InputError("train config: barrier none does not go with experts, whose loads all ranks sum up after"
                             " every step; leave one of them out")
        if self.branches is not None:
            self._check_branches()

    def _check_branches(self) -> None:
        loss = self.recipe.loss
        if loss is None or loss.name != "grpo" or (self.branches is not None and len(self.branches.tasks) > 1
                                                   and self.branches.taught and not loss.values["distill"]):
            raise InputError("train config: branches go with the loss grpo with distill above 0, which is the strength"
                             " of what they teach each other")
        alone = {"data": self.data != DataConfig(), "adapters": self.adapters is not None,
                 "expand": self.expand is not None, "experts": self.experts is not None,
                 "barrier: none": self.barrier == "none"}
        for what, given in alone.items():
            if given:
                raise InputError(f"train config: {what} does not go with branches, "
                                 + ("whose tasks make the rollouts" if what == "data" else
                                    "which keep a copy of the whole policy in step, and average whole weights")
                                 + "; leave it out")

    def of_branch(self, name: str) -> TrainConfig:
        """The run of one of the branches: the same, with outputs of its own (``save.folder`` is for their mean)."""
        save, kept = self.save, self.checkpoint
        return replace(self, branches=None, metrics=apart(self.metrics, name), timeline=apart(self.timeline, name),
                       tensorboard=apart(self.tensorboard, name), profile=apart(self.profile, name),
                       save=None if save is None else replace(save, folder=f"{save.folder.rstrip('/')}.{name}"),
                       checkpoint=None if kept is None else replace(kept, folder=str(Path(kept.folder) / name)))


def read_train_config(path: str | Path) -> TrainConfig:
    """A training configuration from YAML.

    Raises:
        InputError: unreadable, an unknown key, a wrong type or value.
    """
    return from_data(load_data(path), TrainConfig, str(path))
