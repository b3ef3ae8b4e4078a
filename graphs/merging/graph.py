"""`MergeGraph`: a recipe and the checkpoints' headers as a graph of units, one per tensor of the output.

A unit is load, combine, save for one output tensor: its inputs in the checkpoints, the method with its values for this
tensor, and the bytes it moves. Units share nothing but statistics over wider scopes, so any rank can take any
unit. Built from names and shapes alone; no tensor data is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mipipe.graphs.calibration.streams import CalibrationPlan
from mipipe.graphs.merging.checkpoints.files import DTYPE_BITS, StoredTensor
from mipipe.graphs.merging.checkpoints.tensor_classes import TableRows, TensorClass, is_stacked, pieces, table_shape
from mipipe.graphs.merging.tokens.vocabulary import Vocabulary
from mipipe.graphs.serialize import STRICT


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter's factors to add to an input: ``scale * up @ down``.

    With a ``magnitude`` (DoRA), each row of the sum is then scaled to that norm. ``start`` (``pissa``, ``olora``): the
    input first loses the product that the factors began with, which is found again in it. ``transposed``: the input is
    stored ``[in, out]``, and ``scale * (up @ down)^T`` is added.
    """

    __pydantic_config__: ClassVar = STRICT
    folder: str
    down: StoredTensor
    up: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    start: str = ""
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        return self.down.num_bytes + self.up.num_bytes + (self.magnitude.num_bytes if self.magnitude else 0)


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor a unit reads: of which model (index into the graph's), where, and what is added to it."""

    __pydantic_config__: ClassVar = STRICT
    model: int
    folder: str
    tensor: StoredTensor
    adapters: tuple[Adapter, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_bytes + sum(item.num_bytes for item in self.adapters)


@dataclass(frozen=True, slots=True)
class MergeUnit:
    """One output tensor: ``method`` with ``parameters`` on ``models`` against ``base``.

    ``method`` ``copy`` copies the first input's bytes. ``dtype`` is the output's (safetensors' spelling), ``shape`` the
    output's. ``vocabulary``: rows are gathered by the graph's vocabulary. ``crop``: inputs are cut to the shape from
    the top left. ``widened``: inputs are smaller, their units are partly kept side by side
    (`mipipe.graphs.merging.unit_groups`). ``group`` names the branch, over which statistics of the whole model are
    taken.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    method: str
    shape: tuple[int, ...]
    dtype: str
    tensor_class: TensorClass
    base: Input | None
    models: tuple[Input, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    layer: int | None = None
    num_layers: int = 1
    stack: str = ""
    transposed: bool = False
    vocabulary: bool = False
    crop: bool = False
    group: str = ""
    experts: str = ""
    widened: bool = False

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Base (if any) and models."""
        return ((self.base,) if self.base is not None else ()) + self.models

    @property
    def num_entries(self) -> int:
        return math.prod(self.shape)

    @property
    def read_bytes(self) -> int:
        return sum(item.num_bytes for item in self.inputs)

    @property
    def write_bytes(self) -> int:
        return self.num_entries * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class MergeModel:
    """A model that goes in, for the model card and for recognising changed inputs."""

    __pydantic_config__: ClassVar = STRICT
    label: str
    folder: str
    fingerprint: str
    licence: str
    """Empty for what the merge makes itself: the routers of an assembly."""
    num_bytes: int
    file: str = ""
    """The file in the folder, where the model is one file alone."""

    @property
    def source(self) -> str:
        """What the model is read from."""
        return f"{self.folder}/{self.file}" if self.file else self.folder


@dataclass(frozen=True, slots=True)
class MergeGraph:
    """All units of a merge in order of names, and what else the output folder gets.

    ``config`` is the output's config.json; ``tokenizer_from`` the folder its tokenizer files come from. ``align`` asks
    for experts (and their hidden units) to be matched first. ``notes`` are lines for whoever merges: what was left out
    or differs.
    """

    FORMAT: ClassVar = "mipipe.merge_graph"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    units: tuple[MergeUnit, ...]
    models: tuple[MergeModel, ...]
    config: dict[str, Any]
    source_config: dict[str, Any]
    tokenizer_from: str
    recipe: dict[str, Any]
    vocabulary: Vocabulary | None = None
    compute_dtype: str = "float32"
    seed: int = 0
    align_experts: bool = False
    align_hidden_units: bool = False
    notes: tuple[str, ...] = ()
    calibration: CalibrationPlan | None = None
    """The models that are run first, where a method reads what that finds out."""

    @property
    def stores_parts(self) -> bool:
        """Whether the result is a folder of parts, not a checkpoint."""
        return any(unit.method == "store" for unit in self.units)

    @property
    def read_bytes(self) -> int:
        return sum(unit.read_bytes for unit in self.units)

    @property
    def write_bytes(self) -> int:
        return sum(unit.write_bytes for unit in self.units)


def matrix_shape(unit: MergeUnit) -> tuple[int, int]:
    """Rows and columns of one matrix of the unit: of one expert where experts are stacked."""
    if len(unit.shape) == 3 and unit.experts:
        return unit.shape[1], unit.shape[2]
    return table_shape(unit.shape)


def columns_of(unit: MergeUnit, shape: tuple[int, ...]) -> int:
    """Columns of a tensor seen as the unit's table."""
    if len(shape) < 2:
        return 1
    return shape[-1] if is_stacked(unit.name, shape) else math.prod(shape[1:])


def pieces_of(unit: MergeUnit, config: Mapping[str, Any]) -> tuple[TableRows, ...]:
    """The pieces of a unit in row order; a matrix stored transposed is one piece.

    Args:
        config: of the model whose architecture the output has (the graph's ``source_config``).
    """
    if unit.vocabulary or unit.crop or unit.transposed or unit.widened:
        return (TableRows(unit.name, 0, unit.shape[0] if unit.shape else 1),)
    return pieces(unit.name, unit.shape, config)
