"""REG, Muon and AdamW on one small model: sums learned from scratch, three seeds each, at three learning rates.

``python examples/matrix_optimizers.py [optimizer ...]`` prints the mean and the standard deviation, over the seeds, of
the loss after some of the steps.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import arithmetic as task
import torch

from mipipe.runtime import make_optimizer

STEPS, SHOWN, SEEDS = 200, (50, 100, 200), (0, 1, 2)


def main() -> None:
    torch.set_num_threads(1)
    graph = task.model()[1]
    print(f"{'optimizer':<10}{'lr':>8}" + "".join(f"{'step ' + str(step):>18}" for step in SHOWN)
          + "   (loss, mean +- deviation of three seeds)")
    for name in sys.argv[1:] or ("adamw", "muon", "reg"):
        for rate in (1e-3, 3e-3, 1e-2):
            runs = torch.tensor([losses(name, rate, seed, graph) for seed in SEEDS])
            cells = [f"{float(item.mean()):.3f} +- {float(item.std()):.3f}" for item in runs.t()]
            print(f"{name:<10}{rate:>8}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def losses(name, rate, seed, graph):
    """The loss around each step shown: the mean of the last twenty."""
    made = task.engine(graph, task.fresh(seed))
    optimizer = make_optimizer(name, made, {"lr": rate, "weight_decay": 0.0})
    batches, seen, cells = task.sums(64, torch.Generator().manual_seed(100 + seed)), [], []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20)
        seen.append(task.update(made, optimizer, next(batches)))
        if step in SHOWN:
            cells.append(sum(seen[-20:]) / 20)
    return cells


if __name__ == "__main__":
    main()
