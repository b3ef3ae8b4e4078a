"""Coarsening ("operator merging" in She et al., arXiv 2503.09357): operator graph -> groups the solver can take.

Groups are convex (contraction never makes a cycle), deterministic, and never cross a protected boundary: the modality
branch, the expert group, an all-to-all, or a label the user gives. Three steps, each only as far as it is needed:

1. within blocks (attention with its norm, MLP or MoE with its norm), then within layers: pairs joined by an edge are
   merged in the order of ``cut bytes / (cost * cost)`` (the rating "expansion*" of Holtgrewe, Sanders and Schulz, IPDPS
   2010), so chains of cheap segments go first and heavy groups last. Pairs of equal structure are merged together in
   all layers, so identical layers coarsen identically;
2. between layers: the clusters in a topological order are cut into exactly the wanted number of intervals (an interval
   of a topological order is always convex), the heaviest as light as possible, then even, then at narrow places.

Costs are hardware-neutral here: max(flops, FLOPS_PER_BYTE * bytes) summed over operators and phases. Left out:
replication, and coarsening that looks at a particular cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Literal

from mipipe.graphs.coarse.contract import contract, is_collective, layer_stack
from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.coarse.graph_index import GraphIndex, index_graph
from mipipe.graphs.coarse.intervals import cut_intervals
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import OperatorGraph, Role, SegmentTrace

GroupGranularity = Literal["layer", "block", "operator"]

DEFAULT_GROUPS = 64
"""The most groups when neither a number nor a granularity is asked for: what the placement MIP takes in seconds."""

FLOPS_PER_BYTE = 50
"""Work that costs as much as moving a byte: between a CPU in float32 (about 10) and an H100 in bfloat16 (295)."""

_BLOCKS = {Role.ATTENTION: "mixer", Role.MLP: "mlp", Role.ROUTER: "mlp", Role.DISPATCH: "mlp", Role.EXPERTS: "mlp",
           Role.SHARED_EXPERTS: "mlp", Role.COMBINE: "mlp"}
"""The half of a layer a role belongs to; roles that are not here (norms) go with what reads them."""


@dataclass(slots=True)
class _Cluster:
    """Segments merged so far. ``kind`` numbers the structure: equal for clusters merged the same way."""

    members: list[int]
    cost: int
    kind: int
    protected: tuple[Any, ...]
    layer: tuple[Any, ...]
    blocks: frozenset[str]


@dataclass(slots=True)
class _State:
    """The clusters by id, which cluster each segment is in, and the interned structures."""

    index: GraphIndex
    clusters: dict[int, _Cluster]
    owner: list[int]
    kinds: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def edges(self) -> dict[tuple[int, int], int]:
        """Bytes that cross between each pair of clusters, forward and backward, in order of first use."""
        found: dict[tuple[int, int], int] = {}
        for value in self.index.graph.values:
            source = self.index.source[value.name]
            if source < 0:
                continue
            home = self.owner[source]
            size = self.index.num_bytes[value.name] * (2 if value.name in self.index.returns_grad else 1)
            for target in dict.fromkeys(self.owner[reader] for reader in self.index.readers[value.name]):
                if target != home:
                    found[home, target] = found.get((home, target), 0) + size
        return found


def coarsen(graph: OperatorGraph, *, num_groups: int | None = None, granularity: GroupGranularity | None = None,
            labels: Mapping[str, str] | None = None) -> CoarseGraph:
    """The coarse graph with at most ``num_groups`` groups, or at a granularity, or both.

    ``operator`` keeps the segments as captured, ``block`` halves layers, ``layer`` keeps whole layers. Within layers
    merging is the same in all equal layers, so there may be fewer groups than asked for; between layers the number is
    met exactly. Neither given: at most `DEFAULT_GROUPS`. ``labels`` (segment name -> text) adds boundaries: segments
    with different labels never share a group.

    Raises:
        GraphError: protected boundaries leave more groups than asked for, or a label names no segment.
    """
    if num_groups is not None and num_groups < 1:
        raise GraphError(f"coarsening: {num_groups} groups asked for; expected at least 1")
    if num_groups is None and granularity is None:
        num_groups = DEFAULT_GROUPS
    index = index_graph(graph)
    state = _initial_state(index, labels or {})
    if granularity in ("block", "layer"):
        _merge_within(state, _same_block, 1)
    if granularity == "layer":
        _merge_within(state, _same_layer, 1)
    if num_groups is not None:
        _merge_within(state, _same_block, num_groups)
        _merge_within(state, _same_layer, num_groups)
    order = _topological_order(state)
    assert order is not None, "merging keeps the graph acyclic"
    if num_groups is not None and num_groups < len(order):
        groups = _cut(state, order, num_groups)
    else:
        groups = [state.clusters[cluster].members for cluster in order]
    asked = {"groups": num_groups, "granularity": granularity}
    return contract(index, groups, {key: str(item) for key, item in asked.items() if item is not None})


def segment_cost(trace: SegmentTrace) -> int:
    """The hardware-neutral cost of a trace's three phases."""
    return sum(max(operator.flops, FLOPS_PER_BYTE * (operator.bytes_read + operator.bytes_written))
               for operator in trace.operators)


