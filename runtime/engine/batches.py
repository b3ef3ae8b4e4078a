"""Batches: splitting into microbatches, checked against the graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from mipipe.graphs.coarse.totals import num_sequences
from mipipe.graphs.errors import BatchError, InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes.rows import batch_inputs

Batch = Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]]
"""Full-batch tensors by the graph's input names, or one such mapping for each microbatch."""

SHORT = "; the short last batch of a loader is left out with drop_last=True, or passed over with data: {skip_invalid:" \
        " true}"


def split_batch(graph: OperatorGraph, batch: Batch, num_microbatches: int) -> list[dict[str, torch.Tensor]]:
    """The microbatches of a batch, as contiguous tensors where they are, checked against the graph's input shapes.

    A mapping is split along the first dimension of every tensor; parts that split differently (images and tokens) are
    given as a list of microbatches.

    Raises:
        BatchError: an input is missing or unknown, or a shape is not the captured one.
    """
    if isinstance(batch, Mapping):
        pieces: list[Mapping[str, torch.Tensor]] = [{} for _ in range(num_microbatches)]
        for name, tensor in batch.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.dim():
                raise BatchError(f"batch: {name} is a {type(tensor).__name__}, expected a tensor whose rows are"
                                 " samples")
            if tensor.shape[0] % num_microbatches:
                raise BatchError(f"batch: {name} has {tensor.shape[0]} rows, not a multiple of the plan's"
                                 f" {num_microbatches} microbatches{SHORT}")
            for piece, part in zip(pieces, tensor.chunk(num_microbatches), strict=True):
                piece[name] = part  # type: ignore[index]
    elif isinstance(batch, Sequence) and all(isinstance(piece, Mapping) for piece in batch):
        pieces = list(batch)
    else:
        raise BatchError(f"batch: a {type(batch).__name__}, expected tensors by name, or a list of such microbatches")
    if len(pieces) != num_microbatches:
        raise BatchError(f"batch: {len(pieces)} microbatches were given, but the plan has {num_microbatches}{SHORT}")
    values = batch_inputs(graph)
    result = []
    for number, piece in enumerate(pieces):
        unknown = sorted(set(piece) - set(values))
        if unknown:
            raise BatchError(f"batch: {unknown[0]!r} is no input of {graph.model}; expected {', '.join(values)}")
        converted = {}
        for name in values:
            if name not in piece:
                asks = f", which the loss {graph.source['loss']['name']} needs" \
                    if name in graph.source.get("loss", {}).get("batch", ()) else ""
                raise BatchError(f"batch: input {name!r} of {graph.model} is missing{asks}")
            tensor, spec = piece[name], values[name]
            if not isinstance(tensor, torch.Tensor):
                raise BatchError(f"batch, microbatch {number}: {name} is a {type(tensor).__name__}, expected a tensor")
            if tuple(tensor.shape) != spec.shape or str(tensor.dtype) != f"torch.{spec.dtype}":
                short = tensor.dim() == len(spec.shape) and tensor.shape[:1] < torch.Size(spec.shape[:1])
                raise BatchError(f"batch, microbatch {number}: {name} is {tensor.dtype} {list(tensor.shape)}, but the"
                                 f" graph was captured with {spec.dtype} {list(spec.shape)}{SHORT if short else ''}")
            converted[name] = tensor.contiguous()
        result.append(converted)
    return result


def move_batch(microbatches: Sequence[Mapping[str, torch.Tensor]], device: torch.device,
               names: Collection[str]) -> list[dict[str, torch.Tensor]]:
    """These inputs of the microbatches on a device; to CUDA they go through page-locked memory, and the host does not
    wait."""
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        locked = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return locked.to(device, non_blocking=True)
    return [{name: moved(tensor) for name, tensor in piece.items() if name in names} for piece in microbatches]


def check_sizes(graph: OperatorGraph, batch: int | None, seq: int | None, num_microbatches: int) -> None:
    """Raise `InputError` where a configured batch or sequence length is not the graph's and the plan's."""
    spec = next((value.spec for value in graph.values if value.name == "input_ids"), None)
    rows = num_sequences(graph)
    if batch is not None and batch != rows * num_microbatches:
        raise InputError(f"train config: batch is {batch}, but {num_microbatches} microbatches of {rows} rows make"
                         f" {rows * num_microbatches}; capture or plan again to change it")
    if seq is not None and spec is not None and seq != spec.shape[-1]:
        raise InputError(f"train config: seq is {seq}, but the graph was captured with {spec.shape[-1]} tokens")
