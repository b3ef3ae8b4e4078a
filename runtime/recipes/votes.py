"""APEX in a run (arXiv 2505.24241): votes counted on texts, kept in a file; what an expanded model is saved as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

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
from mipipe.runtime.recipes.whole import whole_tensors


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
    from mipipe.runtime.calibration.whole_model import load_model
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


def fuser(engine: Engine) -> Callable[[str, Tensor], Tensor]:
    """(name, whole weight) -> the weight as its layer computes with it; another one only where the run expands layers.
    All ranks must call."""
    parts: dict[str, Tensor] = {}
    if any(is_expansion(item.fqn) for item in engine.graph.parameters):
        parts = whole_tensors(engine, is_expansion)

    def fused(name: str, weight: Tensor) -> Tensor:
        layer = name.rpartition(".")[0]
        if not name.endswith(".weight") or f"{layer}.{PARTS[0]}" not in parts:
            return weight
        own = {part: parts[f"{layer}.{part}"].to(weight.device) for part in PARTS}
        return expanded_weight(weight.detach(), own, dimension_of(name))

    return fused
