"""Loaders for the tests of recipes, named as a user names one."""

import os
import sys

import torch

from mipipe.graphs.recipes.rows import batch_inputs


def responses(graph, rows, seed, copy=0, same=False):
    """Endless batches (``same``: one): groups of two, the second response of each with a negative reward."""
    specs = batch_inputs(graph)
    number = 0
    while True:
        draw = torch.Generator().manual_seed(seed * 1000 + number * 10 + copy)
        ids = torch.randint(0, 32, (rows, specs["input_ids"].shape[1]), generator=draw)
        labels = ids.clone()
        labels[:, :2] = -100
        made = {"input_ids": ids, "labels": labels, "rewards": 1.0 - 1.2 * (torch.arange(rows) % 2),
                "group_ids": torch.arange(rows) // 2 + 100 * copy, "reference_log_probs": torch.zeros(rows) - 20}
        yield {name: made[name].to(getattr(torch, spec.dtype)) for name, spec in specs.items()}
        number += not same


def shared(graph, rows, seed, copy=0, copies=1):
    """`responses` of one sequence, of which each copy of a plan has its rows."""
    for batch in responses(graph, rows * copies, seed):
        yield {name: item.chunk(copies)[copy] for name, item in batch.items()}


def leaving(graph, rows, seed, copy=0, code=0):
    """Batches until code of a user's ends the process in the middle of a run: with a status, or with a reason."""
    for number, batch in enumerate(responses(graph, rows, seed, copy)):
        if number == 2:
            sys.exit(code) if isinstance(code, str) else os._exit(code)
        yield batch


def answers(policy, rows, generator, even=True):
    """A task of a branch: pairs of responses that the policy samples, rewarded for even (or odd) tokens."""
    ids = torch.randint(0, 32, (rows // 2, 2), generator=generator).repeat_interleave(2, 0)
    for _ in range(6):
        shares = policy(input_ids=ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(shares, 1, generator=generator)], 1)
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels, "group_ids": torch.arange(rows) // 2,
            "rewards": (ids[:, 2:] % 2 == (not even)).float().mean(1)}


def shapeless(policy, rows, generator):
    """A task that gives one row too few."""
    return {name: item[1:] for name, item in answers(policy, rows, generator).items()}
