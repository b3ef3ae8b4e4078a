"""mipipe as a library: one function for each verb of the command line, on values in place of files.

Whatever takes a graph, a cluster, costs or a plan takes the value or the path of its file. Errors are `MipipeError`s
with the line that the command line would print. A solve that finds no plan is a result without one, not an error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mipipe.graphs.capture.labels import Granularity as CaptureGranularity
    from mipipe.graphs.cluster import Cluster
    from mipipe.graphs.coarse.coarsen import Granularity
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.merging.recipe import MergeRecipe
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.serialize import Saved
    from mipipe.graphs.topology import Topology
    from mipipe.planner.compare import Row
    from mipipe.planner.experts.maps import ExpertLoads
    from mipipe.planner.options import Objective, PlacementName
    from mipipe.planner.plan import Plan
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.problems.on_cluster import ModelFacts, OptimizerChoice
    from mipipe.planner.program import Program
    from mipipe.planner.solve import Progress, SolveResult
    from mipipe.planner.timeline import Timeline
    from mipipe.runtime.merge.launch import MergeResult
    from mipipe.runtime.train.config import TrainConfig
    from mipipe.runtime.train.launch import TrainResult

T = TypeVar("T")
PathLike = str | Path


def capture(model: PathLike | nn.Module, inputs: Mapping[str, Any] | None = None, *, seq: int = 128, batch: int = 1,
            dtype: str = "float32", loss: Callable[[Any, Mapping[str, Tensor]], Any] | None = None,
            loss_info: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None,
            images: int = 1, image: int = 0, frames: int = 0, expert_groups: int = 1, expert_parallel: int = 1,
            freeze: Sequence[str] = (), granularity: CaptureGranularity = "block", name: str | None = None,
            on_progress: Callable[[str], None] | None = None) -> OperatorGraph:
    """The operator graph of a model's training step: forward, input gradient and weight gradient.

    Args:
        model: a module with ``inputs``, example tensors of one microbatch by forward argument; or what names a model:
            a folder with a transformers ``config.json``, ``package.module:factory``, a ``.pt2`` program.
        seq, batch, dtype, overrides, images, image, frames, expert_groups, expert_parallel, freeze: of a named model,
            as for ``mipipe capture``; no weights are made.
        loss: of a module that does not return its scalar loss: ``loss(outputs, inputs)``.
        loss_info: how that loss is normalised (`mipipe.graphs.sum_over`); by default a mean over microbatches.
        granularity: the smallest pieces that may be placed: layer, block, module or operator.
        name: of a module's graph; None: its class.

    Raises:
        InputError: the source does not give a model.
        GraphError: the model cannot be captured.
    """
    from mipipe.graphs.capture.model import capture as capture_source
    from mipipe.graphs.capture.model import capture_module
    from mipipe.graphs.errors import InputError

    if isinstance(model, (str, Path)):
        if inputs is not None or loss is not None:
            raise InputError(f"{model}: names a model, which has its own inputs and loss; give them with a module")
        return capture_source(model, seq=seq, batch=batch, dtype=dtype, overrides=overrides, images=images, image=image,
                              frames=frames, expert_groups=expert_groups, expert_parallel=expert_parallel,
                              freeze=freeze, granularity=granularity, progress=on_progress)
    if inputs is None:
        raise InputError(f"module {type(model).__name__}: capturing it needs inputs, example tensors of one microbatch"
                         " by forward argument")
    return capture_module(model, inputs, loss=loss, loss_info=loss_info, name=name, granularity=granularity,
                          progress=on_progress)


def profile(graph: OperatorGraph | PathLike, *, groups: int | None = None, granularity: Granularity | None = None,
            workers: int = 1, device: str = "cpu", seconds: float = 0.25, fresh: bool = False,
            on_progress: Callable[[int, int], None] | None = None) -> CostTable:
    """The measured cost of every group of a graph on this machine, for `plan`.

    Args:
        groups, granularity: merge operators into about so many groups, or by structure.
        workers: processes that compute at once, as they will in training.
        device: ``cpu`` or ``cuda``.
        seconds: measured for each distinct group.
        fresh: measure anew, without earlier results kept for this machine.

    Raises:
        InputError: no such device. RunError: a worker failed.
    """
    from mipipe.graphs.coarse.coarsen import coarsen
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.profiling.profile import DEFAULT_CACHE, ProfileOptions, profile_groups

    found = _value(graph, OperatorGraph)
    coarse = coarsen(found, num_groups=groups, granularity=granularity)
    return profile_groups(found, coarse, workers=workers, device=device, cache=None if fresh else DEFAULT_CACHE,
                          options=ProfileOptions(seconds=seconds), progress=on_progress)


def problem(model: OperatorGraph | CoarseGraph | PathLike, cluster: Cluster | Topology | PathLike, *,
            microbatches: int, costs: CostTable | PathLike | None = None, groups: int | None = None,
            granularity: Granularity | None = None, memory: int | str | None = None,
            activations: int | str | None = None, optimizer: OptimizerChoice = "auto", recompute: bool = False,
            expert_loads: ExpertLoads | None = None,
            sizes: Mapping[str, Sequence[float]] | None = None) -> PlanningProblem:
    """The planning problem of a model on a cluster; arguments as for `plan`."""
    return _problem(model, cluster, microbatches, costs=costs, groups=groups, granularity=granularity, memory=memory,
                    activations=activations, optimizer=optimizer, recompute=recompute, expert_loads=expert_loads,
                    sizes=sizes)[0]


def plan(model: OperatorGraph | CoarseGraph | PlanningProblem | PathLike,
         cluster: Cluster | Topology | PathLike | None = None, *, microbatches: int | None = None,
         costs: CostTable | PathLike | None = None, groups: int | None = None, granularity: Granularity | None = None,
         memory: int | str | None = None, activations: int | str | None = None, optimizer: OptimizerChoice = "auto",
         expert_loads: ExpertLoads | None = None, sizes: Mapping[str, Sequence[float]] | None = None,
         placement: PlacementName = "free", objective: Objective = "makespan", recompute: bool = False,
         exportable: bool = False, time_limit_s: float = 60.0, seed: int = 0,
         on_progress: Callable[[Progress], None] | None = None) -> SolveResult:
    """The best plan found for a training step within the time limit, with a bound that no plan can beat.

    Args:
        model: a graph with a cluster and ``microbatches``; or a whole planning problem, which has its own.
        cluster: devices and links: a cluster, the path of a cluster file, or a topology (then with ``costs``).
        microbatches: of one step.
        costs: measured costs; None: roofline estimates of the cluster's device kinds.
        groups, granularity: how operators are merged; neither: as ``costs`` were made, or by the size of the model.
        memory: of every device in place of the cluster's, as bytes or ``"80GB"``.
        activations: a limit on every device's activations, likewise.
        optimizer: what it keeps in memory; ``auto``: ``adamw_mixed`` for 16-bit models, else ``adamw``.
        expert_loads: expert groups take time by their tokens.
        sizes: relative sizes of the microbatches, by modality branch or group.
        placement: ``free``, or a fixed shape.
        objective: ``makespan``; ``memory`` or ``utilisation`` within 5 % of the best makespan.
        recompute: let groups run their forward twice to save memory.
        exportable: only plans that torch's schedule runtime can run (`mipipe.planner.torch_csv`).
        on_progress: called now and then; Ctrl-C ends the solve with the best plan so far.

    Raises:
        InputError, ProblemError: an argument is wrong. That no plan exists is a result, with its ``reason``.
    """
    import dataclasses

    from mipipe.graphs.errors import InputError
    from mipipe.graphs.serialize import to_data
    from mipipe.planner.exportable import plan_exportable
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.solve import plan as solve

    options = PlanOptions(time_limit_s=time_limit_s, seed=seed, placement=placement, objective=objective,
                          recompute=recompute)
    facts: ModelFacts | None = None
    if isinstance(model, PlanningProblem):
        if cluster is not None or microbatches is not None or costs is not None:
            raise InputError(f"problem {model.name}: has its own devices, microbatches and costs; leave them out, or"
                             " change it with problem.replace()")
        given = model
    else:
        if cluster is None or microbatches is None:
            raise InputError("plan: a graph needs a cluster and the number of microbatches of one step")
        given, facts = _problem(model, cluster, microbatches, costs=costs, groups=groups, granularity=granularity,
                                memory=memory, activations=activations, optimizer=optimizer, recompute=recompute,
                                expert_loads=expert_loads, sizes=sizes)
    if exportable:
        result, options = plan_exportable(given, options, on_progress)
    else:
        result = solve(given, options, on_progress)
    if result.plan is None:
        return result
    known = {"options": to_data(options)} | ({} if facts is None else {"model": to_data(facts)})
    return dataclasses.replace(result, plan=dataclasses.replace(
        result.plan, provenance={**result.plan.provenance, **known}))


def compare(problem: PlanningProblem | Plan | PathLike, schedules: Sequence[str] | None = None, *,
            time_limit_s: float = 30.0, placement: PlacementName = "free", seed: int = 0,
            on_progress: Callable[[str], None] | None = None) -> list[Row]:
    """Published schedules and our plan on one problem, each row with makespan, bubble and memory.

    Args:
        problem: what to plan (`uniform_problem` makes abstract ones), or a plan for its problem.
        schedules: names of rows, such as ``["1F1B", "ZB-V", "mipipe"]``; None: all.
        time_limit_s: for the planned row.

    Raises:
        InputError: an unknown name.
    """
    from mipipe.planner.compare import compare as compare_schedules
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.plan import Plan

    found = load(problem) if isinstance(problem, (str, Path)) else problem
    given = found.problem if isinstance(found, Plan) else cast("PlanningProblem", found)
    options = PlanOptions(time_limit_s=time_limit_s, seed=seed, placement=placement)
    return compare_schedules(given, schedules, options, on_progress)


def simulate(plan: Plan | PathLike, program: Program | None = None) -> Timeline:
    """The timeline of a plan's program (lowered from it where none is given), with the durations of its problem."""
    from mipipe.planner.execution.lower import lower
    from mipipe.planner.execution.simulate import simulate as run_on_a_clock
    from mipipe.planner.plan import Plan

    found = _value(plan, Plan)
    return run_on_a_clock(found, program or lower(found))


