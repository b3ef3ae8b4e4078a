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


def leaving(graph, rows, seed, copy=0, code=0):
    """Batches until code of a user's ends the process in the middle of a run: with a status, or with a reason."""
    for number, batch in enumerate(responses(graph, rows, seed, copy)):
        if number == 2:
            sys.exit(code) if isinstance(code, str) else os._exit(code)
        yield batch
