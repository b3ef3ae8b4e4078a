"""The whole path on this machine, without a GPU: a small MoE model, captured, profiled, planned and trained.

Run it as ``make demo`` or ``python examples/train_moe.py``; everything it makes is in ``demo/``. It prints every
command before it runs it, so that each step can be repeated by hand, and compares the losses of the planned run on four
processes with plain transformers training in this one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL, CLUSTER, CONFIG = "examples/qwen3_moe_tiny", "examples/cluster_4cpu.yaml", "examples/train_moe.yaml"
WORKERS, MICROBATCHES, SEQ, BATCH = 4, 8, 64, 2
SCHEDULES = "gpipe,1f1b,zb-h1,zb-v,dualpipe,mipipe"


def main() -> None:
    os.chdir(ROOT)
    shutil.rmtree("demo", ignore_errors=True)
    Path("demo").mkdir()
    began = time.monotonic()

    say("1. The operator graph of one training step, captured on the meta device: no weights, no GPU.")
    mipipe("capture", MODEL, "--seq", SEQ, "--batch", BATCH, "-o", "demo/graph.json")

    say(f"2. What each group of operators takes on this CPU while all {WORKERS} workers compute, as they will.")
    mipipe("profile", "demo/graph.json", "--groups", "24", "--workers", WORKERS, "--fresh", "-o", "demo/costs.json")

    say(f"3. The plan for {WORKERS} devices and {MICROBATCHES} microbatches: placement, order, and a proven bound.")
    mipipe("plan", "demo/graph.json", "--cluster", CLUSTER, "--microbatches", MICROBATCHES, "--costs",
           "demo/costs.json", "--time-limit", "8", "-o", "demo/plan.json")

    say(f"4. The planned run: torchrun, {WORKERS} gloo workers, Python's standard library as bytes.")
    mipipe("train", "--plan", "demo/plan.json", "--graph", "demo/graph.json", "--config", CONFIG)
    compare_losses()

    say(f"5. Simulated and measured. {WORKERS} workers share {os.cpu_count()} cores here: the costs were profiled under"
        " the same load, but a worker that waits lends its core to the others, which no simulation of devices knows.")
    mipipe("show", "demo/plan.json", "demo/measured.json", "--html", "demo/timeline.html", "--trace",
           "demo/trace.json")

    say("6. The same model under published schedules (even cuts by measured time) and under our plan.")
    mipipe("compare", "--problem", "demo/plan.json", "--schedules", SCHEDULES, "--time-limit", "6")

    say(f"Done in {time.monotonic() - began:.0f} s. Open demo/timeline.html in a browser, demo/trace.json in"
        " ui.perfetto.dev.")


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def mipipe(*words: object) -> None:
    """Print and run one mipipe command; end with its status if it fails."""
    print("$ mipipe " + " ".join(map(str, words)), flush=True)
    began = time.monotonic()
    status = subprocess.run([sys.executable, "-m", "mipipe.cli.main", *map(str, words)]).returncode
    if status:
        sys.exit(status)
    print(f"[{time.monotonic() - began:.1f} s]", flush=True)


def compare_losses() -> None:
    """Train the same model from the same weights on the same data in this process, and compare every loss."""
    planned = [json.loads(line)["loss_metrics/global_avg_loss"]
               for line in Path("demo/metrics.jsonl").read_text().splitlines()]
    print("$ # the same steps in one process: plain transformers, autograd and AdamW")
    alone = train_alone(len(planned))
    worst = max(abs(a - b) / b for a, b in zip(planned, alone, strict=True))
    print("step             " + "".join(f"{step + 1:>10}" for step in range(0, len(alone), 5)))
    print(f"{WORKERS} planned workers" + "".join(f"{loss:10.5f}" for loss in planned[::5]))
    print("one process      " + "".join(f"{loss:10.5f}" for loss in alone[::5]))
    print(f"largest relative difference over {len(alone)} steps: {worst:.1e}", flush=True)
    if worst > 1e-3 or planned[-1] > 0.8 * planned[0]:
        sys.exit("the planned run and the single process differ, or the loss did not fall")


def train_alone(steps: int) -> list[float]:
    """The losses of ``steps`` steps of plain transformers training: no graph, no plan, no engine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mipipe import OperatorGraph, load
    from mipipe.runtime import initial_weights, learning_rate_factor, make_batches, read_train_config

    torch.set_num_threads(1)  # as every worker computes
    graph, config = load("demo/graph.json", OperatorGraph), read_train_config(CONFIG)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL), dtype=torch.float32)
    model.load_state_dict(initial_weights(graph, config), strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, **config.optimizer.options)
    factor = learning_rate_factor(config.schedule, config.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = make_batches(config.data, graph, BATCH * MICROBATCHES, config.seed)
    losses = []
    for _ in range(steps):
        tokens = next(batches)["input_ids"]  # all microbatches at once: their mean loss is the mean of their losses
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
