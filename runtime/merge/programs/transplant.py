"""Another model's tokenizer for a model: its token tables made anew in the donor's order.

Tokens that both know keep the model's rows. Of one that only the donor knows, the donor's row is approximated by few of
the common tokens' donor rows, and the same combination of the model's rows takes its place: orthogonal matching pursuit
(Pati, Rezaiifar and Krishnaprasad, 1993), as mergekit's tokensurgeon does by default.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, read_checkpoint
from mipipe.graphs.merging.checkpoints.hub_cache import model_folder
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass, classify
from mipipe.graphs.merging.participants import TOKEN_TABLES
from mipipe.graphs.merging.recipes.recipe import Branch, MergeRecipe, RecipeModel
from mipipe.graphs.merging.tokens.tokenizer_rule import TokenizerRule
from mipipe.graphs.merging.tokens.vocabulary import read_tokens
from mipipe.runtime.merge.output.card import COPIED
from mipipe.runtime.weights.reader import Shelf

ATOMS = 64
"""Common tokens that a new token's row is made of, tokensurgeon's default; fewer where there are fewer."""
BLOCK_BYTES = 2**28
"""Inner products, or chosen rows, held at once."""


def wants_transplant(recipe: MergeRecipe, known: Collection[str]) -> bool:
    """Whether a recipe's tokenizer is that of a folder which is no model of the recipe."""
    rule = recipe.vocabulary
    if rule is None or rule.source in ("base", "union") or rule.source in known:
        return False
    labels = [recipe.base_model, *(model.model for model in recipe.models),
              *(source.model for piece in recipe.slices for source in piece.sources)]
    return rule.source not in labels and model_folder(rule.source).is_dir()


def transplant(recipe: MergeRecipe, known: Mapping[str, CheckpointFiles], folder: Path) -> MergeRecipe:
    """A recipe that takes its token tables from ``folder``, which this makes.

    Raises:
        InputError: a recipe of more than one model, tokenizers without tokens in common, or a model without tables.
    """
    rule = recipe.vocabulary
    assert rule is not None
    if recipe.merge_method != "passthrough" or len(recipe.models) != 1 or rule.tokens:
        raise InputError(f"tokenizer: source {rule.source} is no model of the recipe; a tokenizer is transplanted into"
                         " one model (merge_method: passthrough), before or after it is merged")
    label = recipe.models[0].model
    model, donor = known.get(label) or read_checkpoint(label), read_checkpoint(rule.source)
    tables = make_tables(model, donor)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ids = {key: donor.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in donor.config}
    (folder / "config.json").write_text(json.dumps({**model.config, **ids}))
    save_file(tables, folder / "model.safetensors", {"format": "pt"})
    for name in COPIED:
        if (Path(donor.path) / name).exists() and name != "generation_config.json":
            shutil.copyfile(Path(donor.path) / name, folder / name)
    pattern = "^(" + "|".join(name.replace(".", r"\.") for name in sorted(tables)) + ")$"
    branch = Branch(pattern, "passthrough", (RecipeModel(str(folder)),), name="transplanted")
    return dataclasses.replace(recipe, branches=(branch, *recipe.branches), tokenizer_source=None,
                               tokenizer=TokenizerRule(str(folder), pad_to_multiple_of=rule.pad_to_multiple_of))


def make_tables(model: CheckpointFiles, donor: CheckpointFiles) -> dict[str, Tensor]:
    """The model's token tables (embedding, and head where it has one) in the donor's order, in the model's dtype."""
    mine, theirs = read_tokens(model.path), read_tokens(donor.path)
    with Shelf() as shelf:
        made = {name: _read(model, name, shelf) for name in _tables(model)}
        given = {name: _read(donor, name, shelf) for name in _tables(donor)}
    if not made or not given:
        raise InputError(f"{model.path if not made else donor.path}: has no token embedding to transplant")
    embedding = next(name for name in given if name.endswith(TOKEN_TABLES))
    size = max(max(theirs.values()) + 1, int(given[embedding].shape[0]))
    found = {}
    for name, rows in made.items():
        head = not name.endswith(TOKEN_TABLES)
        other = given[next((item for item in given if head and not item.endswith(TOKEN_TABLES)), embedding)]
        found[name] = transplanted(rows.float(), other.float(), mine, theirs, size).to(rows.dtype)
    return found


def _tables(files: CheckpointFiles) -> list[str]:
    return [name for name, tensor in files.tensors.items() if len(tensor.shape) == 2 and (
        name.endswith(TOKEN_TABLES) or classify(name, tensor.shape, tensor.dtype) is TensorClass.HEAD)]


def _read(files: CheckpointFiles, name: str, shelf: Shelf) -> Tensor:
    tensor = files.tensors[name]
    return shelf.read_rows(files.path, tensor, 0, tensor.shape[0], tensor.shape[1])


def transplanted(rows: Tensor, donor: Tensor, mine: Mapping[str, int], theirs: Mapping[str, int],
                 size: int) -> Tensor:
    """A table ``[size, hidden]`` in the donor's order: common tokens' own rows, approximations of the others, and the
    mean row where there is no token.

    Args:
        rows: the model's table. donor: the donor's, whose width may differ.
        mine, theirs: token -> row of each.

    Raises:
        InputError: the tokenizers have no token in common.
    """
    common = [token for token, row in theirs.items() if row < len(donor) and mine.get(token, len(rows)) < len(rows)]
    if not common:
        raise InputError("tokenizer: the two tokenizers have no token in common, so nothing tells where the donor's"
                         " tokens lie in the model")
    found = rows.mean(0).repeat(size, 1)
    own, given = rows[[mine[token] for token in common]], donor[[theirs[token] for token in common]]
    found[[theirs[token] for token in common]] = own
    known = set(common)
    missing = [row for token, row in theirs.items() if token not in known and row < len(donor)]
    if missing:
        count = min(ATOMS, len(common), given.shape[1])
        block = max(1, BLOCK_BYTES // max(4 * len(common), 8 * count * given.shape[1]))
        for start in range(0, len(missing), block):
            part = missing[start:start + block]
            chosen, weights = matching_pursuit(donor[part], given, count)
            found[part] = (own[chosen] * weights[..., None]).sum(1)
    return found


def matching_pursuit(targets: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For every target ``[n, d]`` which ``count`` atoms ``[m, d]`` make it up, and with which weights, ``[n, count]``.

    Each round adds the atom that points most along what is left, then fits all weights anew by least squares.
    """
    unit = atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-12)
    left = targets.clone()
    chosen = torch.zeros(len(targets), count, dtype=torch.int64)
    weights = torch.zeros(len(targets), count)
    for step in range(count):
        match = (left @ unit.T).abs()
        match.scatter_(1, chosen[:, :step], -1.0)
        chosen[:, step] = match.argmax(1)
        basis = atoms[chosen[:, :step + 1]].double()  # [n, step + 1, d]
        gram = basis @ basis.transpose(1, 2)
        gram.diagonal(dim1=1, dim2=2).add_(1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
        fit = torch.linalg.solve(gram, basis @ targets.double()[..., None])[..., 0]
        weights[:, :step + 1] = fit.float()
        left = targets - (fit[:, None] @ basis)[:, 0].float()
    return chosen, weights
