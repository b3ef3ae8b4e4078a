"""Routers for a mixture of experts assembled from dense models: from hidden states of prompts, embeddings, or chance.

As mergekit makes them: the row of an expert in a layer is the mean over its prompts of the residual stream before that
layer, less that of its negative prompts, scaled to unit length. mergekit pads prompts to one length and counts padding
in ``hidden_avg``; here every prompt's own tokens count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, read_checkpoint
from mipipe.graphs.merging.moe_recipe import RANDOM, ROUTER, SHARED_GATE, Expert, MoeRecipe, router_tensors
from mipipe.graphs.merging.participants import TOKEN_TABLES
from mipipe.graphs.models.configuration import first_line
from mipipe.graphs.serialize import digest, load_data
from mipipe.runtime.calibration.quiet import quiet_transformers
from mipipe.runtime.calibration.tokens import load_tokenizer
from mipipe.runtime.weights.reader import TORCH_DTYPES, Shelf

SMALL = 1e-8
"""Shorter vectors are not scaled to unit length (mergekit's bound)."""
Prompts = list[list[int]]
"""Token ids of prompts."""


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
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    layers = sum(name.startswith(ROUTER.format(layer="")) for name in shapes)
    gated = [*recipe.experts, *(recipe.shared_experts if SHARED_GATE.format(layer=0) in shapes else ())]
    gates = _gates(recipe, base, gated, layers)
    for layer in range(layers):
        tensors[ROUTER.format(layer=layer)] = gates[layer, :len(recipe.experts)]
        if len(gated) > len(recipe.experts):
            tensors[SHARED_GATE.format(layer=layer)] = gates[layer, len(recipe.experts):]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(seal))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return read_checkpoint(folder)


def _gates(recipe: MoeRecipe, base: CheckpointFiles, gated: Sequence[Expert], layers: int) -> Tensor:
    """Gate vectors ``[layers, experts, hidden]``."""
    shape = layers, len(gated), int(base.config["hidden_size"])
    if recipe.gate_mode in RANDOM:
        generator = torch.Generator().manual_seed(recipe.seed)
        if recipe.gate_mode == "random":
            return torch.randn(shape, generator=generator)
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])
    table = next((name for name in base.tensors if name.endswith(TOKEN_TABLES)), None)
    if table is None:
        raise InputError(f"{base.path}: has no token embedding, which gate_mode {recipe.gate_mode} needs")
    tokens = _tokens(base, gated, base.tensors[table].shape[0])
    flat = [ids for pair in tokens for prompts in pair for ids in prompts]
    with Shelf() as shelf, torch.no_grad():
        embedded = [_embed(ids, base, table, shelf) for ids in flat]
        if recipe.gate_mode == "cheap_embed":
            seen = [rows.sum(0).expand(layers, -1) for rows in embedded]
        else:
            seen = _hidden_states(base, embedded, shelf, recipe.gate_mode == "hidden_avg")
    states = iter(seen)
    rows = []
    for positive, negative in tokens:
        good, bad = ([next(states) for _ in prompts] for prompts in (positive, negative))
        rows.append(direction(good, bad, summed=recipe.gate_mode == "cheap_embed"))
    return torch.stack(rows, 1)


def direction(positive: Sequence[Tensor], negative: Sequence[Tensor], summed: bool = False) -> Tensor:
    """Unit vectors from the negative prompts' states to the positive ones', each ``[layers, hidden]``.

    ``summed``: states are added and scaled to unit length before they are subtracted (``cheap_embed``), not averaged.
    """

    def joined(states: Sequence[Tensor]) -> Tensor:
        return _unit(torch.stack(list(states)).sum(0)) if summed else torch.stack(list(states)).mean(0)

    return _unit(joined(positive) - joined(negative) if negative else joined(positive))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(SMALL)


