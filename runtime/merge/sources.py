"""A unit's pieces as they come from disk: tiles of the base and the models in the compute dtype.

On the way from file to tile happen, in this order: adapters are added, experts and hidden units put in the base's
order, rows gathered by the joined vocabulary, tables cropped, and matrices stored transposed turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import StoredTensor
from mipipe.graphs.merging.checkpoints.tensor_classes import TableRows
from mipipe.graphs.merging.graph import Adapter, Input, MergeGraph, MergeUnit, columns_of, pieces_of
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.tokens.vocabulary import GivenRow
from mipipe.runtime.calibration.results import Results, UnitResults
from mipipe.runtime.merge.methods.method import Tile, tile_ranges
from mipipe.runtime.merge.reordering import Reordering
from mipipe.runtime.weights.reader import Shelf


@dataclass(frozen=True)
class Surroundings:
    """What reading needs besides the unit: open files, where and in which dtype to compute, matched experts."""

    graph: MergeGraph
    shelf: Shelf
    device: torch.device
    inputs: dict[tuple[int, str], Input] = field(default_factory=dict)
    orders: dict[tuple[int, str], Reordering] = field(default_factory=dict)
    """By (model, unit name)."""
    results: Results | None = None
    """What running the models found out, where a method reads it."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.graph.compute_dtype == "float64" else torch.float32


def unit_pieces(unit: MergeUnit, around: Surroundings) -> list[UnitPiece]:
    """The pieces of a unit in row order."""
    return [UnitPiece(unit, piece, around) for piece in pieces_of(unit, around.graph.source_config)]


