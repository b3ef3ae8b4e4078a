"""What a merge method is, and the loop that applies one to a piece of the model, tile by tile.

A *piece* is one matrix or vector of the model with its counterparts in the base and in every merged model. It is cut
into *tiles* of whole rows, about `TILE_ENTRIES` entries each, so that elementwise methods stay in the processor's
cache and in little memory. Tile boundaries depend on the shape alone, never on the memory cap or the number of ranks,
so results are the same to the last bit in every execution.

A method may need statistics before it can merge a tile (a norm, an inner product, a k-th largest magnitude). It lists
`Round`s: each measures every tile of a scope, the measurements are *added* in tile order, and ``finish`` turns the sum
into the statistics handed to the next round and to ``apply``. The scope is one piece, one layer, or the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.method_table.method_spec import MethodSpec, Params, Scope
from mipipe.planner.merging import steps


class Measured(Protocol):
    """What calibration found; see `mipipe.runtime.calibration.results.UnitResults`. The base's number is -1."""

    @property
    def name(self) -> str:
        """The tensor."""

    def fields(self, statistic: str, model: int) -> dict[str, Tensor]:
        """The fields of this tensor's statistic; empty where it was not measured."""

    def columns(self, model: int) -> Tensor | None:
        """The order in which a model's columns were read, where it is not its own; -1: it has none there."""

    def units(self, model: int) -> Tensor | None:
        """The same of its rows."""

    def every(self, statistic: str, model: int, item: str) -> dict[str, float]:
        """A field of one number for all tensors, by name."""

    def other(self, statistic: str, model: int, name: str) -> dict[str, Tensor]:
        """The fields of another tensor's statistic."""

    def names(self, statistic: str, model: int) -> list[str]:
        """The tensors that a statistic was measured on."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of a piece in the compute dtype: of the base (or None) and of each merged model.

    Tensors are ``[rows, columns]``, or ``[rows]`` for vectors. ``key`` names the piece; ``index`` counts its
    ``num_tiles`` tiles. ``layer`` of ``num_layers`` is None outside the layers.
    """

    base: Tensor | None
    models: tuple[Tensor, ...]
    key: str = ""
    index: int = 0
    num_tiles: int = 1
    layer: int | None = None
    num_layers: int = 1
    tensor_class: TensorClass = TensorClass.MATRIX
    seed: int = 0
    factors: tuple[tuple[Tensor, Tensor] | None, ...] = ()
    """Of methods on factors, each model's adapter of these rows: ``scale * B`` ``[rows, r]`` and A ``[r, columns]``."""
    measured: Measured | None = None
    """What running the models found out about these rows, for methods that need it."""

    @property
    def origin(self) -> Tensor:
        """The base; for methods that require one."""
        assert self.base is not None
        return self.base

    def deltas(self) -> list[Tensor]:
        """Task vectors, model minus base."""
        return [model - self.origin for model in self.models]

    def random(self, model: int) -> Tensor:
        """Uniform numbers in [0, 1) of the tile's shape, the same wherever and whenever the tile is computed."""
        text = f"{self.seed}/{model}/{self.key}/{self.index}"
        words = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(words.tolist())))
        like = self.models[model]
        return torch.from_numpy(generator.random(like.shape, dtype=np.float32)).to(like.device)


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over a scope. ``measure(tile, stats, **params)`` is added over tiles, ``finish(total, stats, **params)``
    gives the next statistics."""

    measure: Callable[..., Tensor]
    finish: Callable[..., Any]


def no_rounds(**_params: Any) -> tuple[Round, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: its mathematics in ``rounds(**params)`` and ``apply(tile, stats, **params)``, a tensor.

    ``elsewhere(tile, None, **params)`` merges the tensor classes the method does not define.
    """

    spec: MethodSpec
    apply: Callable[..., Any]
    rounds: Callable[..., tuple[Round, ...]] = no_rounds
    elsewhere: Callable[..., Tensor] | None = None

    def scope(self, **params: Any) -> Scope:
        """Over which tensors the statistics are added up."""
        return self.spec.scope(params)

    def handling(self, tensor_class: TensorClass) -> Method:
        """The method that merges tensors of a class: itself, or its rule for what it does not define."""
        if tensor_class in self.spec.classes:
            return self
        assert self.elsewhere is not None
        plain = MethodSpec(self.spec.name, self.spec.title, self.spec.arxiv, self.spec.parameters, self.spec.base)
        return Method(plain, self.elsewhere)


