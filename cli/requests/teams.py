"""``mipipe plan`` for teams: degrees given in full are evaluated, others are searched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mipipe.cli.printing.output import emit, progress, stdout
from mipipe.cli.printing.teams import print_runners, print_team, team_data
from mipipe.cli.requests.captured import captured, names_model, refuse_capture_options
from mipipe.cli.requests.files import check_positive, open_any, read_size
from mipipe.cli.requests.team_request import TeamRequest
from mipipe.graphs.cluster import Cluster, load_cluster, uniform_cluster
from mipipe.graphs.costs.collectives import fabric_of
from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.efficiency import LowDtype
from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import digest, load, load_data, save
from mipipe.graphs.units import format_bytes
from mipipe.planner.problems.from_graph import STATE_BYTES
from mipipe.planner.problems.from_layers import LayerTimes, entry_of, read_layer_times
from mipipe.planner.problems.on_cluster import OptimizerChoice, graph_dtype
from mipipe.planner.schedules import baseline_named
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.outside import otherwise, outside, undivided
from mipipe.planner.teams.prices.degrees import RECOMPUTE, Degrees, completed, parse_degrees
from mipipe.planner.teams.prices.machine import Machine, check_machine
from mipipe.planner.teams.prices.misfit import indivisible_of
from mipipe.planner.teams.prices.pieces import ModelPieces, model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.prices.profiled import profiled_layers
from mipipe.planner.teams.refusal import refusal
from mipipe.planner.teams.remedies import remedy

PRICED = ("tensor", "sequence", "batch")
"""Modes that a branch may have to itself along the tensor axis."""
UNIFORM = "uniform"
"""The value of ``--modes`` by which all branches have one mode."""
Capture = Callable[[int], tuple[OperatorGraph, str]]
"""A model captured with so many sequences a microbatch, and a line on what was assumed."""
LOW: dict[str, LowDtype] = {"fp8": "float8", "float8": "float8", "fp4": "float4", "float4": "float4"}
"""Values of ``--dtype`` by which products run in fewer bits than parameters have."""


def plan_teams(graph: str, request: TeamRequest, *, cluster: Path | None, memory: str | None, seq: int | None,
               dtype: str | None, settings: list[str], use_cache: bool, save_graph: Path | None, output: Path | None,
               optimizer: OptimizerChoice, time_limit: float, seed: int, draw: Callable[[TeamResult], None],
               json_output: bool) -> None:
    """Plan or evaluate, and print."""
    global_batch = _batch_of(request)
    described = _cluster(request, cluster, memory)
    given = {} if request.degrees is None else parse_degrees(request.degrees)
    layers = None if request.layers is None else _layers(request.layers)
    if optimizer != "auto" and optimizer not in STATE_BYTES:
        raise InputError(f"--optimizer {optimizer}: expected one of auto, {', '.join(STATE_BYTES)}")
    if request.schedule is not None:
        baseline_named(request.schedule)

    if not names_model(graph):
        refuse_capture_options(graph, seq=seq, dtype=None if dtype in LOW else dtype, set=settings,
                               **{"save-graph": save_graph, "no-cache": not use_cache})

    def capture(microbatch: int) -> tuple[OperatorGraph, str]:
        found, note = captured(graph, seq=seq, batch=microbatch, dtype=None if dtype in LOW else dtype,
                               settings=settings, use_cache=use_cache)
        return found.graph, note

    model, note = _graph(graph, capture)
    by_branch = None if request.modes is None else parse_modes(request.modes, model)
    pieces = model_pieces(model, by_branch)
    if request.recomputation not in (None, *pieces.recompute):
        raise InputError(f"--recomputation {request.recomputation}: {model.model} makes no queries, keys and values of"
                         f" latents; expected one of {', '.join(pieces.recompute)}")
    machine = _machine(described, str(cluster), model, dtype, request, optimizer)
    devices = described.topology.num_devices
    sizes = [given.get("tensor", given.get("sequence", 1)),
             *(given.get(name, 1) for name in ("ranks", "context", "copies"))]
    told = request.schedule, layers, request.layer_times
    options = TeamOptions(given, request.microbatch, request.recomputation, time_limit, seed)
    full = any(value is not None for value in told) or (bool(given) and math.prod(sizes) == devices)
    console = stdout()
    if request.held and not full:
        raise InputError("--held is for a configuration given in full (--schedule 1f1b and all degrees)")
    if full:
        again = request.recomputation or "none"
        degrees = completed(given, devices, request.microbatch or 1, again)
        if by_branch and degrees.tensor == 1:
            raise InputError(f"--modes: there is no tensor axis ({degrees.text()}); add tensor=N or sequence=N to"
                             " --degrees")
        if not request.scatter and (degrees.tensor == 1 or degrees.ranks == 1):
            raise InputError(f"--no-scatter is of tensor members that send to the next rank; {degrees.text()} has none")
        pricer = Pricer(pieces, machine, _measured(request, degrees, pieces))
        result = evaluate_teams(pricer, degrees, global_batch, layers=layers, held=request.held,
                                schedule=request.schedule or ("interleaved" if degrees.chunks > 1 else "1F1B"))
        found = None
    else:
        from mipipe.planner.teams.search import search_teams

        pricer = Pricer(pieces, machine)
        with progress("planning") as update:
            found = search_teams(pricer, devices, global_batch, options, update)
        result = found.best
    if result.shortage:
        raise InfeasibleError(_too_little(pricer, result))
    microbatch, to_capture = result.degrees.microbatch, names_model(graph)
    if output is not None or save_graph is not None:
        if to_capture and microbatch != pieces.sequences:
            model = capture(microbatch)[0]
        to_capture = False
        if save_graph is not None:
            save(model, save_graph)
        if output is not None:
            from mipipe.planner.teams.again import TeamTask, with_task

            problem = result.plan.problem.replace(graph_digest=digest(model))
            save(with_task(dataclasses.replace(result.plan, problem=problem),
                           TeamTask(machine, options, by_branch)), output)
    draw(result)
    whole = [*indivisible_of(pricer.model, result.degrees), *undivided(pricer, result.degrees)]
    beyond, other = outside(pricer, result.degrees), otherwise(pricer, result.degrees)
    refused = None if result.plan.team is None else refusal(result.plan.team, model, microbatch if to_capture else None)
    if json_output:
        emit(team_data(result) | {"refused": refused, "outside": beyond, "priced_otherwise": other,
                                  "whole_on_every_member": whole}
             | ({} if found is None else found.data(team_data)))
        return
    if note:
        console.print(note, soft_wrap=True, markup=False)
    print_team(console, result, "evaluated as given" if found is None else found.how(), refused)
    _print_notes(console, whole, beyond, other)
    if found is not None:
        print_runners(console, found)
    if output is not None:
        console.print(f"wrote {output}")


def _batch_of(request: TeamRequest) -> int:
    """The sequences of one step, of a request whose numbers and names are checked."""
    for value, option in ((request.devices, "--devices"), (request.global_batch, "--global-batch"),
                          (request.microbatch, "--microbatch")):
        check_positive(value, option)
    if request.global_batch is None:
        raise InputError("plan: teams need --global-batch, the sequences of one step over all copies")
    if request.recomputation not in (None, *RECOMPUTE):
        raise InputError(f"--recomputation {request.recomputation}: expected one of {', '.join(RECOMPUTE)}")
    return request.global_batch


def _machine(described: Cluster, where: str, model: OperatorGraph, dtype: str | None, request: TeamRequest,
             optimizer: OptimizerChoice) -> Machine:
    """The devices that teams are made of, and how they run the model."""
    kinds = {device.kind for device in described.topology.devices}
    if len(kinds) > 1:
        raise InputError(f"{where}: teams are planned on equal devices, but there are {', '.join(sorted(kinds))}")
    machine = Machine(described.kinds[next(iter(kinds))], fabric_of(described.topology),
                      min(device.memory_bytes for device in described.topology.devices), graph_dtype(model),
                      LOW.get(dtype or ""), not request.eager, scatter=request.scatter,
                      optimizer=None if optimizer == "auto" else optimizer)
    check_machine(machine)
    return machine


def _print_notes(console: Console, whole: Sequence[str], beyond: Sequence[str], other: Sequence[str]) -> None:
    """What a reader of the figures should know: what no member shares, what was not validated, what runs otherwise."""
    for line in whole:
        console.print(f"whole on every member: {line}", soft_wrap=True, markup=False)
    for line in beyond:
        console.print(f"warning: outside what was validated: {line}", soft_wrap=True, markup=False)
    for line in other:
        console.print(f"priced otherwise than it runs: {line}", soft_wrap=True, markup=False)


def _measured(request: TeamRequest, degrees: Degrees, model: ModelPieces) -> tuple[LayerTimes, ...] | None:
    """The measured times of layers of a configuration, where a table was given."""
    if request.layer_times is None:
        return None
    if degrees.recompute != "none":
        raise InputError(f"--recomputation {degrees.recompute}: measured times of layers have it in their backward or"
                         " not; leave it out")
    path = Path(request.layer_times)
    if load_data(path).get("format") == CostTable.FORMAT:
        return profiled_layers(load(path, CostTable), model, degrees, str(path), request.layer_entry)
    name, device = entry_of(path, request.layer_entry)
    return read_layer_times(path, name, device, degrees.microbatch, degrees.tensor)


def _cluster(request: TeamRequest, cluster: Path | None, memory: str | None) -> Cluster:
    size = None if memory is None else read_size(memory, "--memory")
    if cluster is None:
        if request.devices is None or request.kind is None:
            raise InputError("plan: teams need --cluster CLUSTER.yaml, or --devices with --kind (and --per-host)")
        return uniform_cluster(request.kind, request.devices, request.per_host, size)
    found = load_cluster(cluster)
    if size is None:
        return found
    topology = dataclasses.replace(found.topology, devices=tuple(dataclasses.replace(device, memory_bytes=size)
                                                                 for device in found.topology.devices))
    return dataclasses.replace(found, topology=topology)


def parse_modes(text: str, model: OperatorGraph) -> dict[str, str]:
    """``"vision=batch"`` as a mapping from branches of the model to modes; ``"uniform"``: none has its own.

    Raises:
        InputError: no such branch, or no mode of the tensor axis.
    """
    branches = sorted({segment.tags.branch for segment in model.segments} - {None}, key=str)
    found: dict[str, str] = {}
    for part in text.split(",") if text != UNIFORM else ():
        branch, equals, mode = part.strip().partition("=")
        if not equals or mode not in PRICED:
            raise InputError(f"--modes {part.strip()}: expected branch=mode with a mode of {', '.join(PRICED)}, such as"
                             f" vision=batch, or {UNIFORM}"
                             + ("; --degrees expert= divides experts" if mode == "expert" else ""))
        if branch not in branches:
            raise InputError(f"--modes {part.strip()}: {model.model} has "
                             + (f"the branches {', '.join(map(str, branches))}" if branches else "no branches"))
        if branch in found:
            raise InputError(f"--modes: {branch} is given twice")
        found[branch] = mode
    return found


def _graph(graph: str, capture: Capture) -> tuple[OperatorGraph, str]:
    """The operator graph of a file, or of a model captured with one sequence a microbatch."""
    return capture(1) if names_model(graph) else (open_any(Path(graph), OperatorGraph), "")


def _layers(text: str) -> tuple[int, ...]:
    """``9,9,8`` or ``9x7,8``: layers of every stage."""
    found: list[int] = []
    for part in text.split(","):
        size, times, count = part.strip().partition("x")
        if not size.isdecimal() or (times and not count.isdecimal()) or max(len(size), len(count)) > 4:
            raise InputError(f"--layers-per-stage {part.strip()!r}: expected numbers such as 9,9,8 or 9x7,8")
        found += [int(size)] * (int(count) if times else 1)
    return tuple(found)


def _too_little(pricer: Pricer, result: TeamResult) -> str:
    """The one line of a configuration that does not fit, with the change that would make it."""
    rank, item = max(enumerate(result.memory), key=lambda pair: pair[1].peak - pair[1].capacity)
    parts: dict[str, Any] = {"weights": item.weights, "gradients": item.gradients, "optimizer": item.state,
                             "activations": item.activations}
    split = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return (f"no plan exists: rank {rank} needs {format_bytes(item.peak)} of {format_bytes(item.capacity)} ({split});"
            f" {remedy(pricer, result)}")