def check(plan: Plan | PathLike, program: Program | None = None) -> None:
    """Check a plan and its program with code that shares nothing with the planner: order, deadlock, memory, makespan.

    Raises:
        PlanError: the first rule that is violated, with its place.
    """
    from mipipe.planner.check import check_plan, check_program
    from mipipe.planner.execution.lower import lower
    from mipipe.planner.plan import Plan

    found = _value(plan, Plan)
    check_plan(found)
    check_program(found, program or lower(found))


def show(found: Plan | Timeline | PathLike, *, html: PathLike | None = None) -> None:
    """Print a plan or a timeline as ``mipipe show`` draws it; ``html``: write the page with zoom and memory instead."""
    from mipipe.cli import html as pages
    from mipipe.cli.output import stdout
    from mipipe.cli.report import facts, print_plan, print_timeline
    from mipipe.planner.plan import Plan

    item = load(found) if isinstance(found, (str, Path)) else found
    timeline = simulate(item) if isinstance(item, Plan) else item
    if html is not None:
        plan = item if isinstance(item, Plan) else None
        pages.write(html, plan.name if plan else timeline.origin, [pages.panel_of(timeline.origin, timeline, plan)],
                    facts(plan, timeline) if plan else ())
    elif isinstance(item, Plan):
        print_plan(stdout(), item, timeline)
    else:
        print_timeline(stdout(), timeline)