class PieceReader(Protocol):
    """Anything that yields the tiles of one piece, any number of times."""

    def tiles(self, whole: bool) -> Iterator[Tile]:
        """Tiles in row order; a single one when ``whole``."""


def rows_per_tile(columns: int) -> int:
    """Whole rows that make about `TILE_ENTRIES` entries; at least one."""
    return max(1, steps.TILE_ENTRIES // max(1, columns))


def tile_ranges(rows: int, columns: int, whole: bool) -> list[tuple[int, int]]:
    """Row ranges of a piece's tiles: a function of its shape alone."""
    step = rows if whole else rows_per_tile(columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, max(1, step))]


def measure_piece(step: Round, piece: PieceReader, stats: Any, params: Params) -> Tensor:
    """The sum of a round's measurements over the tiles of one piece."""
    total: Tensor | None = None
    for tile in piece.tiles(whole=False):
        part = step.measure(tile, stats, **params)
        total = part if total is None else total + part
    assert total is not None
    return total


def merge_piece(method: Method, piece: PieceReader, params: Params, stats: Any = None) -> Iterator[Tensor]:
    """Merged tiles in row order. ``stats`` are the statistics of a wider scope, if the method has one."""
    if method.scope(**params) is Scope.PIECE:
        for step in method.rounds(**params):
            stats = step.finish(measure_piece(step, piece, stats, params), stats, **params)
    for tile in piece.tiles(method.spec.whole):
        yield method.apply(tile, stats, **params)


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A piece held in memory: for tests and for use as a library."""

    base: Tensor | None
    models: Sequence[Tensor]
    key: str = ""
    seed: int = 0
    layer: int | None = None
    num_layers: int = 1
    tensor_class: TensorClass = TensorClass.MATRIX

    def tiles(self, whole: bool) -> Iterator[Tile]:
        like = self.models[0]
        columns = like.shape[1] if like.dim() == 2 else 1
        ranges = tile_ranges(like.shape[0], columns, whole)
        for index, (start, stop) in enumerate(ranges):
            yield Tile(None if self.base is None else self.base[start:stop],
                       tuple(model[start:stop] for model in self.models), self.key, index, len(ranges), self.layer,
                       self.num_layers, self.tensor_class, self.seed)


def merge_tensors(method: Method, base: Tensor | None, models: Sequence[Tensor], params: Params | None = None, *,
                  key: str = "tensor", seed: int = 0, layer: int | None = None, num_layers: int = 1,
                  tensor_class: TensorClass | None = None) -> Tensor:
    """One tensor merged in memory, with defaults for the parameters not given.

    Args:
        base: ``[rows, columns]`` or ``[n]``; None where the method needs none.
        models: tensors of the same shape.
        params: values by their recipe names; per-model parameters as a list or one value for all.
    """
    if tensor_class is None:
        tensor_class = TensorClass.VECTOR if models[0].dim() < 2 else TensorClass.MATRIX
    method = method.handling(tensor_class)
    piece = TensorPiece(base, models, key, seed, layer, num_layers, tensor_class)
    values = fill(method, params or {}, len(models))
    stats = None
    if method.scope(**values) is not Scope.PIECE:
        for step in method.rounds(**values):
            stats = step.finish(measure_piece(step, piece, stats, values), stats, **values)
    return torch.cat(list(merge_piece(method, piece, values, stats)))


def fill(method: Method, given: Params, num_models: int) -> dict[str, Any]:
    """Keyword arguments of a method's functions: defaults filled in, per-model values as tuples, ``lambda`` renamed."""
    values: dict[str, Any] = {}
    for parameter in method.spec.parameters:
        value = given.get(parameter.name, parameter.default)
        if parameter.per_model:
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * num_models
        values["lambda_" if parameter.name == "lambda" else parameter.name] = value
    values.pop("int8_mask", None)
    return values
