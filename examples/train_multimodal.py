"""A vision-language model learns to read digits: its branches are planned on different ranks and train under torchrun.

    python examples/train_multimodal.py

captures transformers' LLaVA (a small one, random weights), plans it for four workers on this CPU (the vision tower on
the first ranks, the language model on the last) and starts them. They train it on scikit-learn's bundled 8 x 8 images:
the prompt is sixteen image tokens and a question mark, the answer is the digit as text. Takes less than a minute; the
accuracy on held-out images is printed at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mipipe
from mipipe import Engine, EngineOptions, OperatorGraph, Plan, Topology, load, save
from mipipe.graphs import sum_over
from mipipe.runtime import measured_timeline

WORKERS, MICROBATCHES, ROWS, STEPS = 4, 4, 32, 100
IMAGE_TOKEN, QUESTION, PATCHES = 10, 11, 16
"""Tokens 0-9 are the digits themselves; an image is 4 x 4 patches of 2 x 2 pixels."""


def build_model() -> nn.Module:
    """A LLaVA whose vision tower has 2 layers and whose language model has 2."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                              image_size=8, patch_size=2, projection_dim=64)
    text = LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, use_cache=False)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES,
        vision_feature_layer=-1, vision_feature_select_strategy="default"))


def answer_loss(output: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross entropy of the token after the question, and the scores of all answers there."""
    answer = output["logits"][:, -2]
    return {"loss": nn.functional.cross_entropy(answer, inputs["labels"][:, -1], reduction="sum"), "answer": answer}


def conversations(images: Tensor, digits: Tensor) -> dict[str, Tensor]:
    """Model inputs for images [rows, 8, 8] and their digits [rows]: image tokens, question, answer."""
    prompt = torch.tensor([IMAGE_TOKEN] * PATCHES + [QUESTION]).expand(len(digits), -1)
    tokens = torch.cat([prompt, digits[:, None]], dim=1)
    labels = tokens.clone()
    labels[:, :-1] = -100
    return {"input_ids": tokens, "pixel_values": images[:, None].expand(-1, 3, -1, -1).contiguous(), "labels": labels}


def digit_images() -> tuple[Tensor, Tensor]:
    """All 1,797 images, scaled to [-1, 1] and shuffled, and their digits."""
    from sklearn.datasets import load_digits
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order] / 8 - 1, torch.tensor(data.target)[order]


def training_batches(images: Tensor, digits: Tensor) -> Iterator[dict[str, Tensor]]:
    """Endless batches, drawn at random; every rank draws the same."""
    generator = torch.Generator().manual_seed(1)
    while True:
        chosen = torch.randint(len(digits), (ROWS * MICROBATCHES,), generator=generator)
        yield conversations(images[chosen], digits[chosen])


def prepare(folder: Path) -> None:
    """Capture the model, time its groups on this CPU, plan them for four workers, and put everything into files."""
    images, digits = digit_images()
    model, example = build_model(), conversations(images[:ROWS], digits[:ROWS])
    graph = mipipe.capture(model, example, loss=answer_loss, loss_info=sum_over("labels"), name="llava-digits")
    costs = mipipe.profile(graph, groups=12, workers=WORKERS, seconds=0.1)
    topology = Topology.uniform(WORKERS, latency_ns=400_000, bytes_per_s=10**9, kind="cpu")
    result = mipipe.plan(graph, topology, microbatches=MICROBATCHES, costs=costs, placement="chain", time_limit_s=5)
    if result.plan is None:
        sys.exit(f"no plan: {result.reason}")
    save(graph, folder / "graph.json")
    save(result.plan, folder / "plan.json")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])  # buffers outside the state dict, too
    save_file({name: item.detach().contiguous() for name, item in tensors.items()}, folder / "weights.safetensors")
    save_file({"images": images, "digits": digits}, folder / "digits.safetensors")
    for number, stage in enumerate(result.plan.placement.stages):
        names = ", ".join(result.plan.problem.groups[group].name for group in stage.groups)
        print(f"stage {number} on rank {stage.ranks[0]}: {names}")


def work(folder: Path) -> None:
    """One worker: train, then answer for the held-out images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plan, graph = load(folder / "plan.json", Plan), load(folder / "graph.json", OperatorGraph)
    engine = Engine(plan, graph, load_file(folder / "weights.safetensors"), options=EngineOptions(timeout_s=60))
    optimizer = torch.optim.AdamW(engine.parameters(), lr=3e-3)
    data = load_file(folder / "digits.safetensors")
    images, digits = data["images"], data["digits"]
    held = ROWS * MICROBATCHES * 2
    batches = training_batches(images[held:], digits[held:])
    started = time.monotonic()
    for step in range(STEPS):
        loss = engine.step(next(batches))
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and (step % 10 == 0 or step == STEPS - 1):
            print(f"step {step + 1:3}  loss {loss:.3f}  {time.monotonic() - started:4.1f} s", flush=True)
    timeline = measured_timeline(engine)
    if timeline is not None:
        save(timeline, folder / "measured.json")
    right = torch.zeros(1)
    for part in range(2):
        rows = slice(part * held // 2, (part + 1) * held // 2)
        engine.evaluate(conversations(images[rows], digits[rows]))
        for number, answer in engine.outputs.get("answer", {}).items():
            right += (answer[:, :10].argmax(dim=1) == digits[rows].chunk(MICROBATCHES)[number]).sum()
    dist.all_reduce(right)
    if dist.get_rank() == 0:
        print(f"accuracy on {held} held-out images: {right.item() / held:.1%}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Prepare, then start the workers; or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("multimodal"), help="where graph, plan and timeline go")
    parser.add_argument("--worker", action="store_true", help="be a worker (under torchrun)")
    options = parser.parse_args()
    if options.worker:
        work(options.folder)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(options.folder)
    sys.exit(subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                             str(WORKERS), __file__, "--worker", "--folder", str(options.folder)]).returncode)


if __name__ == "__main__":
    main()
