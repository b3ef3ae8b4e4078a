"""A source checkpoint as conversions see it: its layers' experts or dense MLPs, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.expert_layout import as_single
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor, licence_of, read_checkpoint
from mipipe.graphs.merging.checkpoints.quantised import refuse_quantised
from mipipe.graphs.models.mipipe_moe import HOSTS
from mipipe.runtime.weights.reader import TORCH_DTYPES, Shelf

PARTS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"^(.*\.layers\.(\d+)\.(?:mlp|block_sparse_moe))\.experts\.(\d+)\.(\w+?)(?:\.weight)$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_DENSE = re.compile(r"^(.*\.layers\.(\d+)\.mlp)\.(gate_proj|up_proj|down_proj)\.weight$")

Matrices = dict[str, Tensor]
"""The matrices of one expert by `PARTS`, in the dtype that is computed in."""


@dataclass(frozen=True)
class MoeLayer:
    """A layer with experts: the block's name in the file, tensors of every expert, the router's."""

    number: int
    block: str
    experts: tuple[Mapping[str, StoredTensor], ...]
    router: StoredTensor
    bias: StoredTensor | None
    """What is added to router scores only to choose (DeepSeek-V3)."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Inner and hidden size."""
        inner, hidden = self.experts[0]["gate_proj"].shape
        return inner, hidden


@dataclass(frozen=True)
class Source:
    """A checkpoint and what computing on it needs."""

    files: CheckpointFiles
    tensors: Mapping[str, StoredTensor]
    """As the files have them, with experts one by one."""
    shelf: Shelf
    dtype: torch.dtype

    @property
    def host(self) -> str:
        return str(self.files.config.get("model_type"))

    def read(self, tensor: StoredTensor) -> Tensor:
        """A tensor's values in the dtype that is computed in."""
        raw = self.shelf.read_bytes(self.files.path, tensor, 0, tensor.num_bytes).view(TORCH_DTYPES[tensor.dtype])
        return raw.reshape(tensor.shape).to(self.dtype)

    def read_as_stored(self, tensor: StoredTensor) -> Tensor:
        """A tensor's values in its own dtype, or bytes where torch has none like it."""
        raw = self.shelf.read_bytes(self.files.path, tensor, 0, tensor.num_bytes)
        return raw.view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape) if tensor.dtype in TORCH_DTYPES else raw

    @property
    def licence(self) -> str:
        return licence_of(self.files.path)

    def matrices(self, tensors: Mapping[str, StoredTensor]) -> Matrices:
        return {part: self.read(tensors[part]) for part in PARTS}


def open_source(model: str, shelf: Shelf, dtype: torch.dtype) -> Source:
    """The source of a conversion.

    Raises:
        InputError: no such model, quantised weights, an architecture that conversions do not know, or a config without
            sizes.
    """
    files = read_checkpoint(model)
    refuse_quantised(files.path, files)
    lacking = [key for key in ("num_hidden_layers", "hidden_size", "vocab_size") if not isinstance(
        files.config.get(key), int)]
    if lacking:
        raise InputError(f"{model}: its config.json has no {lacking[0]}, which conversions need")
    files = _without_predictors(files)
    if files.config.get("model_type") not in HOSTS.values():
        raise InputError(f"{model}: model_type {files.config.get('model_type')!r}: conversions know"
                         f" {', '.join(sorted(HOSTS.values()))}")
    return Source(files, as_single(files.tensors, files.tensors), shelf, dtype)


def _without_predictors(files: CheckpointFiles) -> CheckpointFiles:
    """A checkpoint without the layers beyond its config's number, which predict tokens further ahead (DeepSeek-V3,
    GLM-4-MoE): transformers does not load them, and their experts would not fit a converted model's."""
    layers = files.config["num_hidden_layers"]
    kept = {name: tensor for name, tensor in files.tensors.items()
            if (match := _LAYER.match(name)) is None or int(match[1]) < layers}
    if len(kept) == len(files.tensors):
        return files
    return replace(files, tensors=kept, config={**files.config, "num_nextn_predict_layers": 0})


def moe_layers(source: Source) -> list[MoeLayer]:
    """The layers with experts, in order.

    Raises:
        InputError: there are none, or an expert or router lacks a tensor.
    """
    found: dict[tuple[int, str], dict[int, dict[str, StoredTensor]]] = {}
    for name, tensor in source.tensors.items():
        match = _EXPERT.match(name)
        if match:
            part = _MIXTRAL.get(match[4], match[4])
            found.setdefault((int(match[2]), match[1]), {}).setdefault(int(match[3]), {})[part] = tensor
    if not found:
        raise InputError(f"{source.files.source}: has no experts (found no tensor such as"
                         " model.layers.0.mlp.experts.0.gate_proj.weight)")
    layers = []
    for (number, block), experts in sorted(found.items()):
        lacking = [f"{block}.experts.{expert}: {part}" for expert in range(len(experts)) for part in PARTS
                   if part not in experts.get(expert, {})]
        if lacking:
            raise InputError(f"{source.files.source}: lacks {lacking[0]}")
        router = source.tensors.get(f"{block}.gate.weight")
        if router is None or router.shape[0] != len(experts):
            raise InputError(f"{source.files.source}: layer {number} has no router {block}.gate.weight of"
                             f" {len(experts)} rows")
        layers.append(MoeLayer(number, block, tuple(experts[expert] for expert in range(len(experts))), router,
                               source.tensors.get(f"{block}.gate.e_score_correction_bias")))
    return layers


def dense_layers(source: Source) -> dict[int, dict[str, StoredTensor]]:
    """The MLPs of a dense model by layer.

    Raises:
        InputError: it has experts, or no MLP of three matrices.
    """
    if any(_EXPERT.match(name) for name in source.tensors):
        raise InputError(f"{source.files.source}: has experts already; this method makes them of a dense model")
    found: dict[int, dict[str, StoredTensor]] = {}
    for name, tensor in source.tensors.items():
        match = _DENSE.match(name)
        if match:
            found.setdefault(int(match[2]), {})[match[3]] = tensor
    whole = {number: parts for number, parts in sorted(found.items()) if len(parts) == len(PARTS)}
    if not whole or source.host not in ("llama", "mistral", "qwen2", "qwen3"):
        raise InputError(f"{source.files.source}: is no dense model with MLPs of gate, up and down projection")
    if any(f"{_block(parts)}.{part}.bias" in source.tensors for parts in whole.values() for part in PARTS):
        raise InputError(f"{source.files.source}: its MLPs have biases, which conversions leave out; none was made")
    return whole


def _block(parts: Mapping[str, StoredTensor]) -> str:
    return parts["gate_proj"].name.removesuffix(".gate_proj.weight")


def is_expert(name: str) -> bool:
    """Whether a tensor is an expert's."""
    return _EXPERT.match(name) is not None


def is_bank(name: str) -> bool:
    """Whether a tensor is a bank of experts."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def module_name(name: str) -> str:
    """The name in the model's own modules (Mixtral's files have older ones)."""
    return name.replace(".block_sparse_moe", ".mlp")


def is_dense(name: str, layers: Mapping[int, object]) -> bool:
    """Whether a tensor is of the MLP of one of these layers."""
    match = _DENSE.match(name)
    return match is not None and int(match[2]) in layers
