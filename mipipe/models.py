"""Models as graphs with costs: `capture` and `profile`. Both need torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipipe.files import PathLike, value_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mipipe.graphs.capture.labels import Granularity as CaptureGranularity
    from mipipe.graphs.coarse.coarsen import GroupGranularity
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.recipes.options import RecipeConfig


def capture(model: PathLike | nn.Module, inputs: Mapping[str, Any] | None = None, *, seq: int = 128, batch: int = 1,
            dtype: str = "float32", loss: Callable[[Any, Mapping[str, Tensor]], Any] | None = None,
            loss_info: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None,
            images: int = 1, image: int = 0, frames: int = 0, expert_groups: int = 1, expert_parallel: int = 1,
            freeze: Sequence[str] = (), granularity: CaptureGranularity = "block", name: str | None = None,
            recipe: RecipeConfig | None = None,
            on_progress: Callable[[str], None] | None = None) -> OperatorGraph:
    """The operator graph of a model's training step: forward, input gradient and weight gradient.

    Args:
        model: a module with ``inputs``, example tensors of one microbatch by forward argument; or what names a model:
            a folder with a transformers ``config.json``, ``package.module:factory``, a ``.pt2`` program.
        seq, batch, dtype, overrides, images, image, frames, expert_groups, expert_parallel, freeze: of a named model,
            as for ``mipipe capture``; no weights are made.
        loss: of a module that does not return its scalar loss: ``loss(outputs, inputs)``.
        loss_info: how that loss is normalised (`mipipe.graphs.sum_over`); by default a mean over microbatches.
        recipe: of a named model: another loss, a frozen reference, adapters (`mipipe.graphs.RecipeConfig`).
        granularity: the smallest pieces that may be placed: layer, block, module or operator.
        name: of a module's graph; None: its class.

    Raises:
        InputError: the source does not give a model.
        GraphError: the model cannot be captured.
    """
    from mipipe.graphs.capture.model import capture as capture_source
    from mipipe.graphs.capture.model import capture_module
    from mipipe.graphs.errors import InputError

    if isinstance(model, (str, Path)):
        if inputs is not None or loss is not None:
            raise InputError(f"{model}: names a model, which has its own inputs and loss; give them with a module")
        return capture_source(model, seq=seq, batch=batch, dtype=dtype, overrides=overrides, images=images, image=image,
                              frames=frames, expert_groups=expert_groups, expert_parallel=expert_parallel,
                              freeze=freeze, granularity=granularity, recipe=recipe, progress=on_progress)
    if recipe:
        raise InputError(f"module {type(model).__name__}: a recipe goes with what names a model; give a module its"
                         " loss, or use mipipe.graphs.with_recipe")
    if inputs is None:
        raise InputError(f"module {type(model).__name__}: capturing it needs inputs, example tensors of one microbatch"
                         " by forward argument")
    return capture_module(model, inputs, loss=loss, loss_info=loss_info, name=name, granularity=granularity,
                          progress=on_progress)


def profile(graph: OperatorGraph | PathLike, *, groups: int | None = None, granularity: GroupGranularity | None = None,
            workers: int = 1, device: str = "cpu", seconds: float = 0.25, fresh: bool = False,
            on_progress: Callable[[int, int], None] | None = None) -> CostTable:
    """The measured cost of every group of a graph on this machine, for `plan`.

    Args:
        groups, granularity: merge operators into about so many groups, or by structure.
        workers: processes that compute at once, as they will in training.
        device: ``cpu`` or ``cuda``.
        seconds: measured for each distinct group.
        fresh: measure anew, without earlier results kept for this machine.

    Raises:
        InputError: no such device. RunError: a worker failed.
    """
    from mipipe.graphs.coarse.coarsen import coarsen
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.profiling.profile import DEFAULT_CACHE, ProfileOptions, profile_groups

    found = value_of(graph, OperatorGraph)
    coarse = coarsen(found, num_groups=groups, granularity=granularity)
    return profile_groups(found, coarse, workers=workers, device=device, cache=None if fresh else DEFAULT_CACHE,
                          options=ProfileOptions(seconds=seconds), progress=on_progress)
