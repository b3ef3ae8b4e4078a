"""What can be refused before any process starts: files that do not belong together, sizes, names, the world."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.operator_graph import DTYPE_BYTES, OperatorGraph
from mipipe.graphs.recipes.source import recipe_of
from mipipe.graphs.serialize import load
from mipipe.graphs.write_files import check_apart, same_file
from mipipe.planner.check import check_program
from mipipe.planner.check.graph import check_graph
from mipipe.planner.execution.lower import lower
from mipipe.planner.plan import Plan
from mipipe.planner.policy_branches import load_plans
from mipipe.planner.problems.from_graph import STATE_BYTES
from mipipe.planner.program import Program
from mipipe.planner.teams.again import KEY, task_of
from mipipe.planner.teams.refusal import refusal
from mipipe.runtime.checkpoints.checkpoint_folder import choose, probe, read_state
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.checkpoints.folder_lock import FolderLock
from mipipe.runtime.engine.batches import check_sizes
from mipipe.runtime.experts.layers import expert_degree, expert_layers
from mipipe.runtime.ranks.groups import ALONE
from mipipe.runtime.ranks.mesh import check_processes
from mipipe.runtime.train.config import TrainConfig, read_train_config
from mipipe.runtime.train.data import check_source
from mipipe.runtime.train.models import check_recipe, source_of
from mipipe.runtime.train.optim import check_matches, optimizer_class, takes_parts, whole_beside_experts


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run's files, read and found to fit."""

    plan: Plan
    program: Program
    graph: OperatorGraph
    config: TrainConfig
    plans: tuple[Plan, ...] = ()

    def processes(self, copies: int | None) -> int:
        """How many run it: the plan's devices, in the copies that are asked for, else in those it was made for; of all
        branches."""
        team = self.plan.team or ALONE
        each = len(self.program.ranks) * team.members * (team.copies if copies is None else copies)
        return each * len(self.branches or (self,))

    @property
    def branches(self) -> tuple[PreparedRun, ...]:
        """The runs of all branches; none where the run is one."""
        if self.config.branches is None:
            return ()
        return tuple(PreparedRun(plan, lower(plan), self.graph, self.config.of_branch(name))
                     for name, plan in zip(self.config.branches.names, self.plans, strict=True))


def read_job(plan: str | Path, graph: str | Path, config: str | Path, model: str | None = None) -> PreparedRun:
    """The files of a run; ``model`` (from the command line) comes before what they say of the model's source.

    Raises:
        InputError: a file is not what it should be, or the configuration does not fit the graph.
        PlanError: the plan was made for another graph, or violates a rule.
    """
    settings = read_train_config(config)
    if model is not None:
        settings = dataclasses.replace(settings, model=model)
    check_kept(settings, plan, graph, config)
    read_graph, plans = load(graph, OperatorGraph), load_plans(plan)
    read_plan = plans[0]
    for item in plans:
        check_graph(item, read_graph)
        check_team(item, read_graph, settings)
    check_branches(len(plans), read_graph, settings, str(plan))
    check_sizes(read_graph, settings.batch, settings.seq, read_plan.problem.num_microbatches)
    optimizer_class(settings.optimizer.name)
    check_matches(settings.optimizer.groups, read_graph)
    check_source(settings.data)
    source_of(read_graph, settings)
    check_recipe(read_graph, settings)
    check_folders(settings)
    program = lower(read_plan)
    for item in plans:
        check_program(item, program if item is read_plan else lower(item))
    return PreparedRun(read_plan, program, read_graph, settings, plans)


def check_branches(plans: int, graph: OperatorGraph, config: TrainConfig, plan: str) -> None:
    """Raise `InputError` where a run's branches are not those of its plan, or do not go with its graph."""
    count = 1 if config.branches is None else len(config.branches.tasks)
    if plans != count:
        raise InputError(f"{plan}: is a plan of {plans} branch{'es' if plans > 1 else ''}, but the configuration has"
                         f" {count}; plan with --branches {count}")
    if config.branches is not None and expert_layers(graph):
        raise InputError("branches do not go with a graph of --expert-parallel, whose experts no process has all of;"
                         " capture it without")


