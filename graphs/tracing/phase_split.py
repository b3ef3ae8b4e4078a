"""Which operators of a segment's joint graph run in F, in I and in W; the rules: `mipipe.graphs.tracing.partition`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence

import networkx as nx
import torch
from torch import fx

from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.operators.flops import count_flops, num_bytes
from mipipe.graphs.tracing.joint import Joint
from mipipe.graphs.tracing.storages import storage_bytes, storage_of


def assign_phases(made: Joint, num_inputs: int) -> dict[fx.Node, Phase]:
    """The phase of every operator of the joint graph; results of an operator with several go with it."""
    operators = [node for node in made.graph.nodes if node.op == "call_function"]
    forward = ancestors([*made.outputs, *made.updates.values()])
    backward = closure([node for node in made.tangents if node is not None], lambda node: node.users)
    free = [node for node in operators if node not in forward and node not in backward]
    resident = {storage_of(node) for node in made.arguments[num_inputs:]}
    forward |= _cheaper_in_forward(free, backward, resident)
    towards_inputs = ancestors(made.grads[:num_inputs])
    if any(made.grads[:num_inputs]):
        known = forward | towards_inputs
        for grad in made.grads[num_inputs:]:
            towards_inputs |= set() if grad is None else _early_gradient(grad, known)
    phases: dict[fx.Node, Phase] = {}
    for node in operators:
        if node.target is operator.getitem:
            phases[node] = phases[node.args[0]]
        else:
            phases[node] = Phase.F if node in forward else Phase.I if node in towards_inputs else Phase.W
    return phases


def _early_gradient(grad: fx.Node, known: set[fx.Node]) -> set[fx.Node]:
    """The operators of a parameter gradient if it is better made in I: no product, and smaller than what it reads.

    The gradients of norm weights and biases: vectors, for which W would keep whole activations.
    """
    own = {node for node in closure([grad], lambda node: [] if node in known else node.all_input_nodes)
           if node not in known and node.op == "call_function"}
    reads = {storage_of(item): storage_bytes(item) for node in own for item in node.all_input_nodes
             if item not in own and storage_of(item) is not None}
    if any(_is_product(node) for node in own) or sum(reads.values()) <= 2 * num_bytes(grad.meta["val"]):
        return set()
    return own


def _is_product(node: fx.Node) -> bool:
    """Whether an operator is what W exists to delay: it has flops, or fills a table (an embedding's gradient)."""
    if str(node.target) in ("aten.embedding_dense_backward.default", "aten.index_put.default"):
        return True
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
    return count_flops(node.target, args, kwargs, node.meta["val"]) > 0


def _cheaper_in_forward(free: Sequence[fx.Node], backward: set[fx.Node], resident: set[int | None]) -> set[fx.Node]:
    """The gradient-free operators outside F which F should compute, so that the fewest bytes are kept.

    A minimum cut between what F has and what the backward reads; each storage is a vertex that costs its bytes
    (``resident`` ones, of parameters and buffers, nothing). Among equal cuts the one with the least in F.
    """
    cut, members = nx.DiGraph(), set(free)

    def vertex(node: fx.Node) -> Hashable:
        storage = storage_of(node)
        if storage is None:
            cut.add_edge((node, "in"), (node, "out"))
            return node
        size = 0 if storage in resident else max(1, storage_bytes(node))
        cut.add_edge((storage, "in"), (storage, "out"), capacity=size)
        return storage

    sources = {source for node in free for source in node.all_input_nodes}
    for node in {*free, *sources}:
        if node not in members or _draws(node):
            cut.add_edge("source", (vertex(node), "in"))
        if any(user in backward for user in node.users):
            cut.add_edge((vertex(node), "out"), "sink")
    for node in free:
        for source in node.all_input_nodes:
            if vertex(source) != vertex(node):
                cut.add_edge((vertex(source), "out"), (vertex(node), "in"))
    if "sink" not in cut or "source" not in cut:
        return set()
    _, (_, early) = nx.minimum_cut(cut.reverse(copy=False), "sink", "source")  # reversed: the smallest side of F
    chosen = [node for node in free if (vertex(node), "in") in early and not is_view(node)]
    return ancestors(chosen)


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers: it must run exactly once, in F."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_view(node: fx.Node) -> bool:
    """Whether a node's tensor shares the storage of one of its inputs."""
    storage = storage_of(node)
    return storage is not None and any(storage_of(source) == storage for source in node.all_input_nodes)


def closure(nodes: Iterable[fx.Node | None], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """All nodes reached from ``nodes`` (themselves included) by ``step``."""
    found: set[fx.Node] = set()
    pending = [node for node in nodes if node is not None]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(step(node))
    return found


def ancestors(nodes: Iterable[fx.Node | None]) -> set[fx.Node]:
    return closure(nodes, lambda node: node.all_input_nodes)
