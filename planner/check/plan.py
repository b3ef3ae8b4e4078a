"""Whether a plan keeps every rule of its problem, rule by rule; the first violation is raised with its place."""

from __future__ import annotations

from mipipe.graphs.errors import PlanError
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.check.facts import Demands, Part, check_placement, part_text
from mipipe.planner.check.memory import check_activations, check_resident
from mipipe.planner.check.times import CheckedTimes, lanes_of, order_times
from mipipe.planner.plan import Plan
from mipipe.planner.sizes import VERY_MANY

_COMPUTE_KINDS = (ActionKind.F, ActionKind.I, ActionKind.W, ActionKind.B, ActionKind.OVERLAP_F_B, ActionKind.RECOMPUTE)


def check_plan(plan: Plan, large: int = VERY_MANY) -> None:
    """Check a plan: placement, routes, the actions of every rank, the order, memory, and the figures it states.

    With at least ``large`` actions arrays decide whether it is sound; what is not is gone through for the reason.

    Raises:
        PlanError: the first violated rule, with its place.
    """
    if sum(len(order.compute) + len(order.collective) for order in plan.schedule.ranks) >= large:
        from mipipe.planner.check.arrays import holds  # a compiler is loaded with it, which small plans need not

        if holds(plan):
            return
    check_placement(plan)
    facts = Demands(plan)
    check_actions(facts)
    check_resident(facts)
    times = order_times(facts)
    check_activations(facts, times)
    _check_figures(plan, times)


def check_actions(facts: Demands) -> None:
    """Raise `PlanError` unless every elementary action is there once, on its rank and stream."""
    problem = facts.plan.problem
    if len(facts.plan.schedule.ranks) != problem.num_ranks:
        raise PlanError(f"schedule: has orders for {len(facts.plan.schedule.ranks)} ranks, but the topology has"
                        f" {problem.num_ranks} devices")
    expected = set(facts.expected_parts())
    seen: dict[Part, str] = {}
    for (rank, lane), actions in lanes_of(facts).items():
        for position, action in enumerate(actions):
            where = f"rank {rank}, action {position} ({action})" + (" on the collective stream" if lane else "")
            _check_action(facts, action, where, rank, bool(lane), expected)
            for part in action.parts():
                if part in seen:
                    raise PlanError(f"{where}: {part_text(part)} is scheduled twice, first at {seen[part]}")
                seen[part] = where
    missing = [part for part in facts.expected_parts() if part not in seen]
    if missing:
        _, stage, microbatch = missing[0]
        more = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise PlanError(f"action {part_text(missing[0])}: is not scheduled{more}; expected on rank"
                        f" {facts.rank(stage, microbatch)}")


def _check_action(facts: Demands, action: Action, where: str, rank: int, collective: bool, expected: set[Part]) -> None:
    count = facts.plan.problem.num_microbatches
    if action.kind not in _COMPUTE_KINDS or (action.kind is ActionKind.OVERLAP_F_B) != (action.partner is not None):
        raise PlanError(f"{where}: is no compute action; a plan orders F, I, W, B, OVERLAP_F_B and RECOMPUTE")
    for part in action.parts():
        kind, stage, microbatch = part
        if not (0 <= stage < len(facts.phases) and 0 <= microbatch < count):
            raise PlanError(f"{where}: there are stages 0 to {len(facts.phases) - 1} and microbatches 0 to {count - 1}")
        if part not in expected:
            raise PlanError(f"{where}: stage {stage} has no {kind} phase"
                            + (", as it does not recompute" if kind is ActionKind.RECOMPUTE else ""))
        if facts.rank(stage, microbatch) != rank:
            raise PlanError(f"{where}: microbatch {microbatch} of stage {stage} is routed to rank"
                            f" {facts.rank(stage, microbatch)}")
        if (facts.streams[stage].value == "collective") != collective:
            raise PlanError(f"{where}: stage {stage} runs on the {facts.streams[stage]} stream")
    if action.partner is not None:
        _check_pair(facts, action, where)


def _check_pair(facts: Demands, action: Action, where: str) -> None:
    """Raise `PlanError` if the backward of an overlapped pair needs the pair's own forward."""
    forward, back, _ = action.parts()
    needed, waiting = {back}, [back]
    while waiting and forward[2] == back[2]:
        part = waiting.pop()
        before = facts.needs_before(part)
        sources = {flow.producer for flow in facts.flows if flow.consumer == part} | ({before} if before else set())
        waiting += sources - needed
        needed |= sources
    if forward in needed:
        raise PlanError(f"{where}: overlaps microbatch {forward[2]} with its own backward: {part_text(back)} needs"
                        f" {part_text(forward)} to have ended; overlap it with the backward of another microbatch")


def _check_figures(plan: Plan, times: CheckedTimes) -> None:
    """Raise `PlanError` if the makespan a plan states is not its order's, a bound lies above it, or two disagree."""
    if plan.makespan_ns is not None and plan.makespan_ns != times.makespan_ns:
        raise PlanError(f"plan: states a makespan of {plan.makespan_ns} ns, but its order takes {times.makespan_ns} ns;"
                        " simulate it again")
    for label, bound in (("bound", plan.bound_ns), ("bound at this placement", plan.placement_bound_ns)):
        if bound is not None and bound > times.makespan_ns:
            raise PlanError(f"plan: states a lower {label} of {bound} ns, but its order takes {times.makespan_ns} ns;"
                            " the bound is wrong")
    if plan.bound_ns is not None and plan.placement_bound_ns is not None and plan.placement_bound_ns < plan.bound_ns:
        raise PlanError(f"plan: states a bound of {plan.bound_ns} ns over all placements and one of"
                        f" {plan.placement_bound_ns} ns at its own; what no plan is below, none at this placement is")
