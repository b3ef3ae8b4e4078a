"""Routers for a mixture of experts assembled from dense models: from hidden states of prompts, embeddings, or chance.

``hidden``: the base runs on each expert's prompts; the router's row of an expert in a layer is the mean of what enters
that layer's MLP (after its norm), less the mean over negative prompts, scaled to unit length. A token whose hidden
state points that way then has the largest product with that row.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoint_files import CheckpointFiles, read_checkpoint
from mipipe.graphs.merging.moe_recipe import ROUTER, MoeRecipe, router_tensors
from mipipe.graphs.merging.participants import TOKEN_TABLES
from mipipe.graphs.serialize import digest, load_data
from mipipe.runtime.weights.reader import Shelf

RANDOM_STD = 0.02
"""Standard deviation of a random router: transformers' initializer_range."""


def make_router(recipe: MoeRecipe, folder: Path) -> CheckpointFiles:
    """The routers as a small checkpoint in ``folder``; one that the same recipe left there is used again.

    Raises:
        InputError: prompts without a tokenizer, or a model transformers cannot run.
    """
    seal = {"model_type": "router", "recipe": digest(recipe)}
    if (folder / "model.safetensors").exists() and load_data(folder / "config.json") == seal:
        return read_checkpoint(folder)
    base = read_checkpoint(recipe.base_model)
    shapes = router_tensors(base, recipe)
    if recipe.gate_mode == "random":
        generator = torch.Generator().manual_seed(recipe.seed)
        tensors = {name: torch.randn(shape, generator=generator) * RANDOM_STD for name, shape in shapes.items()}
    else:
        states = _embedding_states(recipe, base) if recipe.gate_mode == "cheap_embed" else _hidden_states(recipe, base)
        tensors = {ROUTER.format(layer=layer): torch.stack([state[layer % len(state)] for state in states])
                   for layer in range(len(shapes))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(seal))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return read_checkpoint(folder)


def direction(positive: Sequence[Tensor], negative: Sequence[Tensor]) -> Tensor:
    """Unit vector from the negative tokens' mean to the positive ones', each ``[tokens, hidden]``."""
    mean = torch.cat(list(positive)).mean(0)
    if negative:
        mean = mean - torch.cat(list(negative)).mean(0)
    return mean / mean.norm().clamp_min(1e-12)


def _tokens(recipe: MoeRecipe, vocabulary: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Token ids of every expert's positive and negative inputs, each below ``vocabulary``."""
    tokenizer: Any = None
    if any(expert.positive_prompts or expert.negative_prompts for expert in recipe.experts):
        from transformers import AutoTokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(recipe.base_model, local_files_only=True,
                                                      trust_remote_code=False)
        except Exception as error:
            raise InputError(f"{recipe.base_model}: its tokenizer cannot be loaded"
                             f" ({str(error).splitlines()[0]}); give positive_tokens instead of prompts") from None

    def ids(prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        return [tokenizer(prompt)["input_ids"] for prompt in prompts] + [list(item) for item in tokens]

    found = [(ids(expert.positive_prompts, expert.positive_tokens),
              ids(expert.negative_prompts, expert.negative_tokens)) for expert in recipe.experts]
    for number, pair in enumerate(found):
        for tokens in [*pair[0], *pair[1]]:
            if not tokens or not 0 <= min(tokens) <= max(tokens) < vocabulary:
                raise InputError(f"experts[{number}]: found the tokens {tokens}, expected one or more from 0 to"
                                 f" {vocabulary - 1}")
    return found


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no reports on what a checkpoint has beyond the model."""
    from transformers.utils import logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _hidden_states(recipe: MoeRecipe, base: CheckpointFiles) -> list[list[Tensor]]:
    """Per expert and layer the router row."""
    from transformers import AutoModelForCausalLM
    tokens = _tokens(recipe, int(base.config["vocab_size"]))
    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(recipe.base_model, dtype=torch.float32, local_files_only=True,
                                                     trust_remote_code=False, use_safetensors=True)
    seen: dict[int, Tensor] = {}

    def watch(index: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.__setitem__(index, inputs[0])

    hooks = [layer.mlp.register_forward_pre_hook(watch(index)) for index, layer in enumerate(model.model.layers)]
    count = len(model.model.layers)

    def run(ids: list[int]) -> list[Tensor]:
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        return [seen[layer][0] for layer in range(count)]

    rows = []
    for positive, negative in tokens:
        good, bad = [run(ids) for ids in positive], [run(ids) for ids in negative]
        rows.append([direction([state[layer] for state in good], [state[layer] for state in bad])
                     for layer in range(count)])
    for hook in hooks:
        hook.remove()
    return rows


def _embedding_states(recipe: MoeRecipe, base: CheckpointFiles) -> list[list[Tensor]]:
    """Per expert one row for all layers: the mean token embedding."""
    name = next((name for name in base.tensors if name.endswith(TOKEN_TABLES)), None)
    if name is None:
        raise InputError(f"{base.path}: has no token embedding, which gate_mode cheap_embed needs")
    tensor = base.tensors[name]
    with Shelf() as shelf:
        table = shelf.read_rows(base.path, tensor, 0, *tensor.shape).float()
    return [[direction([table[ids] for ids in positive], [table[ids] for ids in negative])]
            for positive, negative in _tokens(recipe, len(table))]
