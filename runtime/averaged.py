"""Training runs as verbs start them: `mipipe.runtime.train.launching.launch.train`, and of branches their mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import merge
from mipipe.runtime.train.config import read_train_config
from mipipe.runtime.train.launching.launch import Say, TrainResult
from mipipe.runtime.train.launching.launch import train as run


def train(plan: str | Path, graph: str | Path, config: str | Path, *, resume: bool = False, resume_if_any: bool = False,
          say: Say = lambda text: None, **options: Any) -> TrainResult:
    """`launch.train`; then the mean of what branches saved, as `mipipe merge` makes it, in ``save.folder``. A run that
    resumed replaces that of an earlier one.

    Raises:
        MipipeError: as training and merging raise it.
    """
    result = run(plan, graph, config, resume=resume, resume_if_any=resume_if_any, say=say, **options)
    settings = read_train_config(config)
    if settings.branches is None or settings.save is None:
        return result
    kept = [settings.of_branch(name).save for name in settings.branches.names]
    folders = [item.folder for item in kept if item is not None]
    if resume or resume_if_any:
        shutil.rmtree(settings.save.folder, ignore_errors=True)
    merge([parse_recipe({"merge_method": "linear", "models": [
        {"model": folder, "parameters": {"weight": 1.0}} for folder in folders]}, "branches")], settings.save.folder)
    say(f"the mean of {', '.join(folders)} is in {settings.save.folder}")
    return result