def _initial_state(index: GraphIndex, labels: Mapping[str, str]) -> _State:
    """Every segment a cluster of its own."""
    unknown = set(labels) - {segment.name for segment in index.segments}
    if unknown:
        raise GraphError(f"coarsening: a label names segment {min(unknown)!r}, which the graph does not have")
    costs = {trace.digest: segment_cost(trace) for trace in index.graph.traces}
    collective = {trace.digest: is_collective(trace) for trace in index.graph.traces}
    layered = {segment.tags.branch for segment in index.segments if segment.tags.layer is not None}
    state = _State(index, {}, list(range(len(index.segments))))
    for number, segment in enumerate(index.segments):
        tags = segment.tags
        apart = number if collective[segment.trace] else None  # a collective is a group of its own
        protected = (tags.branch, tags.expert_group, labels.get(segment.name), apart)
        # A branch without layers has no structure to follow: its segments are merged by intervals only.
        outside = () if tags.branch in layered else (number,)
        layer = outside if tags.layer is None else (layer_stack(segment), tags.layer)
        kind = state.kinds.setdefault((segment.trace, tags.branch, tags.expert_group), len(state.kinds))
        blocks = frozenset((_BLOCKS[tags.role],)) if tags.role in _BLOCKS else frozenset()
        state.clusters[number] = _Cluster([number], costs[segment.trace], kind, protected, layer, blocks)
    return state


def _same_layer(first: _Cluster, second: _Cluster) -> bool:
    return first.protected == second.protected and first.layer == second.layer


def _same_block(first: _Cluster, second: _Cluster) -> bool:
    """Within one half of a layer; what has no half of its own (a norm) goes with its reader, not with its maker."""
    return (_same_layer(first, second) and len(first.blocks | second.blocks) <= 1
            and (bool(second.blocks) or not first.blocks))


def _merge_within(state: _State, may_merge: Callable[[_Cluster, _Cluster], bool], target: int) -> None:
    """Merge allowed pairs, one class of equal pairs after the other, until at most ``target`` clusters are left."""
    while len(state.clusters) > target:
        edges = state.edges()
        classes: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for (u, v), size in edges.items():
            first, second = state.clusters[u], state.clusters[v]
            if may_merge(first, second):
                classes.setdefault((first.kind, second.kind, size), []).append((u, v))
        reach = _reach(state, edges)
        ranked = sorted(classes.items(), key=lambda item: (-_rating(state, item[0][2], item[1][0]), item[1][0]))
        if not any(_merge_class(state, pairs, edges, reach) for _, pairs in ranked):
            return


def _rating(state: _State, size: int, pair: tuple[int, int]) -> float:
    first, second = (state.clusters[cluster].cost for cluster in pair)
    return (size + 1) / ((first + 1) * (second + 1))


