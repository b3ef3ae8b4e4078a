"""What a recipe added to a model, put together from the processes that hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mipipe.runtime.engine.compiling.team import member_pieces
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import gather, gather_first


def whole_tensors(engine: Engine, wanted: Callable[[str], bool], first_only: bool = False) -> dict[str, Tensor]:
    """The parameters and buffers of these names on the CPU, whole (members of a team, or copies, may hold parts), on
    every rank or (``first_only``) on the first. All ranks must call."""
    held = {**engine.weights.parameters, **engine.weights.buffers}
    return from_parts(engine, {name: item for name, item in held.items() if wanted(name)}, first_only)


def from_parts(engine: Engine, tensors: Mapping[str, Tensor], first_only: bool = False) -> dict[str, Tensor]:
    """Tensors that lie as the parameters of the same names do, whole, as `whole_tensors` has them."""
    pieces, compiled = member_pieces(engine.compiled, engine.graph, engine.mesh), engine.compiled
    own = {name: (item.detach().cpu(), pieces.get(name)) for name, item in tensors.items()
           if not engine.mesh.copy or compiled.apart(name)}
    found: dict[str, Tensor] = {}
    for part in gather_first(own) if first_only else gather(own):
        for name, (item, piece) in part.items():
            if piece is None:
                found.setdefault(name, item)
            else:
                piece.put(found.setdefault(name, item.new_zeros(piece.shape)), item)
    return dict(sorted(found.items()))
