"""Group-relative training on stale rollouts: the plain loss, SPO and ASymPO.

A model answers sums in groups of eight and is trained on that folder of rollouts while it moves away from the policy
that sampled them; every response records that policy's step, its version. ``python examples/stale_rollouts.py`` prints,
as rollouts age, the mean token loss l of positive and of negative responses, each side's part in the loss's value, and
what the model gets right.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import arithmetic as task
import torch

from mipipe.graphs import LossConfig, RecipeConfig
from mipipe.runtime import DataConfig, make_batches

TAUGHT = 0.3
GROUPS, EACH, ROWS, STEPS, SHOWN = 192, 8, 64, 160, (1, 20, 60, 160)
LOSSES = {
    "plain": LossConfig("spo", {"negative_scale": 1.0}),
    "spo, 0.3": LossConfig("spo", {"negative_scale": 0.3}),
    "asympo": LossConfig("asympo", {"floor": 0.01}),
}


def main() -> None:
    torch.set_num_threads(1)
    start = task.taught(TAUGHT)
    held_out, prompts, sampled = task.sampled(start, GROUPS, EACH, 11)
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"prompt": task.prompt(*pair), "response": one[:task.LENGTH - task.PROMPT],
                             "reward": float(one == task.answer(*pair)), "group": number // EACH, "version": 0})
                 for number, (pair, one) in enumerate(zip(prompts, sampled, strict=True))]
        (Path(folder) / "version-0.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{'loss':<10}{'age':>5}{'l of A > 0':>12}{'l of A < 0':>12}{'part A > 0':>12}{'part A < 0':>12}"
              f"{'value':>9}{'right':>8}")
        for name, loss in LOSSES.items():
            train(name, loss, start, folder, held_out)


def train(name, loss, start, folder, held_out):
    """Print one loss's rows; learning rate and batches are the same for all."""
    module, made, optimizer = task.policy(RecipeConfig(loss), start, 1e-3)
    batches = make_batches(DataConfig("rollouts", options={"folder": folder}), made.graph, ROWS, 0)
    for step in range(1, STEPS + 1):
        batch = next(batches)
        if step in SHOWN:
            task.put_back(made, module)
            show(name, loss, step, task.token_losses(module, batch), batch, task.accuracy(module, held_out))
        task.update(made, optimizer, batch)


def show(name, loss, step, losses, batch, right):
    rewards = batch["rewards"].reshape(-1, EACH)
    advantages = (rewards - rewards.mean(1, keepdim=True)).reshape(-1)
    scale = torch.where(advantages < 0, loss.options.get("negative_scale", 1.0), 1.0)
    terms = advantages * scale * (losses / losses.clamp(min=0.01) if loss.name == "asympo" else losses) / len(losses)
    up, down = advantages > 0, advantages < 0
    print(f"{name:<10}{step - 1:>5}{float(losses[up].mean()):>12.3f}{float(losses[down].mean()):>12.3f}"
          f"{float(terms[up].sum()):>12.4f}{float(terms[down].sum()):>12.4f}{float(terms.sum()):>9.4f}{right:>8.1%}",
          flush=True)


if __name__ == "__main__":
    main()
