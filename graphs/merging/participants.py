"""The models of a merge by canonical tensor names: renamed, with adapters, with tied heads resolved.

Canonical names are those of the checkpoint whose architecture the output has. LoRA folders name a model on their own
(applied to the recipe's base) or follow a model after ``+``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor, read_checkpoint, same_bytes
from mipipe.graphs.merging.checkpoints.hub_cache import model_folder, split_label
from mipipe.graphs.merging.checkpoints.lora import BoundAdapter, LoraFactors, Pairs, bind, initial_adapter, rename
from mipipe.graphs.merging.checkpoints.quantised import refuse_quantised
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass, classify, layer_prefix
from mipipe.graphs.merging.recipes.recipe import NameRule

TOKEN_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight",
                "tok_embeddings.weight")
"""Endings of token embedding tables (positional ones are not tied to a vocabulary)."""

OTHER_PARTS = re.compile(r"vision_tower|vision_model|visual|multi_modal_projector|audio_tower")
"""Parts of a multimodal model that its language model does not have."""
AUTO_NAMES: tuple[tuple[tuple[str, str], ...], ...] = (
    ((r"^model\.language_model\.", "model."),),
    ((r"^language_model\.", ""),),
    ((r"^model\.(?!language_model\.|vision_tower\.|visual\.|multi_modal_projector\.)", "model.language_model."),),
    ((r"^(?!language_model\.|vision_tower\.|visual\.|multi_modal_projector\.)", "language_model."),),
    ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
     (r"^(vision_tower|multi_modal_projector|visual)\.", r"model.\1.")),
    ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head"),
     (r"^model\.(vision_tower|multi_modal_projector|visual)\.", r"\1.")),
    ((r"^transformer\.", ""),),
    ((r"^(?!transformer\.)", "transformer."),),
)
"""Name maps between a language model alone and inside a multimodal one, as transformers has saved them over time."""


@dataclass(frozen=True)
class Participant:
    """A model of the merge: tensors by canonical name, and adapters to add to them.

    ``homes``: the folders of the tensors that an adapter brings in place of the model's.
    """

    label: str
    files: CheckpointFiles
    tensors: Mapping[str, StoredTensor]
    adapters: tuple[BoundAdapter, ...] = ()
    tied: bool = False
    homes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def token_table(self) -> str | None:
        """The canonical name of the token embedding."""
        return _token_table(self.tensors)

    @property
    def tokenizer_folder(self) -> str:
        """Where the model's tokenizer is: with its last adapter that has one, else with the model."""
        own = [item.files.path for item in self.adapters if (Path(item.files.path) / "tokenizer.json").exists()]
        return own[-1] if own else self.files.path

    def stored_name(self, name: str) -> str:
        """The canonical name under which the model has a tensor; a tied head is the embedding.

        Raises:
            InputError: the model has none.
        """
        if name in self.tensors:
            return name
        table = self.token_table
        if table and self.tied and classify(name, (0, 0), "F32") is TensorClass.HEAD:
            return table
        mapped = "" if self.tensors.keys() == self.files.tensors.keys() else " after its names are mapped"
        raise InputError(f"{self.label}: has no tensor {name}{mapped}, which the merge needs{self._advice(name)}")

    def _advice(self, name: str) -> str:
        """What to do about a tensor that the model does not have."""
        for pairs in AUTO_NAMES:
            if name in {rename(pairs, other) for other in self.files.tensors}:
                return "; its names differ from the base's: give the model a name map (names: auto, or from/to)"
        part = OTHER_PARTS.search(name)
        if part and not any(OTHER_PARTS.search(other) for other in self.tensors):
            return (f"; it is a text model, without {part[0]}: give that part a branch (branches: [{{tensors:"
                    f" {OTHER_PARTS.pattern}, merge_method: passthrough, models: [...]}}])")
        return ""

    def source(self, name: str) -> tuple[str, StoredTensor, tuple[LoraFactors, ...]]:
        """Folder and tensor of a canonical name, and the adapters' factors for it; raises as `stored_name`."""
        name = self.stored_name(name)
        factors = tuple(item.factors[name] for item in self.adapters if name in item.factors)
        return self.homes.get(name, self.files.path), self.tensors[name], factors


