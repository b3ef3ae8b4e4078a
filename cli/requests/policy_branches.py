"""``mipipe plan --branches``: a plan for each of several branches that train side by side, on shares of a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mipipe.cli.printing.output import emit, stdout
from mipipe.cli.printing.tables import print_rows
from mipipe.cli.printing.terminal import format_time
from mipipe.cli.requests.files import open_any
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import save, to_data
from mipipe.graphs.units import format_bytes
from mipipe.planner.gap import gap_of
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.policy_branches import exchange_bytes, exchange_ns, plan_branches
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.on_cluster import ModelFacts

Solve = Callable[[PlanningProblem, PlanOptions], Plan]


def plan_of_branches(graph: Path | OperatorGraph, problem: PlanningProblem, facts: ModelFacts | None, branches: int,
                     options: PlanOptions, solve: Solve, output: Path | None, json_output: bool) -> None:
    """Plan, write and print. ``solve``: a problem's plan, within the options given.

    Raises:
        InputError: the graph is none of a model's operators, or the devices cannot be shared out equally.
        InfeasibleError, TimeUpError: a share has no plan.
    """
    model = graph if isinstance(graph, OperatorGraph) else open_any(graph, OperatorGraph)
    policy = sum(item.spec.num_bytes for item in model.parameters if item.tied_to is None)
    if not policy:
        raise InputError(f"{model.model}: has no parameters, so no policy to train in branches")
    known: dict[str, Any] = {"options": to_data(options)} | ({} if facts is None else {"model": to_data(facts)})

    def solved(own: PlanningProblem) -> Plan:
        made = solve(own, dataclasses.replace(options, time_limit_s=options.time_limit_s / branches))
        return dataclasses.replace(made, provenance={**made.provenance, **known})

    found = plan_branches(problem, branches, policy, solved)
    if output is not None:
        save(found, output)
    tokens = int(facts.tokens) if facts is not None and facts.tokens else 0
    sent = exchange_bytes(tokens), exchange_ns(problem.topology, found.devices, tokens)
    names = [[problem.topology.devices[place].name for place in own] for own in found.devices]
    gaps = [gap_of(plan.makespan_ns, plan.bound_ns) for plan in found.plans]
    if json_output:
        rows = [{"branch": number, "devices": own, "makespan_ns": plan.makespan_ns, "gap": near,
                 "placement": plan.placement.name}
                for number, (plan, own, near) in enumerate(zip(found.plans, names, gaps, strict=True))]
        emit({"branches": rows, "policy_bytes": policy, "exchange_bytes": sent[0], "exchange_ns": sent[1]})
        return
    console = stdout()
    print_rows(console, [{
        "branch": number, "devices": f"{len(own)}, from {own[0]}",
        "step": format_time(plan.makespan_ns or 0, plan.problem.unit_ns), "gap": "" if near is None else f"{near:.1%}",
        "placement": plan.placement.name}
        for number, (plan, own, near) in enumerate(zip(found.plans, names, gaps, strict=True))])
    console.print(f"each branch's first device keeps a copy of the policy, {format_bytes(policy)}, which its plan"
                  " leaves free", soft_wrap=True)
    if tokens and branches > 1:
        console.print(f"a taught step: {format_bytes(sent[0])} between a branch and its teacher,"
                      f" {format_time(sent[1], problem.unit_ns)}, and the teacher's forward on its copy; sampling is"
                      " the task's own", soft_wrap=True)
    if output is not None:
        console.print(f"wrote {output}")
