"""The module path of every operator of a trace, kept while it is traced and found again for the backward.

Forward operators are recorded inside `inside`. An operator of the backward belongs to the module whose parameter or
activation it reads; one that makes a weight gradient, to the module that owns the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from torch import fx
from torch.fx import traceback

from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.tracing.joint import Joint

_KEY = "mipipe_module"


def inside(path: str) -> AbstractContextManager[None]:
    """A context in which traced operators belong to the module ``path``."""
    return traceback.annotate({_KEY: path})


def module_paths(made: Joint, phases: Mapping[fx.Node, Phase], num_inputs: int) -> dict[fx.Node, str]:
    """The module path of each operator, where one is known."""
    found = {node: path for node in phases if (path := node.meta.get("custom", {}).get(_KEY)) is not None}
    owners: dict[fx.Node, str] = {}
    for argument in made.arguments[num_inputs:]:
        path = next((found[user] for user in argument.users if user in found), None)
        if path is not None:
            owners[argument] = path
    for argument, grad in zip(made.arguments[num_inputs:], made.grads[num_inputs:], strict=False):
        if grad is not None and argument in owners:
            _own(grad, owners[argument], found, phases)
    for node in phases:
        if node not in found:
            path = next(_known(node, owners, found, phases), None)
            if path is not None:
                found[node] = path
    return found


def _own(grad: fx.Node, path: str, found: dict[fx.Node, str], phases: Mapping[fx.Node, Phase]) -> None:
    """Give the operators of W that only lead to a gradient its path."""
    pending = [grad]
    while pending:
        node = pending.pop()
        if phases.get(node) is Phase.W and node not in found:
            found[node] = path
            pending.extend(node.all_input_nodes)


def _known(node: fx.Node, owners: Mapping[fx.Node, str], found: Mapping[fx.Node, str],
           phases: Mapping[fx.Node, Phase]) -> Iterator[str]:
    """Paths of what an operator reads: parameters first, then activations, then gradients."""
    sources = node.all_input_nodes
    yield from (owners[item] for item in sources if item in owners)
    yield from (found[item] for item in sources if item in found and phases.get(item) is Phase.F)
    yield from (found[item] for item in sources if item in found)