def check_team(plan: Plan, graph: OperatorGraph, config: TrainConfig) -> None:
    """Raise `InputError` where a run is asked for something that teams, or copies that share parameters, do not do."""
    team, sharded = plan.team, zero_of(config, plan, graph) > 1
    name, divided = config.optimizer.name.lower(), team is not None and team.members > 1
    if name == "adafactor" and (sharded or divided):
        raise InputError(f"optimizer {config.optimizer.name}: looks at whole tensors, of which members of a team, or"
                         " copies that shard gradients or parameters, have parts; take one that treats elements alike,"
                         " such as adamw")
    adapters = recipe_of(graph).adapters
    if adapters is not None and adapters.period and (divided or config.optimizer.shard or (team and team.zero)):
        raise InputError(f"adapters: ranks that grow (period {adapters.period}) move whole ones and their optimizer"
                         " state, of which members of a team, or copies with optimizer.shard, have parts; leave period"
                         " out, or plan single devices or copies of them without shard")
    if adapters is not None and adapters.light is not None and divided:
        raise InputError("adapters: light-peft removes units of whole layers, of which members of a team have parts;"
                         " plan single devices, or copies of them")
    if team is None:
        return
    if expert_layers(graph):
        expert_degree(team, graph, team.copies)
    reason = refusal(team, graph)
    if reason is not None:
        raise InputError(f"plan {plan.name}: {reason}")
    if config.experts is not None and config.experts.elastic is not None and (
            "context" in team.axes or any(item.mode in ("sequence", "batch") for item in team.modes)):
        raise InputError(f"plan {plan.name}: members of its teams ({team.text()}) route parts of the tokens, for which"
                         " experts.elastic would draw alike; plan with --degrees tensor= in place of sequence=, and"
                         " context=1, or leave experts.elastic out")


def held_otherwise(plan: Plan, config: TrainConfig) -> str | None:
    """A line on a run whose ``dtype`` is not that in which its plan of teams counts master weights, gradients and
    optimizer state; None where it is, or the plan does not say what it was made for."""
    if KEY not in plan.provenance:
        return None
    machine = task_of(plan).machine
    kept, size = config.dtype or machine.dtype, DTYPE_BYTES[machine.dtype]
    counted = size + machine.gradient_bytes + machine.state_bytes
    mixed = machine.keeps == "adamw_mixed"  # its master weights are state
    numbers = 2 + (STATE_BYTES["adamw"] if mixed else STATE_BYTES[machine.keeps])
    held = round(numbers * DTYPE_BYTES[kept]) + (size if kept != machine.dtype else 0)
    if held == counted:
        return None
    return (f"dtype: the plan counts {counted} bytes of weights, gradients and optimizer state for a parameter that"
            f" trains{' (those of float32 beside 16-bit weights)' if mixed else ''}; in {kept} it is {held}, so ranks"
            f" hold {'more' if held > counted else 'less'} than the plan says")


def check_copies(plan: Plan, graph: OperatorGraph, config: TrainConfig, copies: int) -> None:
    """Raise `InputError` where so many copies of a plan cannot share a graph's experts, or the state beside them."""
    if expert_degree(plan.team, graph, copies) < 2:
        return
    shared = config.optimizer.shard or (plan.team is not None and plan.team.zero)
    if shared and copies > 1 and not zero_of(config, plan, graph):
        raise whole_beside_experts(config.optimizer.name)


def zero_of(config: TrainConfig, plan: Plan, graph: OperatorGraph) -> int:
    """What devices that hold the same divide by parts of every parameter (`EngineOptions`), as configured, or as the
    plan of teams says. 0 also where whole parameters go to one copy each (`mipipe.runtime.train.optim`): an optimizer
    that looks at whole tensors updates them so."""
    asked = {False: 0, True: 1, "gradients": 2, "parameters": 3}[config.optimizer.shard]
    zero = max(asked, plan.team.zero if plan.team is not None else 0)
    return zero if zero == 3 or asked == 2 or takes_parts(config.optimizer.name, zero) else 0