def open_participant(label: str, known: Mapping[str, CheckpointFiles], default_base: str | None,
                     names: str | Sequence[NameRule] = (), reference: Mapping[str, Any] | None = None) -> Participant:
    """A model by its recipe text: ``folder``, ``folder+adapter`` or an adapter folder on ``default_base``.

    Args:
        known: earlier recipes' results by name.
        default_base: the recipe's base, under an adapter given alone.
        names: maps the model's names (and its adapters') to those of ``reference``: rules, or ``auto`` for the map
            that fits best. Of an adapter given alone on a base that needs no map, the rules are the adapter's.

    Raises:
        InputError: no such folder, a quantised model, an adapter that does not fit.
    """
    parts = split_label(label, lambda part: part in known or model_folder(part).exists())

    def read(part: str) -> CheckpointFiles:
        return known[part] if part in known else read_checkpoint(part)

    files, adapters = read(parts[0]), [read(part) for part in parts[1:]]
    alone = bool(files.adapter)
    if alone:
        if default_base is None:
            raise InputError(f"{label}: is a LoRA adapter; write base+adapter, or give the recipe a base_model")
        files, adapters = read(default_base), [files, *adapters]
    refuse_quantised(label, files)
    tied = _is_tied(files)
    plain = {name: tensor for name, tensor in files.tensors.items()
             if not (tied and classify(name, tensor.shape, tensor.dtype) is TensorClass.HEAD)}
    chosen = _map(plain, names, reference)
    if alone and reference is not None and plain.keys() <= reference.keys():
        chosen = ()
    tensors = _mapped(label, plain, chosen)
    maps: list[Pairs] = [chosen, _map(plain, names, None), ()]
    maps += AUTO_NAMES if names == "auto" else ()
    starts = [(item, 1.0) for item in adapters]
    starts += [(initial, -1.0) for item in adapters if (initial := initial_adapter(item)) is not None]
    table = _token_table(tensors) if tied else None
    head = _head_of(files, table) if table else ""
    offered = {**tensors, head: tensors[table]} if table else tensors
    kind = str(files.config.get("model_type", ""))
    bound = tuple(bind(item, files.path, offered, maps, sign, kind) for item, sign in starts)
    if table and any(_unties(item, table, head) for item in bound):
        tensors[head] = tensors[table]
    homes: dict[str, str] = {}
    for item in bound:
        tensors |= item.tensors
        homes |= dict.fromkeys(item.tensors, item.files.path)
    tied = tied and not any(classify(name, (0, 0), "F32") is TensorClass.HEAD for name in tensors)
    return Participant(label, files, tensors, bound, tied, homes)


def _token_table(names: Iterable[str]) -> str | None:
    return next((name for name in sorted(names) if name.endswith(TOKEN_TABLES)), None)


def tied_head(table: str) -> str:
    """The canonical name of the head that is a token table."""
    return ("language_model." if table.startswith("language_model.") else "") + "lm_head.weight"


def _head_of(files: CheckpointFiles, table: str) -> str:
    """The same, where the files may hold a copy of it."""
    stored = next((name for name, tensor in files.tensors.items()
                   if classify(name, tensor.shape, tensor.dtype) is TensorClass.HEAD), None)
    return tied_head(table) if stored is None or table.startswith("language_model.") else stored


def _unties(adapter: BoundAdapter, table: str, head: str) -> bool:
    """Whether an adapter was trained on a tied table or its head alone: PEFT leaves the other as it was.

    Tables that an adapter stores because they were resized are not trained, and stay tied.
    """
    if head in adapter.factors:
        return True
    config = adapter.files.adapter
    saved = config.get("modules_to_save") or ()
    trained = table in adapter.factors or (table in adapter.tensors and any(
        table.removesuffix(".weight").endswith(str(name)) for name in saved))
    return trained and head not in adapter.tensors and not config.get("ensure_weight_tying")


def _is_tied(files: CheckpointFiles) -> bool:
    """Whether the head is the embedding: the files hold none, or the config says so and they hold the same twice.

    A stored head that differs from the embedding is the model's head, whatever the config says: so it is loaded.
    """
    text: Mapping[str, Any] = files.config.get("text_config", {})
    flag = files.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    heads = [tensor for name, tensor in files.tensors.items()
             if classify(name, tensor.shape, tensor.dtype) is TensorClass.HEAD]
    if not heads or not flag:
        return not heads
    tables = [tensor for name, tensor in files.tensors.items() if name.endswith(TOKEN_TABLES)]
    return all(any(same_bytes(files.path, head, table) for table in tables) for head in heads)


def _map(tensors: Mapping[str, StoredTensor], names: str | Sequence[NameRule],
         reference: Mapping[str, Any] | None) -> Pairs:
    """The substitutions a model's name rules stand for; for ``auto`` those that hit most names of the reference."""
    if names == "auto":
        maps: list[Pairs] = [(), *AUTO_NAMES]
        known = reference if reference is not None else tensors
        return max(maps, key=lambda pairs: sum(rename(pairs, name) in known for name in tensors))
    return tuple((rule.source, rule.target) for rule in names if isinstance(rule, NameRule))


def _mapped(label: str, stored: Mapping[str, StoredTensor], pairs: Pairs) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        new = rename(pairs, name)
        if new in tensors:
            raise InputError(f"{label}: names: {tensors[new].name} and {name} both become {new}")
        tensors[new] = tensor
    return tensors


def decoder_prefix(participant: Participant) -> str | None:
    """The prefix of the text decoder's layers: the stack that ``num_hidden_layers`` counts, vision towers excluded."""
    counts: dict[str, set[str]] = {}
    for name in participant.tensors:
        prefix = layer_prefix(name)
        if prefix is not None and not re.search(r"vision|visual|image|audio", prefix):
            counts.setdefault(prefix, set()).add(name[len(prefix) + 1:].split(".")[0])
    return max(counts, key=lambda prefix: len(counts[prefix])) if counts else None


def num_layers(participant: Participant, prefix: str) -> int:
    """Layers under a prefix."""
    start = len(prefix) + 1
    indices = {int(name[start:].split(".")[0]) for name in participant.tensors
               if name.startswith(prefix + ".") and name[start:].split(".")[0].isdigit()}
    return len(indices)
