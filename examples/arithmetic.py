"""Sums and differences as a language task for the examples of recipes: tokens, a small model, its answers, and a plan.

A row is ``a+b=c.`` in single digits, c from its last digit to its first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs import (
    RecipeConfig,
    Topology,
    capture_module,
    coarsen,
    open_source,
    roofline,
    shipped_kinds,
    with_recipe,
)
from mipipe.planner import BASELINES, build_problem
from mipipe.runtime import Engine

PLUS, EQUALS, END, PAD, MINUS = 10, 11, 12, 13, 14
DIGITS, LENGTH, VOCABULARY = 2, 10, 15
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12,
         "num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 32}


def prompt(a: int, b: int, sign: int = 1) -> list[int]:
    return [*map(int, f"{a:0{DIGITS}d}"), PLUS if sign > 0 else MINUS, *map(int, f"{b:0{DIGITS}d}"), EQUALS]


def answer(a: int, b: int, sign: int = 1) -> list[int]:
    return [*map(int, reversed(f"{a + sign * b:0{DIGITS + 1}d}")), END]


PROMPT = len(prompt(0, 0))


def rows(pairs: list[tuple[int, ...]], answers: list[list[int]]) -> dict[str, Tensor]:
    """input_ids and labels [rows, LENGTH] of prompts with their answers, those of a prompt not counting."""
    ids = torch.full((len(pairs), LENGTH), PAD)
    labels = torch.full_like(ids, -100)
    for row, (pair, tokens) in enumerate(zip(pairs, answers, strict=True)):
        whole = (prompt(*pair) + tokens)[:LENGTH]
        ids[row, :len(whole)] = torch.tensor(whole)
        labels[row, PROMPT:len(whole)] = ids[row, PROMPT:len(whole)]
    return {"input_ids": ids, "labels": labels}


def draw_pairs(count: int, generator: torch.Generator, sign: int = 1) -> list[tuple[int, ...]]:
    """Terms of sums, or (``sign`` -1) of differences, whose first is no smaller."""
    found = torch.randint(0, 10**DIGITS, (count, 2), generator=generator).tolist()
    return [(a, b) if sign > 0 else (max(a, b), min(a, b), -1) for a, b in found]


def source(recipe: RecipeConfig | None = None, batch: int = 32) -> Any:
    """The model's source with a recipe (None: cross-entropy of the labels)."""
    opened = open_source("LlamaForCausalLM", seq=LENGTH, batch=batch, overrides=SIZES)
    return opened if recipe is None else with_recipe(opened, recipe)


def captured(module: Any, opened: Any) -> Any:
    """The graph of a module with the loss of its source."""
    return capture_module(module, opened.inputs("cpu"), loss=opened.loss, loss_info=opened.loss_info,
                          withheld=opened.withheld, constants=opened.constants, source=opened.record, verify=False,
                          granularity="layer")


def model(recipe: RecipeConfig | None = None, batch: int = 32, seed: int = 0) -> tuple[Any, Any]:
    """The module and its graph."""
    opened = source(recipe, batch)
    torch.manual_seed(seed)
    module = opened.build("cpu")
    return module, captured(module, opened)


def fresh(seed: int) -> Any:
    """A module with weights drawn from a seed."""
    torch.manual_seed(seed)
    return source().build("cpu")


def engine(graph: Any, weights: Any, microbatches: int = 2, ranks: int = 1) -> Engine:
    """The graph under a plan: GPipe on so many ranks (this process is one of them)."""
    coarse = coarsen(graph, num_groups=max(2, ranks))
    costs = roofline(coarse, graph, {"cpu": dataclasses.replace(shipped_kinds()["h100"], name="cpu")})
    problem = build_problem(coarse, costs, Topology.uniform(ranks, latency_ns=1000, bytes_per_s=10**10, kind="cpu"),
                            num_microbatches=microbatches)
    return Engine(BASELINES[0].plan(problem), graph, weights)


