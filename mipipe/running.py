"""Plans run under torchrun, merges and conversions: `train`, `merge` and `convert`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mipipe.files import PathLike, size_of

if TYPE_CHECKING:
    from mipipe.graphs.merging.recipes.recipe import MergeRecipe
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.planner.plan import Plan
    from mipipe.runtime.convert.launch import ConvertResult
    from mipipe.runtime.merge.launching.launch import MergeResult
    from mipipe.runtime.train.config import TrainConfig
    from mipipe.runtime.train.launching.launch import TrainResult


def train(plan: Plan | PathLike, graph: OperatorGraph | PathLike, config: TrainConfig | Mapping[str, Any] | PathLike, *,
          resume: bool = False, copies: int | None = None, max_restarts: int = 0, timeout_s: float | None = None,
          progress: bool | None = None, torchrun: Sequence[str] = (), num_processes: int | None = None,
          device: Literal["cpu", "cuda"] | None = None) -> TrainResult:
    """Train as the plan says, under torchrun with one worker for each device, until done.

    Args:
        plan, graph: of the model; values are handed to the workers as files.
        config: the training configuration: a YAML file, or its content as a mapping (``{"steps": 100, ...}``).
        resume: continue from the newest checkpoint.
        copies: data-parallel copies of the plan; None: as many as it was made for.
        max_restarts: by torchrun, after a worker died.
        timeout_s: end the run after this time.
        progress: lines on stderr; by default where that is a terminal.
        device: None: what the plan was made for; a plan for devices that are not here is refused.
        torchrun, num_processes: flags for torchrun on several nodes, and the processes on this one.

    Raises:
        MipipeError: as the failing worker raised it.
    """
    from mipipe.graphs.serialize import save as write
    from mipipe.graphs.serialize import to_data, write_text
    from mipipe.runtime.averaged import train as run

    with tempfile.TemporaryDirectory(prefix="mipipe-train-") as folder:
        files: list[PathLike] = []
        for name, value in (("plan.json", plan), ("graph.json", graph)):
            if isinstance(value, (str, Path)):
                files.append(value)
            else:
                write(value, Path(folder) / name)
                files.append(Path(folder) / name)
        if isinstance(config, (str, Path)):
            files.append(config)
        else:
            import json

            data = dict(config) if isinstance(config, Mapping) else to_data(config)
            data.setdefault("metrics", str(Path(folder) / "metrics.jsonl"))  # the result's records come from it
            write_text(Path(folder) / "train.json", json.dumps(data))
            files.append(Path(folder) / "train.json")
        return run(*files, resume=resume, max_restarts=max_restarts, copies=copies, timeout_s=timeout_s,
                   progress=progress, torchrun=torchrun, num_processes=num_processes, device=device)


def merge(recipe: PathLike | Mapping[str, Any] | MergeRecipe | Sequence[MergeRecipe], out: PathLike, *, ranks: int = 1,
          memory: int | str | None = None, dtype: str | None = None, device: Literal["cpu", "cuda"] = "cpu",
          shard: int | str = "5GB", verify: bool = True, loaders: Sequence[str] = (),
          on_progress: Callable[[int, int], None] | None = None) -> MergeResult:
    """Merge models as a recipe says, into a new folder.

    Args:
        recipe: a YAML file in mergekit's vocabulary, its content as a mapping, or recipes to run one after another.
        out: the folder to make.
        ranks: processes that merge side by side.
        memory: per rank beyond the bare process, as bytes or ``"4GB"``; None: no limit.
        dtype: of the result, in place of the recipe's.
        shard: largest file of the result.
        verify: open the result as transformers would before it is called done.
        loaders: functions (``package.module:loader``) that the recipe's calibration may call for samples.
        on_progress: called with (bytes done, bytes in all).

    Raises:
        InputError: the recipe, a model or an option is wrong, or ``out`` exists.
        InfeasibleError: the memory is below what one tensor needs. RunError: a source is damaged, a rank died.
    """
    from mipipe.graphs.merging.recipes.read import parse_recipe
    from mipipe.graphs.merging.recipes.recipe import MergeRecipe
    from mipipe.graphs.units import parse_bytes
    from mipipe.runtime.merge.launching.launch import MergeOptions
    from mipipe.runtime.merge.launching.launch import merge as run

    options = MergeOptions(num_ranks=ranks, device=device, memory_cap=size_of(memory, "memory"),
                           shard_bytes=parse_bytes(shard, "shard"), dtype=dtype,
                           verify=verify, loaders=tuple(loaders))
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(dict(recipe), "recipe")
    return run([recipe] if isinstance(recipe, MergeRecipe) else recipe, out, options, on_progress)


def convert(recipe: PathLike, out: PathLike, *, loaders: Sequence[str] = (), verify: bool = True) -> ConvertResult:
    """Convert a model's experts as a recipe says, into a new folder.

    Args:
        recipe: a YAML file with ``method``, ``model`` and the method's own values.
        loaders: ``package.module:function`` names that the recipe may call for its texts.
        verify: hold the result against its config's class before it is called done.

    Raises:
        InputError: the recipe or the model is wrong, or ``out`` exists.
        RunError: no space, or a result that would not load.
    """
    from mipipe.runtime.convert.launch import convert as run

    return run(recipe, out, loaders=loaders, verify=verify)