def train(plan: Plan | PathLike, graph: OperatorGraph | PathLike, config: TrainConfig | Mapping[str, Any] | PathLike, *,
          resume: bool = False, copies: int = 1, max_restarts: int = 0, timeout_s: float | None = None,
          progress: bool | None = None, torchrun: Sequence[str] = (), num_processes: int | None = None) -> TrainResult:
    """Train as the plan says, under torchrun with one worker for each rank, until done.

    Args:
        plan, graph: of the model; values are handed to the workers as files.
        config: the training configuration: a YAML file, or its content as a mapping (``{"steps": 100, ...}``).
        resume: continue from the newest checkpoint.
        copies: data-parallel copies of the plan.
        max_restarts: by torchrun, after a worker died.
        timeout_s: end the run after this time.
        progress: lines on stderr; by default where that is a terminal.
        torchrun, num_processes: flags for torchrun on several nodes, and the processes on this one.

    Raises:
        MipipeError: as the failing worker raised it.
    """
    from mipipe.graphs.serialize import save as write
    from mipipe.graphs.serialize import to_data, write_text
    from mipipe.runtime.train.launch import train as run

    with tempfile.TemporaryDirectory(prefix="mipipe-train-") as folder:
        files: list[PathLike] = []
        for name, value in (("plan.json", plan), ("graph.json", graph)):
            if isinstance(value, (str, Path)):
                files.append(value)
            else:
                write(value, Path(folder) / name)
                files.append(Path(folder) / name)
        if isinstance(config, (str, Path)):
            files.append(config)
        else:
            import json

            data = dict(config) if isinstance(config, Mapping) else to_data(config)
            data.setdefault("metrics", str(Path(folder) / "metrics.jsonl"))  # the result's records come from it
            write_text(Path(folder) / "train.json", json.dumps(data))
            files.append(Path(folder) / "train.json")
        return run(*files, resume=resume, max_restarts=max_restarts, copies=copies, timeout_s=timeout_s,
                   progress=progress, torchrun=torchrun, num_processes=num_processes)


