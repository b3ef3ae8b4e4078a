"""Where every output tensor goes: shards, headers and offsets, known before a byte is computed.

Shapes and dtypes are known from the recipe, so each rank writes its tensors straight to their place and nothing is
gathered or buffered.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor
from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.serialize import STRICT, digest

METADATA = {"format": "pt"}
"""What transformers expects to find in a shard's header."""


class Writable(Protocol):
    """A tensor to be written: its name, dtype (in safetensors' spelling), shape and size."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def write_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its tensors by place, and its size."""

    __pydantic_config__: ClassVar = STRICT
    file: str
    tensors: tuple[StoredTensor, ...]
    num_bytes: int

    def header(self) -> bytes:
        """The bytes before the data, the header's length included."""
        return header_bytes([(tensor.name, tensor.dtype, tensor.shape, tensor.num_bytes) for tensor in self.tensors])


def lay_out(units: Sequence[Writable], shard_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most ``shard_bytes`` (a larger tensor has one of its own), filled in order of names."""
    groups: list[list[Writable]] = []
    size = 0
    for unit in sorted(units, key=lambda unit: unit.name):
        if not groups or size + unit.write_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.write_bytes
    shards = []
    for number, group in enumerate(groups, 1):
        file = ("model.safetensors" if len(groups) == 1
                else f"model-{number:05d}-of-{len(groups):05d}.safetensors")
        place = len(header_bytes([(unit.name, unit.dtype, unit.shape, unit.write_bytes) for unit in group]))
        tensors = []
        for unit in group:
            tensors.append(StoredTensor(unit.name, unit.dtype, unit.shape, file, place, place + unit.write_bytes))
            place += unit.write_bytes
        shards.append(Shard(file, tuple(tensors), place))
    return tuple(shards)


def header_bytes(entries: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The safetensors header of tensors that follow each other without gaps, padded to eight bytes."""
    header: dict[str, object] = {"__metadata__": METADATA}
    place = 0
    for name, dtype, shape, num_bytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + num_bytes]}
        place += num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def index_json(shards: Sequence[Shard]) -> str:
    """The index that names every tensor's shard, as transformers reads it."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
                      indent=2) + "\n"


def as_checkpoint(graph: MergeGraph, shards: Sequence[Shard]) -> CheckpointFiles:
    """The checkpoint a merge will write, from its layout: lets a later recipe be planned before it is there.

    Its path is that of the tokenizer's source, where a joined vocabulary is read from.
    """
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    return CheckpointFiles(graph.tokenizer_from, graph.config, tensors, digest(graph))
