"""A merge method of one's own: a function of tiles, made known to recipes under a name.

    from mipipe.runtime.merge import Parameter, method

    @method("halfway", Parameter("share", 0.5, "how far towards the mean of the models"))
    def halfway(tile, _stats, *, share):
        return tile.origin + share * sum(tile.deltas()) / len(tile.models)

From then on `mipipe.merge` and `merge_state_dicts` take ``merge_method: halfway`` in this process and its ranks. Files
never name code: a recipe alone cannot bring a method along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.method_table import methods
from mipipe.graphs.merging.method_table.method_spec import Base, MethodSpec, Parameter
from mipipe.runtime.merge.methods.method import Method, Round, no_rounds
from mipipe.runtime.merge.methods.registry import BY_METHOD

Apply = TypeVar("Apply", bound=Callable[..., Any])


def method(name: str, *parameters: Parameter, base: Base = Base.REQUIRED, min_models: int = 1,
           max_models: int | None = None, whole: bool = False,
           rounds: tuple[Round, ...] = (), title: str = "") -> Callable[[Apply], Apply]:
    """Make the decorated function the merge method ``name``.

    It is called as ``apply(tile, stats, **parameters)`` with a `mipipe.runtime.merge.methods.method.Tile` and returns
    the merged tile; per-model parameters come as tuples, ``lambda`` as ``lambda_``.

    Args:
        whole: the function needs whole matrices, not some of their rows.
        rounds: statistics of each tensor that are measured first; the last one's result is ``stats``.
        title: what the model card calls the method.

    Raises:
        InputError: there is a method of that name.
    """

    def add(apply: Apply) -> Apply:
        spec = MethodSpec(name, title or (apply.__doc__ or name).strip().splitlines()[0], "", parameters, base,
                          min_models, max_models, whole, classes=frozenset(TensorClass) - {TensorClass.BUFFER},
                          rounds=lambda _params: len(rounds))
        methods.register(spec)
        BY_METHOD[name] = Method(spec, apply, (lambda **_params: rounds) if rounds else no_rounds)
        return apply

    return add
