"""From a graph and a cluster to a plan: `problem`, `plan`, `compare`, and looking at what was found. None needs torch.

A solve that finds no plan is a result without one, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mipipe.files import PathLike, load, load_cluster, size_of, value_of

if TYPE_CHECKING:
    from mipipe.graphs.cluster import Cluster
    from mipipe.graphs.coarse.coarsen import GroupGranularity
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.topology import Topology
    from mipipe.planner.comparison_rows import ComparisonRow
    from mipipe.planner.experts.balance.maps import ExpertLoads
    from mipipe.planner.options import Objective, Part, PlacementName
    from mipipe.planner.plan import Plan
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.problems.on_cluster import ModelFacts, OptimizerChoice
    from mipipe.planner.program import Program
    from mipipe.planner.solve import Progress, SolveResult
    from mipipe.planner.timeline import Timeline


def problem(model: OperatorGraph | CoarseGraph | PathLike, cluster: Cluster | Topology | PathLike, *,
            microbatches: int, costs: CostTable | PathLike | None = None, groups: int | None = None,
            granularity: GroupGranularity | None = None, memory: int | str | None = None,
            activations: int | str | None = None, optimizer: OptimizerChoice = "auto", recompute: bool = False,
            expert_loads: ExpertLoads | None = None,
            sizes: Mapping[str, Sequence[float]] | None = None) -> PlanningProblem:
    """The planning problem of a model on a cluster; arguments as for `plan`."""
    return _problem(model, cluster, microbatches, costs=costs, groups=groups, granularity=granularity, memory=memory,
                    activations=activations, optimizer=optimizer, recompute=recompute, expert_loads=expert_loads,
                    sizes=sizes)[0]


def plan(model: OperatorGraph | CoarseGraph | PlanningProblem | PathLike,
         cluster: Cluster | Topology | PathLike | None = None, *, microbatches: int | None = None,
         costs: CostTable | PathLike | None = None, groups: int | None = None,
         granularity: GroupGranularity | None = None,
         memory: int | str | None = None, activations: int | str | None = None, optimizer: OptimizerChoice = "auto",
         expert_loads: ExpertLoads | None = None, sizes: Mapping[str, Sequence[float]] | None = None,
         placement: PlacementName = "free", objective: Objective = "makespan", recompute: bool = False,
         exportable: bool = False, exact: bool = False, without: Sequence[Part] = (),
         time_limit_s: float = 60.0, seed: int = 0,
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
        objective: ``makespan``; ``memory`` or ``utilisation`` within 5 % of the best makespan; ``period``, the time
            from step to step without a barrier.
        recompute: let groups run their forward twice to save memory.
        exportable: only plans that torch's schedule runtime can run (`mipipe.planner.torch_csv`).
        exact: placement and order by the literal MIP, to the proof: small problems (`mipipe.planner.ladder.exactly`).
        without: what is switched off: ``mip`` (HiGHS), ``search`` (annealing), ``published`` (their starts).
        on_progress: called now and then; Ctrl-C ends the solve with the best plan so far.

    Raises:
        InputError, ProblemError: an argument is wrong. That no plan exists is a result, with its ``reason``.
    """
    import dataclasses

    from mipipe.graphs.errors import InputError
    from mipipe.graphs.serialize import to_data
    from mipipe.planner.exportable import plan_exportable
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.options import without as parts_off
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.solve import plan as solve

    options = PlanOptions(time_limit_s=time_limit_s, seed=seed, placement=placement, objective=objective,
                          recompute=recompute, exact=exact, **parts_off(without))
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
            without: Sequence[Part] = (), chunks: int = 2,
            on_progress: Callable[[str], None] | None = None) -> list[ComparisonRow]:
    """Published schedules and our plan on one problem, each row with makespan, bubble and memory.

    Args:
        problem: what to plan (`uniform_problem` makes abstract ones), or a plan for its problem.
        schedules: names of rows, such as ``["1F1B", "ZB-V", "mipipe"]``; None: all.
        time_limit_s: for all rows together.
        without: parts the planned row does without, as of `plan`.
        chunks: stages per rank of interleaved 1F1B.

    Raises:
        InputError: an unknown name.
    """
    from mipipe.planner.compare import compare as compare_schedules
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.options import without as parts_off
    from mipipe.planner.plan import Plan

    found = load(problem) if isinstance(problem, (str, Path)) else problem
    given = found.problem if isinstance(found, Plan) else cast("PlanningProblem", found)
    options = PlanOptions(time_limit_s=time_limit_s, seed=seed, placement=placement,
                          **parts_off(without))  # type: ignore[arg-type]
    return compare_schedules(given, schedules, options, on_progress, chunks)


