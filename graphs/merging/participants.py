"""The models of a merge by canonical tensor names: renamed, with adapters, with tied heads resolved.

Canonical names are those of the checkpoint whose architecture the output has. LoRA folders name a model on their own
(applied to the recipe's base) or follow a model after ``+``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoint_files import CheckpointFiles, StoredTensor, read_checkpoint
from mipipe.graphs.merging.recipe import NameRule
from mipipe.graphs.merging.tensor_classes import TensorClass, classify, layer_prefix

TOKEN_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight",
                "tok_embeddings.weight")
"""Endings of token embedding tables (positional ones are not tied to a vocabulary)."""

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
class LoraFactors:
    """One adapter's factors for a weight: ``delta = scale * B A``, B ``[m, r]``, A ``[r, n]``."""

    folder: str
    down: StoredTensor
    up: StoredTensor
    scale: float


@dataclass(frozen=True)
class Participant:
    """A model of the merge: tensors by canonical name, and adapters to add to them."""

    label: str
    files: CheckpointFiles
    tensors: Mapping[str, StoredTensor]
    adapters: tuple[CheckpointFiles, ...] = ()
    tied: bool = False

    @property
    def token_table(self) -> str | None:
        """The canonical name of the token embedding."""
        return next((name for name in sorted(self.tensors) if name.endswith(TOKEN_TABLES)), None)

    def find(self, name: str) -> StoredTensor:
        """A tensor by canonical name; a tied head is the embedding.

        Raises:
            InputError: the model has none.
        """
        if name in self.tensors:
            return self.tensors[name]
        table = self.token_table
        if table and self.tied and classify(name, (0, 0), "F32") is TensorClass.HEAD:
            return self.tensors[table]
        if self.tensors.keys() == self.files.tensors.keys():
            return self.files.require(name)
        raise InputError(f"{self.label}: has no tensor {name} after its names are mapped, which the merge needs")

    def factors(self, stored: StoredTensor) -> tuple[LoraFactors, ...]:
        """The adapters' factors for a stored tensor."""
        return tuple(found for adapter in self.adapters if (found := _factors(adapter, stored)) is not None)


def open_participant(label: str, known: Mapping[str, CheckpointFiles], default_base: str | None) -> Participant:
    """A model by its recipe text: ``folder``, ``folder+adapter`` or an adapter folder on ``default_base``.

    Args:
        known: earlier recipes' results by name.
        default_base: the recipe's base, under an adapter given alone.
    """
    parts = [label] if label in known or Path(label).is_dir() else [part.strip() for part in label.split("+")]

    def read(part: str) -> CheckpointFiles:
        return known[part] if part in known else read_checkpoint(part)

    files, adapters = read(parts[0]), [read(part) for part in parts[1:]]
    if files.adapter:
        if default_base is None:
            raise InputError(f"{label}: is a LoRA adapter; write base+adapter, or give the recipe a base_model")
        files, adapters = read(default_base), [files, *adapters]
    for adapter in adapters:
        _check_adapter(adapter.path, adapter, files)
    if files.config.get("quantization_config"):
        raise InputError(f"{label}: is quantised (config.json has quantization_config); merge the dequantised model")
    tied = _is_tied(files)
    tensors = {name: tensor for name, tensor in files.tensors.items()
               if not (tied and classify(name, tensor.shape, tensor.dtype) is TensorClass.HEAD)}
    return Participant(label, files, tensors, tuple(adapters), tied)


def _is_tied(files: CheckpointFiles) -> bool:
    """Whether the head is the embedding: by the config's flag, or because the files hold no head."""
    text: Mapping[str, Any] = files.config.get("text_config", {})
    flag = files.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    heads = [name for name, tensor in files.tensors.items()
             if classify(name, tensor.shape, tensor.dtype) is TensorClass.HEAD]
    return bool(flag) if heads and flag is not None else not heads


def renamed(participant: Participant, rules: str | Sequence[NameRule], reference: Mapping[str, Any]) -> Participant:
    """The participant with tensors named as in ``reference``, by rules or, for ``auto``, by the map that fits best."""
    if not rules:
        return participant
    if rules == "auto":
        maps = [(), *AUTO_NAMES]
        chosen = max(maps, key=lambda pairs: sum(_apply(pairs, name) in reference for name in participant.tensors))
    else:
        chosen = tuple((rule.source, rule.target) for rule in rules if isinstance(rule, NameRule))
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in participant.tensors.items():
        new = _apply(chosen, name)
        if new in tensors:
            raise InputError(f"{participant.label}: names: {tensors[new].name} and {name} both become {new}")
        tensors[new] = tensor
    return Participant(participant.label, participant.files, tensors, participant.adapters, participant.tied)


def _apply(pairs: Sequence[tuple[str, str]], name: str) -> str:
    for source, target in pairs:
        replaced = re.sub(source, target, name, count=1)
        if replaced != name:
            return replaced
    return name


def _adapter_name(name: str) -> tuple[str, str] | None:
    """``(module, "A" or "B")`` of an adapter tensor's name; None for others."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.\w+)?\.weight", name)
    return (match[1], match[2]) if match else None


def _factors(adapter: CheckpointFiles, stored: StoredTensor) -> LoraFactors | None:
    module = stored.name.removesuffix(".weight")
    found = {key[1]: tensor for name, tensor in adapter.tensors.items()
             if (key := _adapter_name(name)) is not None and key[0] == module}
    if set(found) != {"A", "B"}:
        return None
    rank = found["A"].shape[0]
    alpha = float(adapter.adapter.get("alpha_pattern", {}).get(module, adapter.adapter.get("lora_alpha", rank)))
    scale = alpha / (rank**0.5 if adapter.adapter.get("use_rslora") else rank)
    return LoraFactors(adapter.path, found["A"], found["B"], scale)


def _check_adapter(path: str, adapter: CheckpointFiles, files: CheckpointFiles) -> None:
    if not adapter.adapter:
        raise InputError(f"{path}: is no LoRA adapter (no adapter_config.json), but follows a + in the recipe")
    for name, tensor in adapter.tensors.items():
        key = _adapter_name(name)
        if key is None:
            raise InputError(f"{path}: tensor {name} is no LoRA factor; only LoRA adapters on weights can be merged")
        weight = files.tensors.get(f"{key[0]}.weight")
        if weight is None:
            raise InputError(f"{path}: adapts {key[0]}, which {files.path} does not have")
        expected = weight.shape[-1] if key[1] == "A" else weight.shape[0]
        found = tensor.shape[1] if key[1] == "A" else tensor.shape[0]
        if len(tensor.shape) != 2 or found != expected or adapter.adapter.get("fan_in_fan_out"):
            raise InputError(f"{path}: {name} of shape {list(tensor.shape)} does not fit {key[0]} of shape"
                             f" {list(weight.shape)}")


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


