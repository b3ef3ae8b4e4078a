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

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import MOST_SUMMED, from_data, load_data

MOST_PLACED = 4096
"""Accelerators, and CPU cores, of a workload: a table of classes by devices must fit in memory."""


class _Node(BaseModel):
    model_config = ConfigDict(extra="ignore")
    id: int
    supportedOnFpga: bool
    cpuLatency: float = Field(ge=0, le=MOST_SUMMED)
    fpgaLatency: float = Field(ge=0, le=MOST_SUMMED)
    isBackwardNode: bool
    size: float = Field(0.0, ge=0, le=MOST_SUMMED)
    colorClass: int | str | None = None


class _Edge(BaseModel):
    model_config = ConfigDict(extra="ignore")
    sourceId: int
    destId: int
    cost: float = Field(ge=0, le=MOST_SUMMED)


class _Workload(BaseModel):
    model_config = ConfigDict(extra="ignore")
    maxFPGAs: int = Field(ge=0, le=MOST_PLACED)
    maxCPUs: int = Field(ge=0, le=MOST_PLACED)
    maxSizePerFPGA: float = Field(ge=0)
    nodes: list[_Node] = Field(min_length=1)
    edges: list[_Edge]


@dataclass(frozen=True, slots=True)
class WorkloadNode:
    """A node to place: its times on an accelerator and on a core, bytes, and the class it shares a device with."""

    id: int | str
    acc: float
    cpu: float
    size: float
    colour: Hashable
    supported: bool = True
    backward: bool = False


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
    node_ids: tuple[int | str, ...]
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
    position = {key: place for place, key in enumerate(order)}
    by_id = {node.id: node for node in raw.nodes}
    nodes = [WorkloadNode(key, node.fpgaLatency, node.cpuLatency, node.size,
                          ("node", key) if node.colorClass is None else ("class", node.colorClass),
                          node.supportedOnFpga,
                          node.isBackwardNode) for key, node in ((key, by_id[key]) for key in order)]
    values = [(position[key], sorted(position[reader] for reader in graph.successors(key)), cost[key])
              for key in order if graph.out_degree(key)]
    return contract_classes(path.stem, (raw.maxFPGAs, raw.maxCPUs, raw.maxSizePerFPGA), nodes, values)


def contract_classes(name: str, devices: tuple[int, int, float], nodes: Sequence[WorkloadNode],
                     values: Sequence[tuple[int, Sequence[int], float]]) -> PlaceInstance:
    """The instance of nodes in topological order.

    Args:
        name: for messages.
        devices: accelerators, cores, and the memory of an accelerator.
        nodes: in topological order.
        values: (position of the source, positions of the readers, time to move it at either end).
    """
    numbers: dict[Hashable, int] = {}
    class_of = [numbers.setdefault(node.colour, len(numbers)) for node in nodes]
    sums = np.zeros((3, len(numbers)))
    supported = np.ones(len(numbers), dtype=bool)
    for node, c in zip(nodes, class_of, strict=True):
        sums[:, c] += (node.acc, node.cpu, node.size)
        supported[c] &= node.supported
    node_cost = np.zeros(len(nodes))
    merged: dict[tuple[int, tuple[int, ...]], float] = {}
    for source, reading, cost in values:
        node_cost[source] += cost
        readers = tuple(sorted({class_of[reader] for reader in reading} - {class_of[source]}))
        if readers and cost > 0:
            merged[class_of[source], readers] = merged.get((class_of[source], readers), 0.0) + cost
    edges = sorted({(source, reader) for source, reading, _ in values for reader in reading})
    return PlaceInstance(
        name, *devices, tuple(node.id for node in nodes), np.array(class_of), np.array([node.acc for node in nodes]),
        np.array([node.cpu for node in nodes]), node_cost, np.array([node.backward for node in nodes]),
        np.array(edges, dtype=np.int64).reshape(-1, 2), sums[0], sums[1], sums[2], supported,
        np.array([source for source, _ in merged], dtype=np.int64), np.array(list(merged.values())),
        np.cumsum([0, *(len(readers) for _, readers in merged)]).astype(np.int64),
        np.array([reader for _, readers in merged for reader in readers], dtype=np.int64))