def _tokens(base: CheckpointFiles, gated: Sequence[Expert],
            vocabulary: int) -> list[tuple[Prompts, Prompts]]:
    """Token ids of every expert's positive and negative inputs, each below ``vocabulary``."""
    tokenizer: Any = None
    if any(expert.positive_prompts or expert.negative_prompts for expert in gated):
        tokenizer = load_tokenizer(base.path, hint="; give positive_tokens instead of prompts")

    def ids(prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> Prompts:
        start = (tokenizer.bos_token or "") if tokenizer is not None else ""
        return [tokenizer(start + prompt, add_special_tokens=False)["input_ids"] for prompt in prompts] + \
            [list(item) for item in tokens]

    found = [(ids(expert.positive_prompts, expert.positive_tokens),
              ids(expert.negative_prompts, expert.negative_tokens)) for expert in gated]
    for number, pair in enumerate(found):
        for tokens in [*pair[0], *pair[1]]:
            if not tokens or not 0 <= min(tokens) <= max(tokens) < vocabulary:
                raise InputError(f"experts[{number}]: found the tokens {tokens}, expected one or more from 0 to"
                                 f" {vocabulary - 1}")
    return found


def _embed(ids: Sequence[int], base: CheckpointFiles, table: str, shelf: Shelf) -> Tensor:
    """The embeddings of tokens, ``[tokens, hidden]``, read row by row."""
    tensor = base.tensors[table]
    return torch.cat([shelf.read_rows(base.path, tensor, token, token + 1, tensor.shape[1]) for token in ids]).float()


def _hidden_states(base: CheckpointFiles, embedded: Sequence[Tensor], shelf: Shelf, average: bool) -> list[Tensor]:
    """For every prompt, the residual stream before each layer at its last token (or on average), ``[layers, hidden]``.

    All prompts run through the model together, with one layer of it in memory at a time; they are padded on the right,
    where no causal model looks.
    """
    model = _empty_model(base)
    lengths = [len(rows) for rows in embedded]
    batch = torch.zeros(len(embedded), max(lengths), embedded[0].shape[1])
    for number, rows in enumerate(embedded):
        batch[number, :len(rows)] = rows
    seen: list[list[Tensor]] = [[] for _ in embedded]

    def before(layer: int) -> Any:
        def load(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            states = inputs[0] if inputs else named["hidden_states"]
            for number, length in enumerate(lengths):
                own = states[number, :length]
                seen[number].append(own.mean(0) if average else own[-1].clone())
            module.load_state_dict(_weights(base, f"model.layers.{layer}.", shelf), assign=True)
        return load

    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(before(number), with_kwargs=True)
        layer.register_forward_hook(lambda module, _inputs, _output: module.to("meta") and None)
    model.norm.load_state_dict(_weights(base, "model.norm.", shelf), assign=True)
    model(inputs_embeds=batch, use_cache=False)
    return [torch.stack(states) for states in seen]


def _empty_model(base: CheckpointFiles) -> Any:
    """The base's decoder without weights.

    Raises:
        InputError: transformers has no such model.
    """
    from transformers import AutoConfig, AutoModel
    try:
        config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
        config.dtype = torch.float32
        with quiet_transformers(), torch.device("meta"):
            model = AutoModel.from_config(config, attn_implementation="eager").eval()
        model.rotary_emb = type(model.rotary_emb)(config=config)  # its buffers are no weights, but computed
    except Exception as error:
        raise InputError(f"{base.path}: transformers makes no model of it ({first_line(error)}); gate_mode"
                         " cheap_embed needs none") from None
    return model


def _weights(base: CheckpointFiles, prefix: str, shelf: Shelf) -> dict[str, Tensor]:
    """A module's weights in float32 by their names in it."""
    found = {}
    for name, tensor in base.tensors.items():
        if name.startswith(prefix) and tensor.dtype in TORCH_DTYPES and "rotary_emb" not in name:
            raw = shelf.read_bytes(base.path, tensor, 0, tensor.num_bytes).view(TORCH_DTYPES[tensor.dtype])
            found[name.removeprefix(prefix)] = raw.reshape(tensor.shape).float()
    return found