def _merge_class(state: _State, pairs: Iterable[tuple[int, int]], edges: Mapping[tuple[int, int], int],
                 reach: Mapping[int, int]) -> bool:
    """Merge all pairs of a class that leave the graph acyclic; whether any was merged."""
    following: dict[int, list[int]] = {}
    for u, v in edges:
        following.setdefault(u, []).append(v)
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for u, v in pairs:
        detour = any(w != v and reach[w] >> v & 1 for w in following[u])
        if not detour and u not in used and v not in used:
            chosen.append((u, v))
            used.update((u, v))
    if not chosen:
        return False
    before = (dict(state.clusters), list(state.owner))
    for pair in chosen:
        _join(state, *pair)
    if _topological_order(state) is None:  # two merges, each sound alone, can close a cycle together: merge one only
        state.clusters, state.owner = before
        _join(state, *chosen[0])
    return True


def _join(state: _State, u: int, v: int) -> None:
    """Put cluster v into cluster u."""
    first, second = state.clusters[u], state.clusters.pop(v)
    kind = state.kinds.setdefault((first.kind, second.kind), len(state.kinds))
    state.clusters[u] = _Cluster(sorted(first.members + second.members), first.cost + second.cost, kind,
                                 first.protected, first.layer, first.blocks | second.blocks)
    for member in second.members:
        state.owner[member] = u


def _reach(state: _State, edges: Mapping[tuple[int, int], int]) -> dict[int, int]:
    """For every cluster, the clusters it reaches (itself included) as the bits of an integer."""
    order = _topological_order(state)
    assert order is not None, "merging keeps the graph acyclic"
    following: dict[int, list[int]] = {}
    for u, v in edges:
        following.setdefault(u, []).append(v)
    reach: dict[int, int] = {}
    for cluster in reversed(order):
        bits = 1 << cluster
        for other in following.get(cluster, ()):
            bits |= reach[other]
        reach[cluster] = bits
    return reach


def _topological_order(state: _State) -> list[int] | None:
    """Clusters in a topological order that changes sides of protected boundaries as late as it can; None: a cycle."""
    waits = dict.fromkeys(state.clusters, 0)
    following: dict[int, list[int]] = {cluster: [] for cluster in state.clusters}
    for u, v in state.edges():
        following[u].append(v)
        waits[v] += 1
    ready: dict[tuple[Any, ...], list[tuple[int, int]]] = {}

    def put(cluster: int) -> None:
        entry = (state.clusters[cluster].members[0], cluster)
        heappush(ready.setdefault(state.clusters[cluster].protected, []), entry)

    for cluster, count in waits.items():
        if not count:
            put(cluster)
    order: list[int] = []
    current: tuple[Any, ...] | None = None
    while ready:
        if current not in ready:
            current = min(ready, key=lambda key: ready[key][0])
        assert current is not None
        cluster = heappop(ready[current])[1]
        if not ready[current]:
            del ready[current]
        order.append(cluster)
        for other in following[cluster]:
            waits[other] -= 1
            if not waits[other]:
                put(other)
    return order if len(order) == len(state.clusters) else None


def _cut(state: _State, order: list[int], num_groups: int) -> list[list[int]]:
    """The ordered clusters merged into ``num_groups`` intervals."""
    position = {cluster: number for number, cluster in enumerate(order)}
    crossing = [0] * (len(order) + 1)
    for value in state.index.graph.values:
        source = state.index.source[value.name]
        ends = [position[state.owner[reader]] for reader in state.index.readers[value.name]]
        if source < 0 or not ends:
            continue
        size = state.index.num_bytes[value.name] * (2 if value.name in state.index.returns_grad else 1)
        for boundary in range(position[state.owner[source]] + 1, max(ends) + 1):
            crossing[boundary] += size
    clusters = [state.clusters[cluster] for cluster in order]
    fixed = [number for number in range(1, len(order)) if clusters[number].protected != clusters[number - 1].protected]
    if len(fixed) + 1 > num_groups:
        raise GraphError(f"coarsening: {num_groups} groups asked for, but protected boundaries (branches, expert"
                         f" groups, all-to-alls, labels) leave {len(fixed) + 1} at least; ask for {len(fixed) + 1} or"
                         " more, or capture with fewer expert groups")
    ends = cut_intervals([cluster.cost for cluster in clusters], crossing, fixed, num_groups)
    starts = [0, *ends[:-1]]
    return [sorted(member for cluster in clusters[start:end] for member in cluster.members)
            for start, end in zip(starts, ends, strict=True)]
