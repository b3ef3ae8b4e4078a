"""The adapters of a finished run as a folder that PEFT loads, and what one holds as the start of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.adapters import DOWN, AdapterConfig, is_adapter, peft_config, peft_tensors
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.whole import whole_tensors

FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_tensors(engine: Engine) -> dict[str, Tensor]:
    """All adapters, whole, on every rank. All ranks must call."""
    return whole_tensors(engine, is_adapter)


def write_adapters(tensors: Mapping[str, Tensor], config: AdapterConfig, folder: Path, base: str,
                   replace: bool = False) -> None:
    """Write what `adapter_tensors` gives as a PEFT folder, whole or not at all.

    Raises:
        InputError: the folder exists, and is none to be replaced.
    """
    from safetensors.torch import save_file
    if folder.exists() and not (replace and all((folder / name).exists() for name in FILES)):
        raise InputError(f"{folder}: exists already; give another folder to save to, or remove it")
    partial = folder.with_name(folder.name + ".next")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    layers = [name.rpartition(".")[0] for name in tensors if name.endswith(f".{DOWN}")]
    (partial / FILES[0]).write_text(json.dumps(peft_config(config, layers, base), indent=2) + "\n")
    save_file(peft_tensors(tensors, config), partial / FILES[1], metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