def update(made: Engine, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> float:
    """One step of training, its gradients clipped to 1; the loss."""
    loss = made.step(batch)
    torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def put_back(made: Engine, module: Any) -> Any:
    """The module with the engine's weights."""
    with torch.no_grad():
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, item in made.weights.parameters.items():
            named[name].copy_(item)
    return module


@torch.no_grad()
def answers(module: Any, pairs: list[tuple[int, ...]], generator: torch.Generator | None = None) -> list[list[int]]:
    """What the model answers: the likeliest tokens, or sampled ones (with a generator), up to the end's token."""
    ids = torch.tensor([prompt(*pair) for pair in pairs])
    for _ in range(LENGTH - PROMPT):
        logits = module(input_ids=ids, use_cache=False).logits[:, -1].float()
        chosen = logits.argmax(-1, keepdim=True) if generator is None else \
            torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
    return [[*itertools.takewhile(lambda token: token != END, row), END] for row in ids[:, PROMPT:].tolist()]


def accuracy(module: Any, pairs: list[tuple[int, ...]]) -> float:
    """The share of exact answers."""
    found = answers(module, pairs)
    return sum(one == answer(*pair) for one, pair in zip(found, pairs, strict=True)) / len(pairs)


@torch.no_grad()
def log_probs(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Log probabilities of the labels, at their places [rows, LENGTH]; 0 where a label is -100."""
    logs = module(input_ids=batch["input_ids"], use_cache=False).logits.float().log_softmax(-1)[:, :-1]
    labels, found = batch["labels"][:, 1:], torch.zeros(batch["labels"].shape)
    found[:, 1:] = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    return found


def token_losses(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of a response's tokens, by row."""
    return -log_probs(module, batch).sum(-1) / (batch["labels"] != -100).sum(-1)


def sampled(start: Mapping[str, Tensor], groups: int, each: int, seed: int) -> tuple[list[tuple[int, ...]], ...]:
    """What a policy answers: held-out pairs, pairs of which ``each`` in a row are the same, and an answer of every one.
    The share of held-out sums that it has right is printed."""
    module, _ = model()
    module.load_state_dict(start)
    draw = torch.Generator().manual_seed(seed)
    held_out = draw_pairs(400, draw)
    pairs = [pair for pair in draw_pairs(groups, draw) for _ in range(each)]
    print(f"before: {accuracy(module, held_out):.1%} of {len(held_out)} held-out sums right")
    return held_out, pairs, answers(module, pairs, draw)


def policy(recipe: RecipeConfig, start: Mapping[str, Tensor], lr: float) -> tuple[Any, Engine, torch.optim.Optimizer]:
    """A module that starts from weights, its engine and AdamW."""
    module, graph = model(recipe)
    module.load_state_dict(start)
    made = engine(graph, module)
    return module, made, torch.optim.AdamW(made.parameters(), lr=lr, weight_decay=0.0)


def sums(rows_of_step: int, generator: torch.Generator, signs: tuple[int, ...] = (1,)) -> Iterator[dict[str, Tensor]]:
    """Endless batches of right sums (sign 1), differences (-1), or both in equal parts."""
    while True:
        pairs = [pair for sign in signs for pair in draw_pairs(rows_of_step // len(signs), generator, sign)]
        yield rows(pairs, [answer(*pair) for pair in pairs])


def taught(share: float, seed: int = 0, both: bool = False) -> dict[str, Tensor]:
    """The weights of a model that learned from right sums until about ``share`` of its answers were right."""
    module, graph = model(seed=seed)
    made = engine(graph, module)
    optimizer = torch.optim.AdamW(made.parameters(), lr=4e-3, weight_decay=0.0, betas=(0.9, 0.98))
    signs, draw = (1, -1) if both else (1,), torch.Generator().manual_seed(99)
    batches = sums(64, torch.Generator().manual_seed(seed), signs)
    pairs = [pair for sign in signs for pair in draw_pairs(200, draw, sign)]
    for step in range(2000):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 100)
        update(made, optimizer, next(batches))
        if step % 20 == 19 and accuracy(put_back(made, module), pairs) >= share:
            break
    return {name: item.clone() for name, item in module.state_dict().items()}
