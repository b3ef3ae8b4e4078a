"""State dicts that torch.save wrote, as safetensors: read by torch's unpickler for weights, which runs no code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.merging.checkpoints.files import PYTORCH, CheckpointFiles, read_checkpoint
from mipipe.graphs.merging.recipes.recipe import MergeRecipe

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training programs keep a model's state dict."""


def convert_pickled(recipes: Sequence[MergeRecipe], folder: Path,
                    tell: Callable[[str], None]) -> dict[str, CheckpointFiles]:
    """The recipes' models that are files of torch.save, converted in ``folder``, by their labels.

    Raises:
        InputError: a file that holds more than weights, or none.
    """
    labels = [label for recipe in recipes for label in _labels(recipe)
              if label.endswith(PYTORCH) and Path(label).is_file()]
    return {label: _convert(Path(label), folder, tell) for label in dict.fromkeys(labels)}


def _labels(recipe: MergeRecipe) -> list[str]:
    models = [*recipe.models, *(source for piece in recipe.slices for source in piece.sources),
              *(model for branch in recipe.branches for model in branch.models)]
    bases = [recipe.base_model, *(piece.base_model for piece in recipe.slices),
             *(branch.base_model for branch in recipe.branches)]
    return [*(model.model for model in models), *(base for base in bases if base)]


def _convert(file: Path, folder: Path, tell: Callable[[str], None]) -> CheckpointFiles:
    status = file.stat()
    seal = hashlib.sha256(f"{file.absolute()}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:16]
    made = folder / f"{file.stem}-{seal}"
    target = made / "model.safetensors"
    if not (made / "whole").exists():
        tensors = read_state_dict(file, tell)
        made.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target, {"format": "pt"})
        (made / "whole").touch()
    return read_checkpoint(target)


def read_state_dict(file: Path, tell: Callable[[str], None] = lambda _line: None) -> dict[str, Tensor]:
    """The tensors of a file of torch.save by name, each with memory of its own.

    Raises:
        InputError: damaged, code inside, or no tensors.
    """
    try:
        # torch's restricted reader: tensors and plain containers alone, whatever the pickle names
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file}: cannot be read as weights alone ({reason[:200]}); save its state_dict with"
                         " torch.save, or as safetensors") from None
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)} \
        if isinstance(found, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{file}: holds a {type(found).__name__} without tensors by name, expected a state dict")
    others = sorted(str(name) for name in found if name not in tensors)
    if others:
        tell(f"{file}: left out what is no tensor: {', '.join(shown(name) for name in others[:3])}"
             f"{f' and {len(others) - 3} more' if len(others) > 3 else ''}")
    return {name: _own(value) for name, value in tensors.items()}


def _own(value: Tensor) -> Tensor:
    """A dense tensor that shares its memory with no other, as safetensors wants them."""
    if value.layout != torch.strided:
        value = value.to_dense()
    return value.detach().contiguous().clone()


def _is_zip(file: Path) -> bool:
    """Whether a file has torch's present format, which can be mapped into memory."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
