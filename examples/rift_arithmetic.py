"""Fine-tuning on a model's own answers, right and wrong: RIFT beside reward weighting without its bound.

A small model learns sums until it is right now and then, answers 192 prompts eight times each, and is trained on all
1536 answers: reward 1 for right ones, -0.2 for wrong ones. ``python examples/rift_arithmetic.py`` prints, for each
loss, the share of right answers on held-out sums and the loss on the right answers as training goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import arithmetic as task
import torch

from mipipe.graphs import LossConfig, RecipeConfig

TAUGHT, PROMPTS, EACH, EPOCHS, ROWS = 0.3, 192, 8, 10, 64
LOSSES = {
    "right answers alone": None,
    "rift": LossConfig("rift", {"length_norm": False}),
    "rift, length_norm": LossConfig("rift", {"length_norm": True}),
    "reward weighting": LossConfig("rift", {"negatives": "linear"}),
}


def main() -> None:
    torch.set_num_threads(1)
    start = task.taught(TAUGHT)
    held_out, pairs, sampled = task.sampled(start, PROMPTS, EACH, 7)
    right = torch.tensor([one == task.answer(*pair) for one, pair in zip(sampled, pairs, strict=True)])
    whole = {**task.rows(pairs, sampled), "rewards": torch.where(right, 1.0, -0.2)}
    truth = task.rows(held_out, [task.answer(*pair) for pair in held_out])
    print(f"{int(right.sum())} of {len(pairs)} sampled answers right")
    print(f"{'loss':<22}" + "".join(f"{'epoch ' + str(epoch):>22}" for epoch in (2, 4, 8, EPOCHS))
          + "   (held-out right, loss per token of right answers)")
    for name, loss in LOSSES.items():
        cells = train(loss, start, whole, right, held_out, truth)
        print(f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def train(loss, start, whole, right, held_out, truth):
    """The figures of one loss, after some of the epochs; the same learning rate and order for all."""
    data = whole
    if loss is None:
        loss, data = LossConfig("rift"), {key: item[right] for key, item in whole.items()}
    module, made, optimizer = task.policy(RecipeConfig(loss), start, 1e-3)
    draw, cells = torch.Generator().manual_seed(1), []
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(len(data["rewards"]), generator=draw)
        for first in range(0, len(order) - ROWS + 1, ROWS):
            task.update(made, optimizer, {key: item[order[first:first + ROWS]] for key, item in data.items()})
        if epoch in (2, 4, 8, EPOCHS):
            task.put_back(made, module)
            cells.append(f"{task.accuracy(module, held_out):.1%}, {float(task.token_losses(module, truth).mean()):.3f}")
    return cells


if __name__ == "__main__":
    main()
