"""``mipipe plan``: an operator graph and a cluster become a plan, with a bound on how good any plan could be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipipe.cli.printing.frontier import print_frontier
from mipipe.cli.printing.output import Html, Json, Seed, TimeLimit, Trace, Without, check_files, emit, stdout
from mipipe.graphs.errors import InputError

if TYPE_CHECKING:
    from mipipe.planner.plan import Plan

EXAMPLE = "mipipe plan examples/qwen3_moe_tiny --cluster examples/cluster_8xh100.yaml -o plan.json"

TEAMS_ONLY = ("per_host", "eager", "held", "scatter", "layer_entry")
"""Options of teams that alone do not ask for any."""
SINGLE_ONLY = ("microbatches", "groups", "granularity", "costs", "experts", "sizes", "activations", "batch",
               "exportable", "pareto", "recompute", "explain", "placement", "objective", "exact", "without", "branches")
"""Options of plans in which every rank is one device."""
NO_PLAN = ("output", "trace_file", "explain", "objective", "exact")
"""Options of one plan, which a frontier is not."""

_TEAMS = "Teams of devices (tensor, context, expert and data parallelism around the pipeline)"
_CAPTURE = "Models that are captured on the way (mipipe capture has more options)"


def plan(
    graph: Annotated[str, typer.Argument(metavar="GRAPH", help="An operator graph, a coarse graph, or a whole planning"
                                                              " problem (JSON or CSV); or a model, which is captured on"
                                                              " the way (as"
                                                              " for `mipipe capture`: a folder with a config.json,"
                                                              " package.module:factory, ...).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan to write.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="The cluster file (YAML): devices and links.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches of one training step (for a model: 4 for each"
                                                          " device where this is not given).")] = None,
    groups: Annotated[int | None, typer.Option(
        help="Merge operators into about this many groups (default: as in --costs, else as fine as 64 groups"
             " allow).")] = None,
    granularity: Annotated[str | None, typer.Option(help="Or merge by structure: layer, block, operator.")] = None,
    costs: Annotated[Path | None, typer.Option(
        help="Cost table from `mipipe profile` or `calibrate` (default: roofline estimates of the device"
             " kinds).")] = None,
    experts: Annotated[Path | None, typer.Option(help="Tokens per layer and expert (as for `mipipe experts --loads`):"
                                                      " expert groups take time by their tokens.")] = None,
    sizes: Annotated[Path | None, typer.Option(
        help="Relative sizes of the microbatches by modality branch (YAML, such as 'vision: [0, 3, 1, 4]' for the"
             " images in each).")] = None,
    activations: Annotated[str | None, typer.Option(help="Limit on every device's activations, such as 20GB.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of every device, such as 80GB, in place of what the"
                                                    " cluster's file or kind says.")] = None,
    optimizer: Annotated[str, typer.Option(help="What the optimizer keeps: none, sgd, momentum, adam, adamw,"
                                                " adamw_mixed (16-bit weights with float32 master weights and moments);"
                                                " auto: adamw_mixed for 16-bit models, else adamw.")] = "auto",
    placement: Annotated[str, typer.Option(help="free, or a fixed shape: chain, v, interleaved, wave, two-way,"
                                                " two-way-v, two-way-interleaved, twin-chain, twin-v, twin-wave (two"
                                                " copies side by side on half of the ranks), ring, ring-v; for models"
                                                " with encoders also apart (on ranks of their own) and colocated."
                                                )] = "free",
    objective: Annotated[str, typer.Option(help="makespan; memory (the least activations within 5 % of the"
                                                " makespan that a sixth of the time finds); utilisation (the busiest"
                                                " devices within 5 % of what a quarter finds: those that hardly help"
                                                " are given back); or period (the time from step to step"
                                                " where no barrier parts them).")] = "makespan",
    exact: Annotated[bool, typer.Option("--exact", help="Placement and order at once by the literal MIP, one replica of"
                                                        " each group, to the proof: about 40 jobs (groups x phases x"
                                                        " microbatches), at most 100.")] = False,
    exportable: Annotated[bool, typer.Option("--exportable", help="Only plans that `mipipe export --csv` can write for"
                                                                  " torch's schedule runtime: chains of stages, each on"
                                                                  " one rank.")] = False,
    recompute: Annotated[bool, typer.Option(help="Let groups run their forward twice to save memory.")] = False,
    pareto: Annotated[bool, typer.Option("--pareto", help="Instead of one plan, the frontier of memory against"
                                                          " bubble: one solve for each activation limit.")] = False,
    without: Without = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say where time is lost, what binds, what each rung found,"
                                                            " and what one more GB (activation), device or microbatch"
                                                            " would give, each solved again in a twentieth of the time"
                                                            " (from 4 s on).")] = False,
    branches: Annotated[int | None, typer.Option(help="So many branches that train side by side (`branches` in"
                                                      " train.yaml), each with a plan for an equal share of the"
                                                      " devices.", min=1)] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence (default 128).", min=1,
                                            rich_help_panel=_CAPTURE)] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per microbatch (default 1).", min=1,
                                              rich_help_panel=_CAPTURE)] = None,
    dtype: Annotated[str | None, typer.Option(help="Parameters' type (default: the configuration's own, else"
                                                   " float32).", rich_help_panel=_CAPTURE)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override of the model's configuration, such as"
                                                                     " num_hidden_layers=8; may be repeated.",
                                                       rich_help_panel=_CAPTURE)] = None,
    save_graph: Annotated[Path | None, typer.Option("--save-graph", help="Also write the captured graph here.",
                                                    rich_help_panel=_CAPTURE)] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Capture anew, and keep nothing (else in"
                                                              " $XDG_CACHE_HOME/mipipe, as long as the model's files,"
                                                              " options and versions are the same).",
                                           rich_help_panel=_CAPTURE)] = False,
    degrees: Annotated[str | None, typer.Option(
        help="Degrees that are fixed, such as tensor=8,ranks=4,copies=2 (ranks, tensor or sequence, context, expert,"
             " copies, chunks, zero); what multiplies to all devices is evaluated, else the rest is searched.",
        rich_help_panel=_TEAMS)] = None,
    global_batch: Annotated[int | None, typer.Option("--global-batch", help="Sequences of one step over all copies.",
                                                     rich_help_panel=_TEAMS)] = None,
    devices: Annotated[int | None, typer.Option(help="Devices, in place of --cluster.", rich_help_panel=_TEAMS)] = None,
    kind: Annotated[str | None, typer.Option(help="With --devices: their kind, such as h100.",
                                             rich_help_panel=_TEAMS)] = None,
    per_host: Annotated[int, typer.Option("--per-host", help="With --devices: how many share a host's fast links.",
                                          min=1, rich_help_panel=_TEAMS)] = 8,
    microbatch: Annotated[int | None, typer.Option(help="Sequences per microbatch of one copy.",
                                                   rich_help_panel=_TEAMS)] = None,
    layers_per_stage: Annotated[str | None, typer.Option("--layers-per-stage", help="Evaluate these stages: 9,9,8 or"
                                                                                    " 9x7,8.",
                                                         rich_help_panel=_TEAMS)] = None,
    schedule: Annotated[str | None, typer.Option(help="Evaluate a published schedule: 1f1b, interleaved, zb-h1, ...",
                                                 rich_help_panel=_TEAMS)] = None,
    recomputation: Annotated[str | None, typer.Option(help="What runs again in the backward: none, latents"
                                                           " (up-projections of latent attention), selective"
                                                           " (attention), full (layers).",
                                                      rich_help_panel=_TEAMS)] = None,
    modes: Annotated[str | None, typer.Option(help="Modes of their own for some branches along the tensor axis (tensor,"
                                                   " sequence, batch), such as vision=batch: samples divided,"
                                                   " parameters whole; or uniform: one for all. Default: a search also"
                                                   " tries encoders in batch mode.",
                                              rich_help_panel=_TEAMS)] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Count one kernel per operator, not fused ones.",
                                        rich_help_panel=_TEAMS)] = False,
    held: Annotated[bool, typer.Option("--held", help="Reductions over copies run after the last backward,"
                                                      " transfers of a 1F1B hold the compute streams of both ends: as"
                                                      " in Megatron-LM without its overlaps, and in DeepSpeed.",
                                       rich_help_panel=_TEAMS)] = False,
    scatter: Annotated[bool, typer.Option("--scatter/--no-scatter", help="Tensor members send a value to the next rank"
                                                                         " in parts; or each sends all of it.",
                                          rich_help_panel=_TEAMS)] = True,
    layer_times: Annotated[str | None, typer.Option(
        "--layer-times", help="Evaluate with measured times of layers in place of estimates: the cost table of"
                              " `mipipe profile` for this graph, or a JSON file, model -> device -> microbatch ->"
                              " tensor degree -> layer -> three numbers in seconds: forward, backward, update.",
        rich_help_panel=_TEAMS)] = None,
    layer_entry: Annotated[str | None, typer.Option("--layer-entry", help="Its model and device, as MODEL/DEVICE (where"
                                                                          " it has several); a cost table's device"
                                                                          " kind.",
                                                    rich_help_panel=_TEAMS)] = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    html_file: Html = None,
    trace_file: Trace = None,
    json_output: Json = False,
) -> None:
    """Plan a training step: placement, order of work, and a bound. Ctrl-C (or SIGTERM) keeps the best plan so far."""
    check_files(graph, cluster, costs, experts, sizes, layer_times, output=output, html=html_file, trace=trace_file,
                save_graph=save_graph)
    from mipipe.cli.requests.given import refuse
    from mipipe.cli.requests.team_request import TeamRequest

    request = TeamRequest(degrees, devices, kind, per_host, global_batch, microbatch, layers_per_stage, schedule,
                          recomputation, modes, eager, held, scatter, layer_times, layer_entry)
    if request.given:
        from mipipe.cli.requests.teams import plan_teams

        refuse(SINGLE_ONLY, "does not go with teams (--degrees, --global-batch, --devices, ...)")
        if cluster is not None:
            refuse(("devices", "kind", "per_host"), f"describes what {cluster} describes already; give one of both")
        if layer_times is None:
            refuse(("layer_entry",), "names an entry of --layer-times, which is not given")
        plan_teams(graph, request, cluster=cluster, memory=memory, seq=seq, dtype=dtype, settings=settings or [],
                   use_cache=not no_cache, save_graph=save_graph, output=output, optimizer=optimizer,  # type: ignore[arg-type]
                   time_limit=time_limit, seed=seed,
                   draw=lambda found: _draw(found.plan, html_file, trace_file), json_output=json_output)
        return
    refuse(TEAMS_ONLY, "is for teams of devices: give --global-batch, the sequences of a step over all copies, with it")
    if pareto:
        refuse(NO_PLAN, "does not go with --pareto, which makes no plan")
    from mipipe.cli.printing.explained import LEAST_S, MORE, explanation_data, print_explanation
    from mipipe.cli.printing.panels import write_files
    from mipipe.cli.printing.planned import print_next, print_result, result_data
    from mipipe.cli.printing.report import next_steps
    from mipipe.cli.requests.captured import captured_if_model
    from mipipe.cli.requests.inputs import read_problem
    from mipipe.cli.requests.solving import raise_reason, solve_shown, solved
    from mipipe.graphs.serialize import save, to_data
    from mipipe.planner.execution.quick_timeline import timeline_of
    from mipipe.planner.explain.what_if import what_if
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.options import without as parts_off
    from mipipe.planner.solve import Termination
    from mipipe.planner.solve import plan as solve

    options = PlanOptions(time_limit_s=time_limit, seed=seed, placement=placement,  # type: ignore[arg-type]
                          objective=objective, recompute=recompute, exact=exact,  # type: ignore[arg-type]
                          **parts_off(without or ()))
    if exportable and (exact or recompute or pareto or placement != "free" or objective != "makespan"):
        raise InputError("--exportable chooses among the shapes that can be exported: --placement, --objective,"
                         " --recompute, --pareto and --exact do not go with it")
    model, note = captured_if_model(graph, cluster, costs, seq=seq, batch=batch, dtype=dtype, settings=settings or [],
                                    use_cache=not no_cache, save_graph=save_graph)
    problem, facts = read_problem(Path(graph) if model is None else model.graph, cluster, microbatches, groups=groups,
                                  granularity=granularity, costs=costs, memory=memory, experts=experts, sizes=sizes,
                                  activations=activations, optimizer=optimizer, recompute=recompute)
    if branches is not None:
        from mipipe.cli.requests.policy_branches import plan_of_branches

        if pareto or explain or exportable or html_file is not None or trace_file is not None:
            raise InputError("--branches: --pareto, --explain, --exportable, --html and --trace do not go with it")
        plan_of_branches(Path(graph) if model is None else model.graph, problem, facts, branches, options, solved,
                         output, json_output)
        return
    if pareto:
        print_frontier(problem, options, html_file, json_output)
        return
    spare = MORE * time_limit if explain and objective == "makespan" and MORE * time_limit >= LEAST_S else 0.0
    result, options = solve_shown(problem, dataclasses.replace(options, time_limit_s=time_limit - 3 * spare),
                                  exportable)
    options = dataclasses.replace(options, time_limit_s=time_limit)
    if result.plan is None:
        raise_reason(result)
    assert result.plan is not None and result.makespan_ns is not None
    stopped = result.termination is Termination.INTERRUPTED
    more = what_if(problem, options, result.makespan_ns, solve, seconds=spare) if spare and not stopped else []
    known = {"options": to_data(options)} | ({} if facts is None else {"model": to_data(facts)})
    found = dataclasses.replace(result.plan, provenance={**result.plan.provenance, **known})
    timeline = timeline_of(found)
    if output is not None:
        save(found, output)
    write_files(found, [(f"simulated, placement {found.placement.name}", timeline)], html_file, trace_file)
    if json_output:
        data = result_data(result, found, timeline)
        if model is not None:
            data |= {"graph": {"file": None if model.path is None else str(model.path), "reused": model.reused}}
        if explain:
            data |= explanation_data(result, found, more)
        emit(data)
        return
    console = stdout()
    if note:
        console.print(note, soft_wrap=True, markup=False)
    print_result(console, result, found, timeline)
    if explain:
        print_explanation(result, found, more)
    kept = Path(graph) if model is None else save_graph or model.path
    print_next(console, next_steps(output, kept, facts, graph), output)


def _draw(found: Plan, html_file: Path | None, trace_file: Path | None) -> None:
    """The files that show a plan's timeline, where some were asked for."""
    from mipipe.cli.printing.panels import write_files
    from mipipe.planner.execution.quick_timeline import timeline_of

    if html_file is not None or trace_file is not None:
        write_files(found, [(f"simulated, {found.name}", timeline_of(found))], html_file, trace_file)