def simulate(plan: Plan | PathLike, program: Program | None = None) -> Timeline:
    """The timeline of a plan's program (lowered from it where none is given), with the durations of its problem."""
    from mipipe.planner.execution.lower import lower
    from mipipe.planner.execution.simulate import simulate as run_on_a_clock
    from mipipe.planner.plan import Plan

    found = value_of(plan, Plan)
    return run_on_a_clock(found, program or lower(found))


def check(plan: Plan | PathLike, program: Program | None = None) -> None:
    """Check a plan and its program with code that shares nothing with the planner: order, deadlock, memory, makespan.

    Raises:
        PlanError: the first rule that is violated, with its place.
    """
    from mipipe.planner.check import check_plan, check_program
    from mipipe.planner.execution.lower import lower
    from mipipe.planner.plan import Plan

    found = value_of(plan, Plan)
    check_plan(found)
    check_program(found, program or lower(found))


def show(found: Plan | Timeline | PathLike, *, html: PathLike | None = None) -> None:
    """Print a plan or a timeline as ``mipipe show`` draws it; ``html``: write the page with zoom and memory instead."""
    from mipipe.cli.printing import html as pages
    from mipipe.cli.printing import panels
    from mipipe.cli.printing.output import stdout
    from mipipe.cli.printing.report import print_plan, print_timeline, report_tiles
    from mipipe.planner.plan import Plan

    item = load(found) if isinstance(found, (str, Path)) else found
    timeline = simulate(item) if isinstance(item, Plan) else item
    if html is not None:
        plan = item if isinstance(item, Plan) else None
        pages.write(html, plan.name if plan else timeline.origin, [panels.panel_of(timeline.origin, timeline, plan)],
                    report_tiles(plan, timeline) if plan else ())
    elif isinstance(item, Plan):
        print_plan(stdout(), item, timeline)
    else:
        print_timeline(stdout(), timeline)


def _problem(model: OperatorGraph | CoarseGraph | PathLike, cluster: Cluster | Topology | PathLike, microbatches: int,
             *, costs: CostTable | PathLike | None, memory: int | str | None, activations: int | str | None,
             **options: Any) -> tuple[PlanningProblem, ModelFacts]:
    from mipipe.graphs.cluster import Cluster, DeviceKind, shipped_kinds
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.errors import InputError
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.topology import Topology
    from mipipe.planner.problems.on_cluster import model_problem

    if isinstance(model, (str, Path)) and Path(model).is_dir():
        raise InputError(f"{model}: is a folder, expected a graph or its file: mipipe.capture({str(model)!r}, seq=...)"
                         " makes one of a model")
    found = model if isinstance(model, (OperatorGraph, CoarseGraph)) else load(model)
    if isinstance(cluster, Topology):
        known = shipped_kinds()
        devices = {device.kind: known.get(device.kind) or DeviceKind(device.kind, {}, None, None, 0, "given")
                   for device in cluster.devices}
        described = Cluster(cluster, devices)
    else:
        described = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    table = None if costs is None else value_of(costs, CostTable)
    return model_problem(found, described, microbatches, costs=table, memory_bytes=size_of(memory, "memory"),
                         activation_bytes=size_of(activations, "activations"), **options)