class UnitPiece:
    """One piece of a unit; see `mipipe.runtime.merge.methods.method.PieceReader`."""

    def __init__(self, unit: MergeUnit, piece: TableRows, around: Surroundings) -> None:
        self.unit, self.piece, self.around = unit, piece, around
        self._factors: dict[tuple[str, str], Tensor] = {}
        self._means: dict[int, Tensor] = {}

    def tiles(self, whole: bool, first: int = 0, stop: int | None = None) -> Iterator[Tile]:
        """Tiles in row order. A whole tile of an oriented method is turned if it is stored transposed.

        Args:
            first, stop: only the tiles inside these rows of the piece.
        """
        unit = self.unit
        columns = columns_of(unit, unit.shape)
        ranges = tile_ranges(self.piece.stop - self.piece.start, columns, whole)
        turn = whole and unit.transposed and BY_NAME[unit.method].oriented
        for index, (start, end) in enumerate(ranges):
            if start < first or (stop is not None and end > stop):
                continue
            tensors = self._rows(self.piece.start + start, self.piece.start + end)
            if len(unit.shape) < 2:
                tensors = [tensor[:, 0] for tensor in tensors]
            if turn:
                tensors = [tensor.T.contiguous() for tensor in tensors]
            base = tensors[0] if unit.base is not None else None
            models = tuple(tensors[1:] if unit.base is not None else tensors)
            measured = None
            if self.around.results is not None:
                numbers = {place: item.model for place, item in enumerate(unit.models)}
                numbers |= {-1: unit.base.model} if unit.base is not None else {}
                orders = {place: order for place, item in enumerate(unit.models)
                          if (order := self.around.orders.get((item.model, unit.name))) is not None}
                measured = UnitResults(self.around.results, unit.name, numbers,
                                       (self.piece.start + start, self.piece.start + end), turn,
                                       {place: order.columns[0] for place, order in orders.items()
                                        if 0 in order.columns},
                                       {place: order.rows[0] for place, order in orders.items() if 0 in order.rows})
            yield Tile(base, models, self.piece.key, index, len(ranges), unit.layer, unit.num_layers,
                       unit.tensor_class, self.around.graph.seed, self._adapters(start, end), measured)

    def _adapters(self, start: int, stop: int) -> tuple[tuple[Tensor, Tensor] | None, ...]:
        """Every model's adapter of rows of the piece, where the method merges factors; None where it has none."""
        unit, around = self.unit, self.around
        if not BY_NAME[unit.method].factors:
            return ()
        found: list[tuple[Tensor, Tensor] | None] = []
        for item in unit.models:
            if len(item.adapters) > 1 or any(adapter.magnitude or adapter.start for adapter in item.adapters):
                raise InputError(f"{around.graph.models[item.model].label}: {unit.method} adds the factors of plain"
                                 " LoRA adapters, one for each model; DoRA, PiSSA and several at once are none")
            if not item.adapters:
                found.append(None)
                continue
            up, down = self._product(item.adapters[0], self.piece.start + start, self.piece.start + stop)
            found.append((up * item.adapters[0].scale, down))
        return tuple(found)

    def _rows(self, start: int, stop: int) -> list[Tensor]:
        """Rows of every input (base first), in the compute dtype and on the device."""
        unit = self.unit
        if unit.vocabulary:
            return self._gathered(start, stop)
        if unit.widened:
            return self._side_by_side(start, stop)
        columns = columns_of(unit, unit.shape)
        found = []
        for item in unit.inputs:
            own = columns_of(unit, item.tensor.shape)
            rows = self._input_rows(item, start, stop, own)
            found.append(rows[:, :columns].contiguous() if own != columns else rows)
        return found

    def _input_rows(self, item: Input, start: int, stop: int, columns: int) -> Tensor:
        order = self.around.orders.get((item.model, self.unit.name))
        if order is None:
            return self._plain_rows(item, start, stop, columns)
        if order.instead:
            item = self.around.inputs[item.model, order.instead]
        size = order.block_rows
        parts = []
        place = start
        while place < stop:  # a tile lies within one expert, except in a router, whose blocks are single rows
            block = place // size
            end = min(stop, (block + 1) * size)
            source = (order.blocks[block] if order.blocks is not None else block) * size
            if block in order.rows:
                every = self._plain_rows(item, source, source + size, columns)
                parts.append(every[order.rows[block][place - block * size:end - block * size]])
            else:
                parts.append(self._plain_rows(item, source + place - block * size, source + end - block * size,
                                              columns))
            if block in order.columns:
                parts[-1] = parts[-1][:, order.columns[block]].contiguous()
            place = end
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _side_by_side(self, start: int, stop: int) -> list[Tensor]:
        """Both models in the wide shape: zeros where a model has no column, and rows of one model alone in both."""
        found, known = [], []
        for item in self.unit.models:
            order = self.around.orders[item.model, self.unit.name]
            value, has = order.spread(self.whole(item).reshape(item.tensor.shape[0], -1), start, stop)
            found.append(value)
            known.append(has)
        both = known[0] & known[1]
        return [torch.where(both | known[number], value, found[1 - number]) for number, value in enumerate(found)]

    def whole(self, item: Input) -> Tensor:
        """All of an input's tensor in the compute dtype, with adapters added."""
        columns = columns_of(self.unit, item.tensor.shape)
        rows = math.prod(item.tensor.shape) // max(1, columns)
        return self._plain_rows(item, 0, rows, columns).reshape(item.tensor.shape)

    def picked(self, item: Input, rows: Tensor) -> Tensor:
        """Some rows of an input's table."""
        return self._pick(item, rows, columns_of(self.unit, item.tensor.shape))

    def _plain_rows(self, item: Input, start: int, stop: int, columns: int) -> Tensor:
        """Rows as stored, with adapters added."""
        around = self.around
        raw = around.shelf.read_rows(item.folder, item.tensor, start, stop, columns)
        rows = raw.to(around.device).to(around.dtype)
        for adapter in item.adapters:
            if adapter.start:
                left, right = self._start(adapter, item)
                rows = torch.addmm(rows, left[start:stop], right, alpha=-1.0)
            up, down = self._product(adapter, start, stop)
            rows = torch.addmm(rows, up, down, alpha=adapter.scale)
            if adapter.magnitude is not None:
                norms = around.shelf.read_rows(adapter.folder, adapter.magnitude, start, stop, 1)
                rows = rows * (norms.to(around.device).to(around.dtype) / rows.norm(dim=1, keepdim=True))
        return rows

    def _start(self, adapter: Adapter, item: Input) -> tuple[Tensor, Tensor]:
        """Factors ``[m, r]`` and ``[r, n]`` of what an adapter took out of the input's weight when it started.

        PiSSA (arXiv 2404.02948) takes the r leading singular triplets, OLoRA (arXiv 2406.01775) the first r columns of
        Q and rows of R, times the adapter's scale.
        """
        key = adapter.folder, f"{adapter.start} of {item.tensor.name}"
        if (key[0], f"{key[1]}, left") not in self._factors:
            rank, shape = adapter.down.shape[0], item.tensor.shape
            raw = self.around.shelf.read_rows(item.folder, item.tensor, 0, shape[0], shape[1])
            weight = raw.to(self.around.device).double()
            if adapter.start == "pissa":
                left, values, right = torch.linalg.svd(weight, full_matrices=False)
                left = left[:, :rank] * values[:rank]
            else:
                left, right = torch.linalg.qr(weight)
                left = left[:, :rank] * adapter.scale
            for name, factor in (("left", left), ("right", right[:rank])):
                self._factors[key[0], f"{key[1]}, {name}"] = factor.to(self.around.dtype)
        return self._factors[key[0], f"{key[1]}, left"], self._factors[key[0], f"{key[1]}, right"]

    def _product(self, adapter: Adapter, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows of an adapter's left factor and its right one, as the weight is stored."""
        around = self.around
        if adapter.transposed:
            return (self._factor(adapter.folder, adapter.down)[:, start:stop].T,
                    self._factor(adapter.folder, adapter.up).T)
        up = around.shelf.read_rows(adapter.folder, adapter.up, start, stop, adapter.down.shape[0])
        return up.to(around.device).to(around.dtype), self._factor(adapter.folder, adapter.down)

    def _factor(self, folder: str, tensor: StoredTensor) -> Tensor:
        """A whole factor of an adapter in the compute dtype."""
        if (folder, tensor.name) not in self._factors:
            raw = self.around.shelf.read_rows(folder, tensor, 0, tensor.shape[0], tensor.shape[1])
            self._factors[folder, tensor.name] = raw.to(self.around.device).to(self.around.dtype)
        return self._factors[folder, tensor.name]

    def _gathered(self, start: int, stop: int) -> list[Tensor]:
        """Rows of the joined vocabulary: a missing token takes the row that the recipe names, else the base's, else the
        mean of those that have it. Rows of no token are the mean of the model's table."""
        unit, vocabulary = self.unit, self.around.graph.vocabulary
        assert vocabulary is not None
        columns = columns_of(unit, unit.shape)
        wanted = [torch.tensor(vocabulary.rows[item.model][start:stop]) for item in unit.inputs]
        tables = [self._pick(item, rows, columns) for item, rows in zip(unit.inputs, wanted, strict=True)]
        has = [(rows >= 0).to(self.around.device) for rows in wanted]
        first = 1 if unit.base is not None else 0
        count = torch.stack(has[first:]).sum(0).clamp_min(1)[:, None]
        mean = torch.stack([table * mask[:, None] for table, mask in zip(tables[first:], has[first:], strict=True)])
        substitute = mean.sum(0) / count
        if unit.base is not None:
            substitute = torch.where(has[0][:, None], tables[0], substitute)
        for given in vocabulary.given:
            if start <= given.row < stop:
                substitute[given.row - start] = self._given(given, columns)
                for mask in has if given.force else ():
                    mask[given.row - start] = False
        found = [torch.where(mask[:, None], table, substitute) for table, mask in zip(tables, has, strict=True)]
        nobodys = (torch.stack(has).sum(0) == 0).cpu()
        nobodys[[given.row - start for given in vocabulary.given if start <= given.row < stop]] = False
        if bool(nobodys.any()):  # padding: zeros in a head could be the largest logits
            for item, rows in zip(unit.inputs, found, strict=True):
                rows[nobodys] = self._mean_row(item, columns)
        return found

    def _mean_row(self, item: Input, columns: int) -> Tensor:
        """The mean of all rows of an input's table."""
        if item.model not in self._means:
            total, rows = torch.zeros(columns, dtype=torch.float64, device=self.around.device), item.tensor.shape[0]
            step = max(1, 2**22 // columns)
            for start in range(0, rows, step):
                part = self._plain_rows(item, start, min(start + step, rows), columns)
                total += part.sum(0, dtype=torch.float64)
            self._means[item.model] = (total / rows).to(self.around.dtype)
        return self._means[item.model]

    def _given(self, given: GivenRow, columns: int) -> Tensor | float:
        """The row that a recipe names for a token."""
        if given.model < 0:
            return 0.0
        item = next((item for item in self.unit.inputs if item.model == given.model), None)
        if item is None:
            item = self.around.inputs[given.model, self.unit.name]
        return self._plain_rows(item, given.origin, given.origin + 1, columns)[0]

    def _pick(self, item: Input, rows: Tensor, columns: int) -> Tensor:
        """Rows of one input by number, runs of consecutive ones read together; zeros where the number is -1."""
        result = torch.zeros(len(rows), columns, dtype=self.around.dtype, device=self.around.device)
        numbers = rows.tolist()
        place = 0
        while place < len(numbers):
            if numbers[place] < 0:
                place += 1
                continue
            end = place + 1
            while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
                end += 1
            result[place:end] = self._plain_rows(item, numbers[place], numbers[end - 1] + 1, columns)
            place = end
        return result


