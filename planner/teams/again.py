"""A plan of teams made again for fewer devices: what it was made for, and the degrees of what is left.

The sequences of a step stay the same, so that training goes on as it was: what a copy less would have done, the others
do. Where no degrees divide the devices that are left, or fewer of them are faster, some stay idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from mipipe.graphs.coarse.totals import num_sequences
from mipipe.graphs.errors import InfeasibleError, InputError, MipipeError, TimeUpError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import STRICT, from_data, to_data
from mipipe.planner.plan import Plan
from mipipe.planner.team import Team, TeamMode
from mipipe.planner.teams.as_team import team_of
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.machine import Machine, check_machine
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams
from mipipe.planner.teams.space import anything, least_seconds

KEY = "task"
"""Where a plan's provenance has its `TeamTask`."""


@dataclass(frozen=True, slots=True)
class TeamTask:
    """What a plan of teams was made for: devices, all alike, what was fixed, and modes of branches (None: searched)."""

    __pydantic_config__: ClassVar = STRICT
    machine: Machine
    options: TeamOptions
    modes: dict[str, str] | None = None


def with_task(plan: Plan, task: TeamTask) -> Plan:
    """The plan, with what it was made for in its provenance."""
    return replace(plan, provenance={**plan.provenance, KEY: to_data(task)})


def task_of(plan: Plan) -> TeamTask:
    """What a plan of teams was made for.

    Raises:
        InputError: it does not say, or not in what can be planned with.
    """
    if KEY not in plan.provenance:
        raise InputError(f"plan {plan.name}: does not say what devices it was made for, so that it cannot be made again"
                         " for fewer; plan with `mipipe plan GRAPH --global-batch B` and this version of mipipe")
    task = from_data(plan.provenance[KEY], TeamTask, f"plan {plan.name}: provenance.{KEY}")
    check_machine(task.machine)
    return task


def made_again(plan: Plan, graph: OperatorGraph, devices: int, *, copies: int, least: int = 1,
               seconds: float | None = None, runs: Callable[[Plan], bool] = lambda plan: True,
               divides: Callable[[Plan], bool] = lambda plan: True) -> Plan:
    """The plan of the least step on at most so many devices, for the graph's microbatch and the sequences of a step
    that ``copies`` of the plan take, with the modes of branches that were given for it, and of segments that it was
    given by hand.

    Args:
        plan: one of teams that says what it was made for (`task_of`).
        graph: that it was made for.
        devices: that are left.
        copies: of the plan that ran.
        least: devices that it must use.
        seconds: the time limit; None: that of the plan.
        runs: whether degrees are possible, by a plan that has their team (all else is that of ``plan``).
        divides: whether the graph can be divided as a plan's team says: asked of the best alone, where asking is slow.

    Raises:
        InputError: the plan does not say what it was made for.
        InfeasibleError: there is none.
        TimeUpError: none was found in time.
    """
    began = time.monotonic()
    task, rows = task_of(plan), num_sequences(graph)
    facts = plan.provenance.get("team")
    priced = task.modes or (isinstance(facts, dict) and facts.get("modes"))
    own = () if priced else tuple(item for item in (plan.team or Team({})).modes
                                  if item.segments and item.mode != "expert")
    pricer = Pricer(model_pieces(graph, {} if own else task.modes), task.machine)
    limit_s, refused = seconds or task.options.time_limit_s, list[tuple[dict[str, int], tuple[TeamMode, ...]]]()
    until = began + limit_s

    def with_own(team: Team | None) -> Team:
        assert team is not None
        return replace(team, modes=team.modes + own) if "tensor" in team.axes else team

    def wanted(degrees: Degrees) -> bool:
        team = with_own(team_of(pricer.model, degrees, task.machine.kind.name))
        return (team.axes, team.modes) not in refused and runs(replace(plan, team=team))

    while (left := until - time.monotonic()) > 0:
        options = replace(task.options, microbatch=rows, time_limit_s=left)
        found = best_of_fewer(pricer, devices, rows * plan.problem.num_microbatches * copies, options, least=least,
                              wanted=wanted).plan
        problem, team = found.problem.replace(graph_digest=plan.problem.graph_digest), with_own(found.team)
        made = with_task(replace(found, problem=problem, team=team), task)
        if divides(made):
            return made
        refused.append((team.axes, team.modes))
    raise TimeUpError(f"no plan found for {least} to {devices} devices within {limit_s:g} s: the graph cannot be"
                      f" divided as the best of {len(refused)} say; give more time")


def best_of_fewer(pricer: Pricer, devices: int, global_batch: int, options: TeamOptions, *, least: int = 1,
                  wanted: Callable[[Degrees], bool] = anything) -> TeamResult:
    """The least step on ``least`` to ``devices`` devices. What is fixed stays so where any number of them can have it,
    else all degrees and recomputation are free, for which half of the time is kept.

    Raises:
        InfeasibleError: there is none.
        TimeUpError: none was found in time.
    """
    until = time.monotonic() + options.time_limit_s
    wishes = [options]
    if options.given or options.recomputation is not None:
        wishes.append(replace(options, given={}, recomputation=None))
    reason: MipipeError | None = None
    for wish in wishes:
        now = time.monotonic()
        found, reason = _best(pricer, range(devices, least - 1, -1), global_batch, wish, wanted,
                              until if wish is wishes[-1] else now + (until - now) / 2)
        if found is not None:
            return found
    if isinstance(reason, TimeUpError):
        raise TimeUpError(f"no plan found for {least} to {devices} devices and {global_batch} sequences a step within"
                          f" {options.time_limit_s:g} s; give more time")
    why = str(reason).removeprefix("no plan exists: ")
    raise InfeasibleError(f"no plan exists for {least} to {devices} devices and {global_batch} sequences a step: {why}")


def _best(pricer: Pricer, counts: range, global_batch: int, options: TeamOptions,
          wanted: Callable[[Degrees], bool], until: float) -> tuple[TeamResult | None, MipipeError | None]:
    """The best over numbers of devices, each with half of the time that is left, up to where even full use of them
    would be slower; and why there is none: time was up for a number, else as for the first of them."""
    work = least_seconds(pricer) * global_batch
    best: TeamResult | None = None
    reason: MipipeError | None = None
    for count in counts:
        left = until - time.monotonic()
        if best is not None and work / count >= best.seconds:
            break
        if left <= 0:
            reason = TimeUpError("no time is left")
            break
        share = min(left, max(EFFORT.least_s, left / 2)) if count > counts[-1] else left
        try:
            searched = search_teams(pricer, count, global_batch, replace(options, time_limit_s=share), wanted=wanted)
        except (InputError, InfeasibleError, TimeUpError) as error:
            reason = error if isinstance(error, TimeUpError) else reason or error
            continue
        if searched.interrupted:
            raise KeyboardInterrupt
        found = searched.best
        best = found if best is None or found.seconds < best.seconds else best
    return best, reason
