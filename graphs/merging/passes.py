"""How often a merge method reads a tensor, and over which tensors it takes statistics: what planning must know.

A method measures its statistics in rounds (`mipipe.runtime.merge.methods.method`), each a reading of the data of its
own. A test holds these numbers to what the methods do.
"""

from __future__ import annotations

from mipipe.graphs.merging.graph import MergeUnit
from mipipe.graphs.merging.method_table.method_spec import Scope
from mipipe.graphs.merging.method_table.methods import BY_NAME


def num_rounds(unit: MergeUnit) -> int:
    """How many rounds of statistics are measured on a unit before it is merged."""
    spec = BY_NAME.get(unit.method)
    if spec is None or unit.tensor_class not in spec.classes:
        return 0
    return spec.rounds({parameter.name: parameter.default for parameter in spec.parameters} | unit.parameters)


def scope_of(unit: MergeUnit) -> Scope:
    """Over which tensors a unit's statistics are added up; for a method without any, the piece."""
    spec = BY_NAME.get(unit.method)
    if spec is None or unit.tensor_class not in spec.classes:
        return Scope.PIECE
    return spec.scope(unit.parameters)


def is_wide(unit: MergeUnit) -> bool:
    """Whether a unit's statistics are shared with other tensors, so that they are measured before anything is merged.

    Tensors outside the layers have no layer to share statistics with; their method says what becomes of them.
    """
    scope = scope_of(unit)
    return scope is Scope.MODEL or (scope is Scope.LAYER and unit.layer is not None)


def is_whole(unit: MergeUnit) -> bool:
    """Whether a unit's pieces are merged as whole matrices, not tile by tile: where the method needs them so, or tells
    rows from columns and the matrix is stored transposed."""
    spec = BY_NAME.get(unit.method)
    if spec is None or unit.tensor_class not in spec.classes:
        return False
    return spec.whole or (spec.oriented and unit.transposed)
