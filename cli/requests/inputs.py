"""From a verb's files and options to a `PlanningProblem`: shared by ``plan`` and ``compare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mipipe.cli.requests.files import check_positive, open_any, read_size
from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import load, load_data
from mipipe.planner.device_memory import with_memory
from mipipe.planner.experts.files import read_loads
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.on_cluster import ModelFacts, model_problem

MICROBATCHES_PER_RANK = 4
"""Microbatches of a step, by rank, where a model is planned and no number is given: warm-up then weighs little."""


def read_problem(graph: Path | OperatorGraph, cluster: Path | None, microbatches: int | None, *,
                 groups: int | None = None, granularity: str | None = None, costs: Path | None = None,
                 memory: str | None = None, experts: Path | None = None, sizes: Path | None = None,
                 activations: str | None = None, **details: Any) -> tuple[PlanningProblem, ModelFacts | None]:
    """The problem of a graph on a cluster, or a problem file as it is (with ``memory`` and microbatches changed).

    Args:
        graph: a file; or the graph of a model that was captured for this call, which may leave ``microbatches`` out.
        details: ``optimizer`` and ``recompute``, as for `model_problem`.

    Raises:
        InputError: a file is not what it should be, an option is missing or does not apply.
    """
    check_positive(microbatches, "--microbatches")
    check_positive(groups, "--groups")
    size, limit = (None if text is None else read_size(text, option)
                   for text, option in ((memory, "--memory"), (activations, "--activations")))
    source = graph if isinstance(graph, OperatorGraph) else open_any(graph, OperatorGraph, CoarseGraph, PlanningProblem)
    if isinstance(source, PlanningProblem):
        for option, value in (("--experts", experts), ("--sizes", sizes), ("--cluster", cluster), ("--costs", costs),
                              ("--groups", groups), ("--granularity", granularity),
                              ("--optimizer", details.get("optimizer", "auto") != "auto" or None)):
            if value is not None:
                raise InputError(f"{graph} is a whole planning problem: {option} does not apply to it")
        return _changed(source, microbatches, size, limit), None
    if isinstance(source, CoarseGraph) and (groups is not None or granularity is not None):
        raise InputError(f"{graph}: has its groups already: --{'groups' if granularity is None else 'granularity'} does"
                         " not apply to it")
    named = source.model if isinstance(graph, OperatorGraph) else graph
    if cluster is None:
        raise InputError(f"{named}: an operator graph needs --cluster CLUSTER.yaml, which describes the devices")
    described = load_cluster(cluster)
    if microbatches is None and not isinstance(graph, OperatorGraph):
        raise InputError(f"{named}: an operator graph needs --microbatches, the number of microbatches of one step")
    count = microbatches or MICROBATCHES_PER_RANK * described.topology.num_devices
    if isinstance(source, CoarseGraph) and costs is None:
        raise InputError(f"{named}: a coarse graph needs --costs; estimates are made from an operator graph")
    return model_problem(source, described, count, groups=groups, granularity=granularity,
                         costs=None if costs is None else load(costs, CostTable), memory_bytes=size,
                         activation_bytes=limit, expert_loads=None if experts is None else read_loads(experts),
                         sizes=None if sizes is None else read_sizes(sizes, count), where=str(cluster), **details)


def check_cluster(model: str, cluster: Path | None, costs: Path | None, options: Mapping[str, object]) -> None:
    """Raise before a capture, which takes a while, for what would be wrong after it; ``options``: of the capture."""
    if cluster is None:
        raise InputError(f"{model}: planning a model needs --cluster CLUSTER.yaml, which describes the devices")
    unknown = [kind.name for kind in load_cluster(cluster).kinds.values() if not kind.has_peaks]
    if unknown and costs is None:
        given = "".join(f" --{name} {value}" for name, value in options.items() if value is not None)
        raise InputError(f"{cluster}: device kind {unknown[0]!r} has no peak rates to estimate costs from: run `mipipe"
                         f" capture {model}{given} -o graph.json` and, on it, `mipipe profile graph.json -o"
                         " costs.json`; then plan with --costs costs.json")


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


def _changed(problem: PlanningProblem, microbatches: int | None, memory_bytes: int | None,
             activation_bytes: int | None) -> PlanningProblem:
    """The problem of a file with what the command line says of it."""
    if memory_bytes is not None:
        problem = problem.replace(topology=with_memory(problem.topology, memory_bytes))
    if activation_bytes is not None:
        problem = problem.replace(limits=dataclasses.replace(problem.limits, activation_bytes=activation_bytes))
    return problem if microbatches is None else problem.replace(num_microbatches=microbatches)
