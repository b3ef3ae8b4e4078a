"""APEX in a run (arXiv 2505.24241): votes counted on texts, kept in a file; what an expanded model is saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.expansion import (
    PARTS,
    ActivationVotes,
    VoteFile,
    dimension_of,
    expanded_weight,
    is_expansion,
)
from mipipe.graphs.serialize import save
from mipipe.runtime.calibration.tokens import draw_samples
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.launching.processes import gather


def count_votes(model: str | Path, texts: str | Path, out: str | Path, *, ratio: float = 0.375, stage: int = 0,
                samples: int = 128, length: int = 256, batch: int = 8, seed: int = 0) -> VoteFile:
    """Run a model over texts and write which of its feed-forward units are active most and least.

    Args:
        model: a folder that transformers loads; what the stage before saved.
        texts: a text or JSONL file, of which ``samples`` of at most ``length`` tokens are drawn.
        out: the file, for ``expand: {votes: FILE}``.
        ratio, stage: ratio U / 2^(stage + 1) units are chosen of U.

    Raises:
        InputError: the model or the texts cannot be read, or the model has no gated feed-forward layers.
    """
    from mipipe.runtime.tuning.objectives import load_model
    loaded = load_model(Path(model))
    rows = draw_samples(str(texts), str(model), samples, length, seed, loaded.config.get_text_config().vocab_size,
                        where="votes")
    with ActivationVotes(loaded, ratio, stage) as votes, torch.no_grad():
        for start in range(0, len(rows.ids), batch):
            shortest = int(rows.lengths[start:start + batch].min())  # padding would vote, too
            loaded(input_ids=torch.from_numpy(rows.ids[start:start + batch, :shortest]).long(), use_cache=False)
    found = VoteFile({name: counts.tolist() for name, counts in votes.counts.items()}, ratio, stage)
    save(found, out)
    return found


def fused_weights(engine: Engine) -> dict[str, Tensor]:
    """This rank's weights of expanded layers as they compute, by name; none in other runs. All ranks must call.

    Raises:
        InputError: such a weight is divided among a team.
    """
    held = {**engine.weights.parameters, **engine.weights.buffers}
    if not any(is_expansion(item.fqn) for item in engine.graph.parameters):
        return {}
    parts: dict[str, Any] = {}
    for own in gather({name: item.detach().cpu() for name, item in held.items() if is_expansion(name)}):
        parts |= own
    found = {}
    for layer in sorted({name.rpartition(".")[0] for name in parts}):
        name = f"{layer}.weight"
        if name in engine.compiled.divisions:
            raise InputError(f"expand: {name} is divided among a team, which APEX does not go with yet; plan without")
        if name in held:
            own = {part: parts[f"{layer}.{part}"].to(held[name].device) for part in PARTS}
            found[name] = expanded_weight(held[name].detach(), own, dimension_of(name))
    return found
