"""Which stored tensors make a parameter: names on disk and in the model, by transformers' own conversion table.

transformers 5 fuses what checkpoints on disk hold one by one (the experts of a mixture), and renames parts of older
models. Only names are handled here, for all tensors of a folder; data are converted tensor by tensor when asked for.
A module that is not transformers' has the same names on disk.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mipipe.graphs.errors import InputError


@dataclass(frozen=True, slots=True)
class TensorRecipe:
    """How stored tensors make ``target``: ``sources`` by pattern, each in order; ``converter`` None: as it is stored.

    A converter may make several parameters at once; ``target`` is the first of them.
    """

    target: str
    sources: Mapping[str, tuple[str, ...]]
    converter: Any = None

    def rows_of(self, rows: tuple[int, int], count: int) -> TensorRecipe | None:
        """The recipe of rows ``[start, stop)`` alone, where each of ``count`` rows is a stored tensor (an expert)."""
        stacks = self.converter is not None and type(self.converter.operations[0]).__name__ == "MergeModulelist"
        if not stacks or self.converter.operations[0].dim or any(len(item) != count for item in self.sources.values()):
            return None
        sources = {key: item[slice(*rows)] for key, item in self.sources.items()}
        return TensorRecipe(self.target, sources, self.converter)

    def make(self, read: Callable[[str], Tensor], module: nn.Module) -> dict[str, Tensor]:
        """The parameters by name, from ``read(stored name)``."""
        if self.converter is None:
            ((source,),) = self.sources.values()
            return {self.target: read(source)}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, read(name))
        found = converter.convert(self.target, model=module, config=module.config)
        return {name: item[0] if isinstance(item, list) else item for name, item in found.items()}


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is one of transformers' models (without importing transformers for others)."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


def recipes(stored: Iterable[str], module: nn.Module) -> dict[str, TensorRecipe]:
    """The recipe of every parameter and buffer that the stored names make, by the model's name.

    The rule is that of transformers' loader: all renamings, then at most one converter, then the base model's prefix.
    """
    names = set(module.state_dict())
    if not is_transformers(module):
        return {name: TensorRecipe(name, {name: (name,)}) for name in stored if name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    transforms = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    prefix, state = module.base_model_prefix, dict.fromkeys(names, True)
    grouped: dict[str, dict[str, list[str]]] = {}
    used: dict[str, Any] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)  # type: ignore[arg-type]
        if target not in names and name in names:
            target, pattern = rename_source_key(name, [], [], prefix, state)  # type: ignore[arg-type]
        if target in names:
            used.setdefault(target, by_pattern[pattern] if pattern is not None else None)
            grouped.setdefault(target, {}).setdefault(pattern or name, []).append(name)
    found: dict[str, TensorRecipe] = {}
    for target, sources in grouped.items():
        recipe = TensorRecipe(target, {key: tuple(items) for key, items in sources.items()}, used[target])
        for name in _targets(recipe) & names:
            found[name] = recipe
    return found


def _targets(recipe: TensorRecipe) -> set[str]:
    """The parameters that a recipe makes."""
    if recipe.converter is None:
        return {recipe.target}
    first, *others = recipe.converter.target_patterns
    return {recipe.target, *(recipe.target.replace(first, other) for other in others)}


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor to be stored: a strided view of the model's parameter ``fqn``. ``dtype`` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fqn: str
    stride: tuple[int, ...]
    offset: int
    write_bytes: int


class ClonesAreViews(TorchDispatchMode):
    """Makes ``contiguous()`` and ``clone()`` give the tensor itself: on the meta device, what a conversion returns then
    shows which elements of which parameter it is made of."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0]
        return func(*args, **(kwargs or {}))


def stored_views(module: nn.Module, tensors: Mapping[str, Tensor], dtype_names: Mapping[torch.dtype, str],
                 dtype: torch.dtype | None = None) -> list[StoredView]:
    """How parameters go to disk under the names of their model's published checkpoints.

    ``tensors`` (meta) are those of the model by name; ``dtype`` replaces their floating dtypes.

    Raises:
        InputError: the conversion does more than cut and turn tensors, or there is no such dtype in safetensors.
    """
    reverted: Mapping[str, Tensor] = tensors
    if is_transformers(module):
        from transformers.core_model_loading import revert_weight_conversion
        with ClonesAreViews(), torch.no_grad():
            reverted = revert_weight_conversion(module, dict(tensors))  # type: ignore[arg-type]
    owner = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}
    views = []
    for name, tensor in reverted.items():
        fqn = owner.get(tensor.untyped_storage()._cdata)
        if fqn is None:
            raise InputError(f"save: transformers stores {name} in a form that mixes or reorders parameters; such"
                             " models cannot be saved yet")
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if kind not in dtype_names:
            raise InputError(f"save: {fqn} has dtype {kind}, which safetensors does not store")
        views.append(StoredView(name, dtype_names[kind], tuple(tensor.shape), fqn, tensor.stride(),
                                int(tensor.storage_offset()), tensor.numel() * kind.itemsize))
    return views