def check_folders(config: TrainConfig) -> None:
    """Raise `InputError` where there are no weights to read, or saving would overwrite them."""
    if config.weights is None:
        return
    if not Path(config.weights).exists():
        raise InputError(f"train config: weights {config.weights}: no such folder")
    if config.save is not None and Path(config.save.folder).resolve() == Path(config.weights).resolve():
        raise InputError(f"train config: save.folder {config.save.folder} is where the weights are read from; give"
                         " another")


def check_saving(config: TrainConfig, resume: bool) -> None:
    """Raise `InputError` where the folder to save to exists; a resumed run replaces what it had saved before."""
    if config.save is not None and Path(config.save.folder).exists() and not resume:
        raise InputError(f"train config: save.folder {config.save.folder} exists already; give another, or remove it")


def check_start(config: TrainConfig, start: Start) -> None:
    """Raise `InputError` where a run cannot begin as wanted: checkpoints that are there or not, a folder that another
    job uses, outputs that cannot be written."""
    check_saving(config, start is not Start.FRESH)
    if config.checkpoint is not None:
        folder = Path(config.checkpoint.folder)
        chosen = choose(folder, start)
        probe(folder)
        FolderLock(folder).release()
        if chosen is not None:
            read_state(chosen)
    elif start is Start.RESUME:
        raise InputError("train config: has no 'checkpoint', so --resume has nothing to continue; give its folder")
    check_outputs(config)


def _written(config: TrainConfig) -> dict[str, str | None]:
    """The files that a run writes, by what names them."""
    experts = config.experts
    return {"metrics": config.metrics, "timeline": config.timeline, "profile": config.profile,
            "experts.loads": experts.loads if experts else None,
            "experts.history": experts.history if experts else None}


def check_kept(config: TrainConfig, *read: str | Path) -> None:
    """Raise `InputError` where a file that the run will write is one that it reads."""
    experts = config.experts
    maps = [experts.map, *experts.moves.values()] if experts is not None else []
    for what, file in _written(config).items():
        for other in (*read, *maps):
            if file is not None and other is not None and same_file(file, other):
                raise InputError(f"train config: {what}: {file} is also read: give what is written a name of its own")


def check_outputs(config: TrainConfig) -> None:
    """Raise `InputError` where a file that the run will write cannot be written, which else shows at its end, or two
    are one."""
    files = _written(config)
    for what, file in files.items():
        if file is not None:
            _check_output(what, Path(file))
    try:
        check_apart({**files, "save.folder": config.save.folder if config.save else None,
                     "checkpoint.folder": config.checkpoint.folder if config.checkpoint else None})
    except InputError as error:
        raise InputError(f"train config: {error}") from None
    if config.tensorboard is not None:
        _probe("tensorboard", Path(config.tensorboard))
    if config.save is not None:
        _probe("save", Path(config.save.folder).absolute().parent)


def _check_output(what: str, file: Path) -> None:
    if file.is_dir():
        raise InputError(f"train config: {what}: {file} is a folder, expected a file")
    if file.exists() and not file.is_file():
        return  # a pipe, a device
    _probe(what, file.resolve().parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise InputError(f"train config: {what}: {file} cannot be written")


def _probe(what: str, folder: Path) -> None:
    try:
        probe(folder)
    except InputError as error:
        raise InputError(f"train config: {what}: {error}") from None


def check_world(job: PreparedRun, processes: int) -> None:
    """Raise `RunError` unless the number of processes is a multiple of the plan's devices, of all branches, and
    `InputError` where its copies cannot be as many (`check_copies`)."""
    count = max(1, len(job.branches))
    if processes % count:
        raise RunError(f"{processes} processes were started for {count} branches; start a multiple of"
                       f" {job.processes(1)}")
    check_processes(processes // count, len(job.program.ranks), job.plan.team or ALONE)
    check_copies(job.plan, job.graph, job.config, processes // job.processes(1))
