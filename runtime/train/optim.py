"""Optimizers by name, and learning-rate schedules."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.expressions import search
from mipipe.graphs.named_code import import_named
from mipipe.graphs.operator_graph import OperatorGraph, Role
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.matrices import Along, ParameterShard
from mipipe.runtime.recipes.optimizers import BANK, OPTIMIZERS, SHARD, MatrixOptimizer
from mipipe.runtime.train.config import GroupConfig, ScheduleConfig

_UNFIT = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
"""Classes of torch.optim that can take no step here: LBFGS asks for the loss again in its step, SparseAdam takes
sparse gradients alone."""
_TORCH = {name.lower(): item for name, item in vars(torch.optim).items()
          if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer) and item not in _UNFIT}


def make_optimizer(name: str, engine: Engine, options: Mapping[str, Any], shard: bool = False,
                   groups: Sequence[GroupConfig] = ()) -> torch.optim.Optimizer | None:
    """An optimizer over the rank's parameters; None for a rank without any.

    ``name``: a class of torch.optim in any case (``adamw``), or ``package.module:Class`` for others. ``shard`` divides
    its state among devices that hold the same: each has a part of every parameter (`EngineOptions`), or, where the
    optimizer looks at whole ones, each copy updates some whole parameters and broadcasts them (torch's
    ZeroRedundancyOptimizer).
    ``groups``: parameters with other options.

    Raises:
        InputError: there is no such optimizer, or it does not take these options.
    """
    kind, roles = optimizer_class(name), parameter_roles(engine.graph)
    _check_options(name, kind, options, groups)
    parameters = parameter_groups(engine.named_parameters(), groups, roles)
    if issubclass(kind, MatrixOptimizer):
        parameters = _apart(parameters, {id(item): roles.get(name) for name, item in engine.named_parameters()})
        _tell_shards(engine)
    if not parameters:
        return None
    shard = shard and engine.mesh.copy_group is not None and not engine.compiled.across
    if shard and engine.compiled.banks:
        raise whole_beside_experts(name)
    options = with_fused(kind, options, engine.mesh.device)
    try:
        if shard:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # takes more than a second to import
            return ZeroRedundancyOptimizer(parameters, kind, engine.mesh.copy_group, **options)
        return kind(parameters, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer {name}: {error}") from None


def whole_beside_experts(name: str) -> InputError:
    """Why an optimizer that looks at whole parameters does not share its state where copies share experts."""
    known = " shard gradients as well (optimizer.shard: gradients, or plan with --degrees zero=2)," \
        if name.lower() in OPTIMIZERS else ""
    return InputError(f"optimizer {name}: copies that share its state update some whole parameters each, but experts"
                      f" live on some copies;{known} take one that treats elements alike, such as adamw, or leave"
                      " optimizer.shard out (a plan's zero: --degrees zero=0)")


def _check_options(name: str, kind: Any, options: Mapping[str, Any], groups: Sequence[GroupConfig]) -> None:
    """Raise `InputError` where a group's options are not the optimizer's: torch checks those given for all parameters
    alone. Of the user's own optimizers nothing is known."""
    if kind not in (*_TORCH.values(), *OPTIMIZERS.values()):
        return
    def made(more: Mapping[str, Any], which: str) -> torch.optim.Optimizer:
        try:
            found: torch.optim.Optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], **{**options, **more})
        except (TypeError, ValueError) as error:
            raise InputError(f"{which}: {error}") from None
        return found

    known = made({}, f"optimizer {name}").defaults if groups else {}
    for group in groups:
        own = {key: value for key, value in group.options.items() if key != "matrix"}  # no argument, see `_apart`
        which = f"optimizer {name}, group {shown(group.match if group.match is not None else str(group.role))}"
        unknown = sorted(set(group.options) - set(known))
        if unknown:
            raise InputError(f"{which}: unknown option {shown(unknown[0])}; expected {', '.join(sorted(known))}")
        made(own, which)


def check_matches(groups: Sequence[GroupConfig], graph: OperatorGraph) -> None:
    """Raise `InputError` where a group's expression fits no parameter that an optimizer has: a trainable one, by the
    first of its names where it is tied."""
    names = [item.fqn for item in graph.parameters if item.trainable and item.tied_to is None and not item.buffer]
    for group in groups:
        if group.match is not None and not any(search(group.match, name) is not None for name in names):
            raise InputError(f"train config, optimizer.groups: {shown(group.match)} matches no trainable parameter of"
                             " the graph (a tied one goes by the first of its names), whose first is"
                             f" {names[0] if names else 'none'}")


def takes_parts(name: str, zero: int) -> bool:
    """Whether an optimizer updates parts of parameters for the copies of a plan that share its state (``zero`` 1) or
    gradients (2): one that treats elements alike does. REG and Muon put whole matrices together where gradients come
    in parts, and have whole ones else; of the user's own nothing is known."""
    name = name.lower()
    return zero > 1 if name in OPTIMIZERS else name in _TORCH and name != "adafactor"