def merge(recipe: PathLike | Mapping[str, Any] | MergeRecipe | Sequence[MergeRecipe], out: PathLike, *, ranks: int = 1,
          memory: int | str | None = None, dtype: str | None = None, device: Literal["cpu", "cuda"] = "cpu",
          shard: int | str = "5GB", on_progress: Callable[[int, int], None] | None = None) -> MergeResult:
    """Merge models as a recipe says, into a new folder.

    Args:
        recipe: a YAML file in mergekit's vocabulary, its content as a mapping, or recipes to run one after another.
        out: the folder to make.
        ranks: processes that merge side by side.
        memory: per rank beyond the bare process, as bytes or ``"4GB"``; None: no limit.
        dtype: of the result, in place of the recipe's.
        shard: largest file of the result.
        on_progress: called with (bytes done, bytes in all), where one rank runs.

    Raises:
        InputError: the recipe, a model or an option is wrong, or ``out`` exists.
        InfeasibleError: the memory is below what one tensor needs. RunError: a source is damaged, a rank died.
    """
    from mipipe.graphs.merging.recipe import MergeRecipe, parse_recipe
    from mipipe.graphs.units import parse_bytes
    from mipipe.runtime.merge.launch import MergeOptions
    from mipipe.runtime.merge.launch import merge as run

    options = MergeOptions(num_ranks=ranks, device=device, memory_cap=_size(memory, "memory"),
                           shard_bytes=parse_bytes(shard, "shard"), dtype=dtype)
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(dict(recipe), "recipe")
    return run([recipe] if isinstance(recipe, MergeRecipe) else recipe, out, options, on_progress)


@overload
def load(path: PathLike) -> Any: ...
@overload
def load(path: PathLike, kind: type[T]) -> T: ...


def load(path: PathLike, kind: Any = None) -> Any:
    """What a file of mipipe's holds: a graph, costs, a problem, a plan, a program or a timeline.

    ``kind`` (such as ``mipipe.Plan``) is what is expected; None takes any of them.

    Raises:
        InputError: unreadable, or another kind of file.
    """
    from mipipe.cli.files import open_any
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.planner.plan import Plan
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.program import Program
    from mipipe.planner.timeline import Timeline

    kinds = (OperatorGraph, CoarseGraph, CostTable, PlanningProblem, Plan, Program, Timeline)
    return open_any(Path(path), *(kinds if kind is None else (kind,)))


def save(value: Saved, path: PathLike) -> None:
    """Write a graph, costs, a problem, a plan, a program or a timeline to a file, whole or not at all."""
    from mipipe.graphs.serialize import save as write

    write(value, path)


def load_cluster(path: PathLike) -> Cluster:
    """The devices and links of a cluster file (YAML).

    Raises:
        InputError: unreadable, an unknown key, a wrong value.
    """
    from mipipe.graphs.cluster import load_cluster as read

    return read(path)


def _problem(model: OperatorGraph | CoarseGraph | PathLike, cluster: Cluster | Topology | PathLike, microbatches: int,
             *, costs: CostTable | PathLike | None, memory: int | str | None, activations: int | str | None,
             **options: Any) -> tuple[PlanningProblem, ModelFacts]:
    from mipipe.graphs.cluster import Cluster, DeviceKind, shipped_kinds
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.topology import Topology
    from mipipe.planner.problems.on_cluster import model_problem

    found = model if isinstance(model, (OperatorGraph, CoarseGraph)) else load(model)
    if isinstance(cluster, Topology):
        known = shipped_kinds()
        devices = {device.kind: known.get(device.kind) or DeviceKind(device.kind, {}, None, None, 0, "given")
                   for device in cluster.devices}
        described = Cluster(cluster, devices)
    else:
        described = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    table = None if costs is None else _value(costs, CostTable)
    return model_problem(found, described, microbatches, costs=table, memory_bytes=_size(memory, "memory"),
                         activation_bytes=_size(activations, "activations"), **options)


def _value(item: T | PathLike, kind: type[T]) -> T:
    """The value, or what its file holds."""
    return load(item, kind) if isinstance(item, (str, Path)) else item


def _size(text: int | str | None, where: str) -> int | None:
    from mipipe.graphs.units import parse_bytes

    return None if text is None else parse_bytes(text, where)
