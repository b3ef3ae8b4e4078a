"""From a verb's files and options to a `PlanningProblem`: shared by ``plan`` and ``compare``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mipipe.cli.files import open_any, positive
from mipipe.graphs.cluster import Cluster, load_cluster
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.costs.exchange import slowest_link
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import load, load_data
from mipipe.graphs.topology import Topology
from mipipe.graphs.units import parse_bytes
from mipipe.planner.experts.files import read_loads
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.expert_loads import with_expert_loads
from mipipe.planner.problems.from_graph import build_problem


def read_problem(graph: Path, cluster: Path | None, microbatches: int | None, *, groups: int | None = None,
                 granularity: str | None = None, costs: Path | None = None, memory: str | None = None,
                 experts: Path | None = None, sizes: Path | None = None, activations: str | None = None,
                 **details: Any) -> PlanningProblem:
    """The problem of a graph on a cluster, or a problem file as it is (with ``memory`` and microbatches changed).

    Raises:
        InputError: a file is not what it should be, an option is missing or does not apply.
    """
    positive(microbatches, "--microbatches")
    positive(groups, "--groups")
    source = open_any(graph, OperatorGraph, CoarseGraph, PlanningProblem)
    if isinstance(source, PlanningProblem):
        for option, value in (("--experts", experts), ("--sizes", sizes)):
            if value is not None:
                raise InputError(f"{graph} is a whole planning problem: {option} does not apply to it")
        return with_activations(_changed(source, graph, cluster, costs, groups, microbatches, memory), activations)
    if cluster is None:
        raise InputError(f"{graph}: an operator graph needs --cluster CLUSTER.yaml, which describes the devices")
    if microbatches is None:
        raise InputError(f"{graph}: an operator graph needs --microbatches, the number of microbatches of one step")
    described = load_cluster(cluster)
    table = None if costs is None else load(costs, CostTable)
    if isinstance(source, CoarseGraph):
        if table is None:
            raise InputError(f"{graph}: a coarse graph needs --costs; estimates are made from an operator graph")
        coarse = source
    else:
        coarse = coarse_for(source, table, groups, granularity)
        table = table or _estimate(coarse, source, described, cluster)
    if experts is not None:
        table = with_expert_loads(table, coarse, read_loads(experts))
    topology = with_memory(described.topology, memory)
    if sizes is not None:
        details["loads"] = read_sizes(sizes, microbatches)
    problem = build_problem(coarse, table, topology, num_microbatches=microbatches, **details)
    return with_activations(problem, activations)


def with_activations(problem: PlanningProblem, limit: str | None) -> PlanningProblem:
    """The problem with a limit on every device's activations (a size such as 20GB), unchanged for None."""
    if limit is None:
        return problem
    size = parse_bytes(limit, "--activations")
    return problem.replace(limits=dataclasses.replace(problem.limits, activation_bytes=size))


def read_sizes(path: Path, microbatches: int) -> dict[str, list[float]]:
    """Relative sizes of the microbatches by modality branch or group name, from a YAML file.

    Raises:
        InputError: not such a mapping, or not one number for every microbatch.
    """
    data = load_data(path)
    for name, found in data.items():
        if not isinstance(found, list) or not all(isinstance(size, int | float) for size in found):
            raise InputError(f"{path}: {name}: found {found!r}, expected a list of numbers, one for each microbatch")
        if len(found) != microbatches:
            raise InputError(f"{path}: {name}: has {len(found)} sizes, expected one for each of the {microbatches}"
                             " microbatches")
    return {str(name): [float(size) for size in found] for name, found in data.items()}


def with_memory(topology: Topology, memory: str | None) -> Topology:
    """The topology with every device's memory set to ``memory`` (a size such as 80GB), unchanged for None."""
    if memory is None:
        return topology
    size = parse_bytes(memory, "--memory")
    return dataclasses.replace(
        topology, devices=tuple(dataclasses.replace(device, memory_bytes=size) for device in topology.devices))


def coarse_for(graph: OperatorGraph, table: CostTable | None, groups: int | None = None,
               granularity: str | None = None) -> CoarseGraph:
    """The graph in groups: as asked, or as the cost table was made."""
    if groups is None and granularity is None and table is not None:
        noted = table.notes.get("groups")
        groups = int(noted) if noted else None
        granularity = table.notes.get("granularity")
    return coarsen(graph, num_groups=groups, granularity=granularity)  # type: ignore[arg-type]


def _estimate(coarse: CoarseGraph, graph: OperatorGraph, described: Cluster, cluster: Path) -> CostTable:
    unknown = sorted({device.kind for device in described.topology.devices
                      if not described.kinds[device.kind].has_peaks})
    if unknown:
        raise InputError(f"{cluster}: device kind {unknown[0]!r} has no peak rates to estimate costs from; run"
                         " `mipipe profile` on it and give its file as --costs")
    kinds = {device.kind: described.kinds[device.kind] for device in described.topology.devices}
    return roofline(coarse, graph, kinds, link=slowest_link(described.topology))


def _changed(problem: PlanningProblem, path: Path, cluster: Path | None, costs: Path | None, groups: int | None,
             microbatches: int | None, memory: str | None) -> PlanningProblem:
    for option, value in (("--cluster", cluster), ("--costs", costs), ("--groups", groups)):
        if value is not None:
            raise InputError(f"{path} is a whole planning problem: {option} does not apply to it")
    if memory is not None:
        problem = problem.replace(topology=with_memory(problem.topology, memory))
    return problem if microbatches is None else problem.replace(num_microbatches=microbatches)
