"""Device-placement workloads: the exchange format of `msr-fiddle/dnn-partitioning`, contracted to colour classes.

A workload is a graph of operators with times on a CPU core and on an accelerator, sizes, and for every operator the
time to move its output between an accelerator and host memory. Nodes of one colour class share a device, so a class is
what is placed (`PlaceInstance.times` and so on are indexed by class). A *value* is a node read outside its class.

Throughput: the load of an accelerator is its compute time, plus the cost of every outside value it reads, plus the cost
of every own value read elsewhere; a core's load is its compute time alone. Minimise the largest load.
Latency: an accelerator runs contiguous subgraphs one after another; each loads its inputs, computes, stores its
outputs; CPU nodes run as soon as their inputs are there. Minimise the last finish. Source of both: Tarnawski et al.,
"Efficient Algorithms for Device Placement of DNN Graph Operators", NeurIPS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import from_data, load_data


class _Node(BaseModel):
    model_config = ConfigDict(extra="ignore")
    id: int
    supportedOnFpga: bool
    cpuLatency: float = Field(ge=0)
    fpgaLatency: float = Field(ge=0)
    isBackwardNode: bool
    size: float = Field(0.0, ge=0)
    colorClass: int | str | None = None


class _Edge(BaseModel):
    model_config = ConfigDict(extra="ignore")
    sourceId: int
    destId: int
    cost: float = Field(ge=0)


class _Workload(BaseModel):
    model_config = ConfigDict(extra="ignore")
    maxFPGAs: int = Field(ge=0)
    maxCPUs: int = Field(ge=0)
    maxSizePerFPGA: float = Field(ge=0)
    nodes: list[_Node] = Field(min_length=1)
    edges: list[_Edge]


@dataclass(frozen=True, slots=True)
class PlaceInstance:
    """A workload in arrays. Classes are numbered in a topological order of their first nodes.

    Nodes: ``node_ids``, ``node_class``, ``node_acc``, ``node_cpu`` (times), ``node_cost`` (of moving the output),
    ``node_backward``, and ``edges[e] = (source, target)`` by node position, in topological order of nodes.
    Classes: ``acc``, ``cpu`` (times), ``size``, ``supported``. Values: ``value_source[v]`` (class), ``value_cost[v]``,
    and its reading classes ``readers[reader_start[v]:reader_start[v + 1]]``.
    """

    name: str
    num_accelerators: int
    num_cpus: int
    memory: float
    node_ids: tuple[int, ...]
    node_class: np.ndarray
    node_acc: np.ndarray
    node_cpu: np.ndarray
    node_cost: np.ndarray
    node_backward: np.ndarray
    edges: np.ndarray
    acc: np.ndarray
    cpu: np.ndarray
    size: np.ndarray
    supported: np.ndarray
    value_source: np.ndarray
    value_cost: np.ndarray
    reader_start: np.ndarray
    readers: np.ndarray

    @property
    def num_classes(self) -> int:
        return len(self.acc)

    @property
    def num_devices(self) -> int:
        """Accelerators first, then CPU cores."""
        return self.num_accelerators + self.num_cpus

    def label(self, device: int) -> str:
        """``acc0``, ``acc1``, ..., ``cpu0``, ..."""
        return f"acc{device}" if device < self.num_accelerators else f"cpu{device - self.num_accelerators}"


def read_instance(path: Path) -> PlaceInstance:
    """The workload in a file.

    Raises:
        InputError: not the format, a node twice, an edge to nowhere, a cycle, two costs for one node's output.
    """
    where = str(path)
    raw: _Workload = from_data(load_data(path), _Workload, where)
    ids = [node.id for node in raw.nodes]
    if len(set(ids)) < len(ids):
        twice = next(key for key in ids if ids.count(key) > 1)
        raise InputError(f"{where}: node id {twice} appears twice")
    cost: dict[int, float] = {}
    graph = nx.DiGraph()
    graph.add_nodes_from(ids)
    for edge in raw.edges:
        for end in (edge.sourceId, edge.destId):
            if end not in graph:
                raise InputError(f"{where}: edge {edge.sourceId} -> {edge.destId}: there is no node {end}")
        if abs(cost.setdefault(edge.sourceId, edge.cost) - edge.cost) > 1e-6:
            raise InputError(f"{where}: node {edge.sourceId} has out-edges of cost {cost[edge.sourceId]} and"
                             f" {edge.cost}; the cost belongs to the node's output and must be equal on all")
        graph.add_edge(edge.sourceId, edge.destId)
    try:
        order = list(nx.lexicographical_topological_sort(graph))
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(str(a) for a, _ in nx.find_cycle(graph))
        raise InputError(f"{where}: the graph has a cycle: {cycle}") from None
    return _contract(path.stem, raw, graph, order, cost)


def _contract(name: str, raw: _Workload, graph: nx.DiGraph, order: list[int], cost: dict[int, float]) -> PlaceInstance:
    nodes = {node.id: node for node in raw.nodes}
    numbers: dict[Any, int] = {}
    class_of = {}
    for key in order:
        colour = nodes[key].colorClass
        class_of[key] = numbers.setdefault(("node", key) if colour is None else ("class", colour), len(numbers))
    count = len(numbers)
    sums = np.zeros((3, count))
    supported = np.ones(count, dtype=bool)
    for key in order:
        node = nodes[key]
        sums[:, class_of[key]] += (node.fpgaLatency, node.cpuLatency, node.size)
        supported[class_of[key]] &= node.supportedOnFpga
    values: dict[tuple[int, tuple[int, ...]], float] = {}
    for key in order:
        readers = tuple(sorted({class_of[reader] for reader in graph.successors(key)} - {class_of[key]}))
        if readers and cost[key] > 0:
            values[class_of[key], readers] = values.get((class_of[key], readers), 0.0) + cost[key]
    starts = np.cumsum([0, *(len(readers) for _, readers in values)])
    position = {key: place for place, key in enumerate(order)}
    edges = sorted((position[a], position[b]) for a, b in graph.edges)
    return PlaceInstance(
        name, raw.maxFPGAs, raw.maxCPUs, raw.maxSizePerFPGA, tuple(order),
        np.array([class_of[key] for key in order]), np.array([nodes[key].fpgaLatency for key in order]),
        np.array([nodes[key].cpuLatency for key in order]), np.array([cost.get(key, 0.0) for key in order]),
        np.array([nodes[key].isBackwardNode for key in order]), np.array(edges, dtype=np.int64).reshape(-1, 2),
        sums[0], sums[1], sums[2], supported, np.array([source for source, _ in values], dtype=np.int64),
        np.array(list(values.values())), starts.astype(np.int64),
        np.array([reader for _, readers in values for reader in readers], dtype=np.int64))
