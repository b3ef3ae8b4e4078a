"""A small student taught by a frozen model of twice its width: where the planner puts the teacher, and a measured step.

Both are made at random, captured as one graph with the loss ``distill``, profiled on this machine, planned for two
processes, once with the teacher on a rank of its own and once freely, and trained for a few steps. ``python
examples/frozen_teacher.py`` prints who holds what, the planned and the measured step and idle time, and that a single
process has the same losses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import yaml

import mipipe
from mipipe.runtime import read_train_config

ROOT = Path(__file__).resolve().parent.parent
STUDENT = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 384,
           "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
           "vocab_size": 512, "max_position_embeddings": 256}
TEACHER = {**STUDENT, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
MICROBATCHES, STEPS = 4, 6


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save("student", STUDENT, 0)
        save("teacher", TEACHER, 1)
        settings = {"steps": STEPS, "weights": "student", "reference": {"model": "teacher"},
                    "loss": {"name": "distill", "options": {"labels": 0.2}, "chunk": 128},
                    "optimizer": {"name": "adamw", "lr": 1e-3}, "data": {"source": "stdlib"}}
        Path("train.yaml").write_text(yaml.safe_dump(settings))
        graph = mipipe.capture("student", seq=64, batch=4, recipe=read_train_config("train.yaml").recipe)
        costs = mipipe.profile(graph, groups=16, workers=2, seconds=0.1)
        losses = {}
        for name, cluster, placement in (("one process", "cluster_1cpu.yaml", "free"),
                                         ("teacher apart", "cluster_2cpu.yaml", "apart"),
                                         ("placed freely", "cluster_2cpu.yaml", "free")):
            result = mipipe.plan(graph, cluster=ROOT / "examples" / cluster, microbatches=MICROBATCHES, costs=costs,
                                 placement=placement, time_limit_s=5)
            if result.plan is None:
                sys.exit(f"{name}: {result.reason}")
            predicted = mipipe.simulate(result.plan)
            timeline = f"{name.replace(' ', '-')}.json"
            run = mipipe.train(result.plan, graph, {**settings, "timeline": timeline}, progress=False)
            losses[name] = list(run.losses)
            measured = mipipe.load(timeline)
            print(f"{name}: step {predicted.makespan_ns / 1e6:.1f} ms planned, {measured.makespan_ns / 1e6:.1f}"
                  f" measured; idle {predicted.bubble_ratio:.1%} planned, {measured.bubble_ratio:.1%} measured")
            for rank in range(result.plan.problem.num_ranks):
                print(f"  rank {rank}: {holds(result.plan, rank)}", flush=True)
        apart = max(abs(a / b - 1) for name in losses for a, b in zip(losses[name], losses["one process"], strict=True))
        print(f"losses: {', '.join(f'{item:.4f}' for item in losses['one process'])}; the planned runs' are within"
              f" {apart:.1e} of them")


def save(folder: str, config: dict[str, object], seed: int) -> None:
    """A model's folder with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    Path(folder).mkdir()
    (Path(folder) / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def holds(plan: mipipe.Plan, rank: int) -> str:
    """What a rank holds, as numbers of segments of each model."""
    names = [segment for stage in plan.placement.stages if rank in stage.ranks for group in stage.groups
             for segment in plan.problem.groups[group].segments]
    frozen = sum(name.startswith("reference.") for name in names)
    return f"{frozen} segments of the teacher, {len(names) - frozen} of the student"


if __name__ == "__main__":
    main()
