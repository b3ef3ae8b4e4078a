"""LoRA, BeamLoRA and Light-PEFT with one budget: a model that often errs gets better through adapters.

Each method trains for 80 steps of 64 rows in all, with adapters of rank 4 on every linear layer of every block.
Light-PEFT spends the first 20 with masks on heads and units, loses a quarter of the heads (a third, rounded down), a
third of the units, and half of the ranks of the quarter of its adapters that mattered most, and goes on smaller; with
``half`` it keeps half of its adapters. ``python examples/adapters.py`` prints means and standard deviations of three
seeds: right answers on held-out differences, numbers trained and kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import arithmetic as task
import torch

from mipipe.graphs import (
    AdapterConfig,
    Importance,
    RecipeConfig,
    adapt,
    add_masks,
    add_penalty,
    choose_kept,
    lighten,
)
from mipipe.runtime import Batches, GroupConfig, OptimizerConfig, ScheduleConfig, TrainConfig, Trainer

STEPS, FIRST, ROWS, RATE, SEEDS = 80, 20, 64, 5e-3, 3
METHODS = {"lora": ("lora", 0.0), "beamlora": ("beamlora", 0.0), "light-peft": ("lora", 0.75),
           "light-peft, half": ("lora", 0.5)}
"""The adapters' method, and the share of adapters that Light-PEFT removes."""


def main() -> None:
    torch.set_num_threads(1)
    start = task.taught(0.3, both=True)
    held_out = task.draw_pairs(400, torch.Generator().manual_seed(31), -1)
    module, _ = task.model()
    module.load_state_dict(start)
    print(f"before: {task.accuracy(module, held_out):.1%} of {len(held_out)} held-out differences right")
    print(f"{'method':<18}{'right':>18}{'loss':>18}{'trained':>9}{'of the model':>14}")
    for name, (method, modules) in METHODS.items():
        runs = [train(method, modules, start, held_out, seed) for seed in range(SEEDS)]
        right, loss, trained, whole = (torch.tensor([float(run[place]) for run in runs]) for place in range(4))
        cells = [f"{float(right.mean()):.1%} +- {float(right.std()):.1%}",
                 f"{float(loss.mean()):.3f} +- {float(loss.std()):.3f}"]
        print(f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells) + f"{float(trained.mean()):>9.0f}"
              f"{float(whole.mean()):>14.0f}", flush=True)


def train(method, modules, start, held_out, seed):
    """Right answers, loss, numbers trained in the end, and those of the whole model without its adapters."""
    config = AdapterConfig(r"re:layers\..*_proj$", method, 4, 8.0, period=10 if method == "beamlora" else 0)
    module = task.fresh(0)
    module.load_state_dict(start)
    adapt(module, config, seed)
    batches = task.sums(ROWS, torch.Generator().manual_seed(100 + seed), (-1,))
    if not modules:
        stage(module, config, batches, STEPS, seed)
    else:
        watched = Importance(add_masks(module))
        stage(module, config, batches, FIRST, seed, watched)
        lighten(module, choose_kept(module, watched, modules=modules))
        stage(module, config, batches, STEPS - FIRST, seed)
    truth = task.rows(held_out, [task.answer(*pair) for pair in held_out])
    trained = sum(item.numel() for item in module.parameters() if item.requires_grad)
    return (task.accuracy(module, held_out), float(task.token_losses(module, truth).mean()), trained,
            sum(item.numel() for item in module.parameters()) - trained)


def stage(module, config, batches, steps, seed, watched=None):
    """Train what is trainable of a module under a plan of its graph as it is now."""
    graph = task.captured(module, task.source(RecipeConfig(adapters=config)))
    made = task.engine(graph, module)
    masks = [GroupConfig(match=rf"{layer}\.unit_mask$", options={"lr": RATE * factor})
             for layer, factor in (("o_proj", 100), ("down_proj", 50))] if watched else []
    optimizer = OptimizerConfig("adamw", RATE, {"weight_decay": 0.0}, groups=tuple(masks))
    trainer = Trainer(made, TrainConfig(steps, seed=seed, clip=1.0, optimizer=optimizer,
                                        schedule=ScheduleConfig("cosine", 20)), Batches(batches))
    if watched:
        update = made.on_update

        def penalised() -> None:
            add_penalty(made.named_parameters())
            if made.steps_done >= steps // 2:
                watched.after_backward({name: item.grad for name, item in made.named_parameters()})
                task.put_back(made, module)
                with torch.no_grad(), watched:
                    module(input_ids=next(batches)["input_ids"], use_cache=False)
            update()

        made.on_update = penalised
    trainer.run()
    task.put_back(made, module)


if __name__ == "__main__":
    main()
