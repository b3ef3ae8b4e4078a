"""Light-PEFT's two stages as one run: train, decide, capture what is left of the model, plan it, and go on.

The smaller model is planned for the devices of the plan that the run began with, with the options that it was made
with, and roofline costs. What the second stage runs on (``graph.json``, ``plan.json``) stays in the folder of the first
stage's decisions: a run that resumes after these goes on with it, and a plan of one's own can take the place of ours.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.cluster import Cluster, shipped_kinds
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.graphs.models.sources import open_source
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes.adapters import AdapterConfig, LightConfig
from mipipe.graphs.recipes.source import KEPT, recipe_of, with_recipe
from mipipe.graphs.serialize import load, save, to_data, write_text
from mipipe.planner.options import options_of
from mipipe.planner.plan import Plan
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.problems.on_cluster import default_optimizer, estimated_costs
from mipipe.planner.solve import plan as solve
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.launching.prepare import PreparedRun
from mipipe.runtime.train.models import SOURCE_OPTIONS, source_of
from mipipe.runtime.train.policy_branches import apart

FIRST = "first"
"""The first stage, in the names of its outputs."""


def light_of(job: PreparedRun) -> LightConfig | None:
    """What a run of two stages is told of them; None for any other, and for one stage of such a run."""
    adapters = recipe_of(job.graph).adapters
    return None if adapters is None or adapters.light is None or adapters.light.second else adapters.light


def first_config(config: TrainConfig, light: LightConfig) -> TrainConfig:
    """The run of the first stage: as many steps, outputs of its own, nothing saved but its decisions.

    Raises:
        InputError: no step is left for the second.
    """
    if config.steps <= light.steps:
        raise InputError(f"train config: {config.steps} steps, of which the first stage of light-peft has"
                         f" {light.steps}; expected more")
    kept = config.checkpoint
    return dataclasses.replace(
        config, steps=light.steps, save=None, metrics=apart(config.metrics, FIRST),
        timeline=apart(config.timeline, FIRST), tensorboard=apart(config.tensorboard, FIRST),
        profile=apart(config.profile, FIRST),
        checkpoint=None if kept is None else dataclasses.replace(kept, folder=str(Path(kept.folder) / FIRST)))


def second_config(config: TrainConfig, light: LightConfig) -> TrainConfig:
    """The run of the second stage."""
    assert config.adapters is not None
    return dataclasses.replace(config, steps=config.steps - light.steps, adapters=second_adapters(config.adapters))


def second_adapters(adapters: AdapterConfig) -> AdapterConfig:
    """The adapters of the second stage."""
    assert adapters.light is not None
    return dataclasses.replace(adapters, light=dataclasses.replace(adapters.light, second=True))


def check_folder(light: LightConfig, start: Start) -> None:
    """Raise `InputError` where the first stage's folder has decisions that a new run would replace."""
    if start is Start.FRESH and (Path(light.folder) / KEPT).exists():
        raise InputError(f"adapters: light: folder {light.folder} has the decisions of a run before; give another,"
                         " remove it, or --resume")


def smaller_graph(job: PreparedRun) -> OperatorGraph:
    """The graph of what the first stage kept of the model; raises as capturing it does."""
    graph, recipe = job.graph, recipe_of(job.graph)
    assert recipe.adapters is not None
    known = {key: graph.source[key] for key in SOURCE_OPTIONS if key in graph.source}
    if "config" in graph.source:
        known["config"] = graph.source["config"]
    opened = with_recipe(open_source(source_of(graph, job.config), **known),
                         dataclasses.replace(recipe, adapters=second_adapters(recipe.adapters)), graph.source)
    return capture_module(opened.build("meta"), opened.inputs("meta"), loss=opened.loss, loss_info=opened.loss_info,
                          withheld=opened.withheld, constants=opened.constants, source=opened.record, verify=False,
                          granularity=graph.source.get("granularity", "block"), name=graph.model)


def smaller_plan(job: PreparedRun, graph: OperatorGraph, where: str) -> Plan:
    """A plan of the smaller graph for the devices of the run's plan. ``where``: the folder that the graph is in.

    Raises:
        InputError: a device kind has no peaks to estimate costs from.
        InfeasibleError: there is no plan.
    """
    before = job.plan.problem
    kinds = shipped_kinds()
    unknown = sorted({device.kind for device in before.topology.devices} - set(kinds))
    if unknown:
        raise InputError(f"light-peft: device kind {unknown[0]!r} has no peak rates to plan the smaller model from;"
                         f" plan {where}/graph.json with --costs as {where}/plan.json, and go on with --resume-if-any")
    coarse = coarsen(graph)
    problem = build_problem(coarse, estimated_costs(coarse, graph, Cluster(before.topology, kinds)), before.topology,
                            num_microbatches=before.num_microbatches, optimizer=default_optimizer(graph),
                            limits=before.limits)
    options = options_of(job.plan)
    result = solve(problem, options)
    if result.plan is None:
        raise InfeasibleError(f"light-peft: no plan of the smaller model was found: {result.reason}")
    return dataclasses.replace(result.plan, provenance={**result.plan.provenance, "options": to_data(options)})


Run = Callable[[Path | None, Path | None, Path, Start], None]
"""``run(plan, graph, config, start)`` trains under these files; None: the run's own."""


def run_stages(job: PreparedRun, light: LightConfig, start: Start, run: Run, say: Callable[[str], None]) -> TrainConfig:
    """Run both stages, or what is left of them. Returns the configuration of the second.

    Raises:
        MipipeError: as ``run`` raises it; or no smaller model could be captured or planned.
    """
    check_folder(light, start)
    folder = Path(light.folder)
    folder.mkdir(parents=True, exist_ok=True)
    first, second = first_config(job.config, light), second_config(job.config, light)
    again = start
    if not (folder / KEPT).exists():
        run(None, None, _written(first, folder / "first.json"), start)
        again = Start.FRESH
    elif start is Start.RESUME:
        again = Start.RESUME_IF_ANY
    graph_file, plan_file = folder / "graph.json", folder / "plan.json"
    if not graph_file.exists():
        save(smaller_graph(job), graph_file)
    graph = load(graph_file, OperatorGraph)
    if not plan_file.exists():
        save(smaller_plan(job, graph, light.folder), plan_file)
    say(f"light-peft: {_numbers(graph):,} numbers stay of {_numbers(job.graph):,}; the smaller model is planned in"
        f" {plan_file}")
    run(plan_file, graph_file, _written(second, folder / "second.json"), again)
    return second


def _numbers(graph: OperatorGraph) -> int:
    """Numbers of the parameters."""
    return sum(math.prod(item.spec.shape) for item in graph.parameters if item.tied_to is None and not item.buffer)


def _written(config: TrainConfig, path: Path) -> Path:
    write_text(path, json.dumps(to_data(config)))
    return path