def with_fused(kind: Any, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The options, with torch's fused kernels on CUDA where the optimizer has them and no other way is asked for."""
    asked = {"fused", "foreach", "capturable", "differentiable"} & set(options)
    fused = kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) and device.type == "cuda" and not asked
    return {**options, **({"fused": True} if fused else {})}


def parameter_roles(graph: OperatorGraph) -> dict[str, Role]:
    """The role of each parameter: that of the first segment that reads it."""
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    found: dict[str, Role] = {}
    for segment in graph.segments:
        for fqn in segment.parameters:
            found.setdefault(canonical[fqn], segment.tags.role)
    return found


def _apart(groups: Sequence[Mapping[str, Any]], roles: Mapping[int, Role | None]) -> list[dict[str, Any]]:
    """Groups for `MatrixOptimizer`: embeddings and heads apart from matrices, where a group does not say it itself."""
    made: list[dict[str, Any]] = []
    for group in groups:
        for matrix in (True, False):
            members = []
            for item in group["params"]:
                role = roles.get(id(item))
                setattr(item, BANK, role is Role.EXPERTS and item.dim() == 3)
                if (item.dim() > 1 and role not in (Role.EMBEDDING, Role.HEAD)) is matrix:
                    members.append(item)
            if members:
                made.append({"matrix": matrix, **group, "params": members})
    return made


def _tell_shards(engine: Engine) -> None:
    """Say on every matrix that members of the team, or devices that hold the same, have in parts how it lies
    (`ParameterShard`), for `MatrixOptimizer`."""
    groups = {**engine.mesh.axes, **engine.mesh.alike}
    for name, item in engine.named_parameters():
        divisions = engine.compiled.divisions.get(name, ())
        if item.dim() > 1 and divisions:
            setattr(item, SHARD, ParameterShard(
                tuple(Along(part.dim, groups[part.axis], part.sections) for part in divisions),
                engine.options.timeout_s))


def parameter_groups(named: Sequence[tuple[str, torch.nn.Parameter]], groups: Sequence[GroupConfig],
                     roles: Mapping[str, Role] | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one for each of ``groups`` that fits a parameter, one for the rest."""
    def fits(group: GroupConfig, name: str) -> bool:
        return (group.match is None or search(group.match, name) is not None) and (
            group.role is None or (roles or {}).get(name) is group.role)

    members: list[list[torch.nn.Parameter]] = [[] for _ in (*groups, None)]
    for name, parameter in named:
        place = next((number for number, group in enumerate(groups) if fits(group, name)), len(groups))
        members[place].append(parameter)
    return [{"params": found, **(groups[number].options if number < len(groups) else {})}
            for number, found in enumerate(members) if found]


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this process's state: the local part of a sharded one, else itself."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's name for it
    return inner


def check_continues(optimizer: torch.optim.Optimizer) -> None:
    """Raise `InputError` unless one of torch's optimizers can go on from the state that it was given: a step of a copy
    of each group's smallest parameter shows it. With other options it may need what was not kept (``amsgrad``)."""
    local = local_optimizer(optimizer)
    if type(local) not in _TORCH.values():
        return
    for group in local.param_groups:
        held = [item for item in group["params"] if local.state.get(item)]
        if not held:
            continue
        smallest = min(held, key=lambda item: item.numel())
        tried = torch.nn.Parameter(smallest.detach().clone())
        tried.grad = torch.zeros_like(tried)
        again = type(local)([{**group, "params": [tried]}])  # type: ignore[call-arg]
        again.state[tried] = copy.deepcopy(local.state[smallest])
        try:
            again.step()
        except KeyError as error:
            raise InputError(f"optimizer {type(local).__name__}: its options need the state {error}, which the"
                             " checkpoint, saved with others, has not; resume with the options it was saved with"
                             ) from None


def optimizer_class(name: str) -> Any:
    """The optimizer class of a name."""
    if ":" in name:
        found = import_named(name)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise InputError(f"optimizer {name}: expected a class derived from torch.optim.Optimizer")
        return found
    known = {**_TORCH, **OPTIMIZERS}
    if name.lower() not in known:
        raise InputError(f"optimizer {name!r}: expected one of {', '.join(sorted(known))}, or package.module:Class")
    return known[name.lower()]


def learning_rate_factor(schedule: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """step -> factor of the learning rate: linear warm-up, a stable part, then decay to the schedule's minimum."""
    first = schedule.warmup if schedule.decay is None else max(schedule.warmup, steps - schedule.decay)

    def factor(step: int) -> float:
        if step < schedule.warmup:
            return (step + 1) / schedule.warmup
        if schedule.name == "constant" or step < first:
            return 1.0
        done = min(1.0, (step - first) / max(1, steps - first))
        left = {"linear": 1.0 - done, "sqrt": 1.0 - math.sqrt(done),
                "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule.name]
        return schedule.minimum + (1.0 - schedule.minimum) * left

    return factor
