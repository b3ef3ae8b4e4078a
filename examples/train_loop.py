"""Your own training loop on a plan. After ``make demo``, from the repository's root:

    torchrun --nproc-per-node 4 examples/train_loop.py demo/plan.json demo/graph.json

The model, the data, the optimizer and the loop are yours; the engine runs forward and backward as the plan says and
leaves gradients on ordinary parameters.
"""

import itertools
import sys

import torch
import torch.distributed as dist

from mipipe import Engine, OperatorGraph, Plan, load
from mipipe.runtime import clip_gradients


def train(plan, graph, model, batches, steps):
    engine = Engine(plan, graph, model)  # takes this rank's parameters from the model
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-2)
    losses = []
    for batch in itertools.islice(batches, steps):
        losses.append(engine.step(batch))  # all microbatches, forward and backward
        clip_gradients(engine, max_norm=1.0)  # by the norm over all ranks
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.4f}", flush=True)
    return losses


def main():
    from transformers import AutoConfig, AutoModelForCausalLM
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # every rank makes the same model and the same batches
    plan, graph = load(sys.argv[1], Plan), load(sys.argv[2], OperatorGraph)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("examples/qwen3_moe_tiny"), dtype=torch.float32)
    tokens = torch.randint(256, (2 * plan.problem.num_microbatches, 64))  # two rows of 64 tokens in each microbatch
    train(plan, graph, model, itertools.repeat({"input_ids": tokens, "labels": tokens}), steps=10)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
