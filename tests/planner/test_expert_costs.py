"""Expert groups and stages planned together: measured routing changes the durations, and these the stage split."""

from __future__ import annotations

import pytest

from mipipe.graphs.coarse.graph import CoarseGraph, GroupValue, OpGroup
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import InputError, ProblemError
from mipipe.graphs.operator_graph import Phase, Role, Tags
from mipipe.graphs.topology import Topology
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.experts.balance.maps import ExpertLoads
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Placement, Plan
from mipipe.planner.problems.expert_loads import group_shares, with_expert_loads
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.solve import plan as solve

EVEN = ExpertLoads(((10.0,) * 8, (10.0,) * 8), "small")
SKEWED = ExpertLoads(((55.0, 5.0, 0.0, 0.0, 10.0, 10.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 50.0, 10.0)),
                     "small")


def moe(origin: str = "profiled", layers: int = 2) -> tuple[CoarseGraph, CostTable]:
    """Layers of attention, router, four expert groups of two experts, combine. 40 us for a group at an even share."""
    groups: list[OpGroup] = []
    values: list[GroupValue] = []
    entries: list[GroupCost] = []

    def add(name: str, reads: list[int], micros: int, role: Role, expert_group: int | None = None) -> int:
        flops = dict.fromkeys(Phase, 1)
        groups.append(OpGroup(name, (name,), flops, flops, tags=Tags(int(name[1]), None, role, expert_group)))
        values.extend(GroupValue(f"{source}->{name}", source, (len(groups) - 1,), 8, 8) for source in reads)
        entries.append(GroupCost(name, "gpu", dict.fromkeys(Phase, micros * 1000), origin))  # type: ignore[arg-type]
        return len(groups) - 1

    last: list[int] = []
    for layer in range(layers):
        attention = add(f"l{layer}.attn", last, 40, Role.ATTENTION)
        router = add(f"l{layer}.router", [attention], 5, Role.ROUTER)
        experts = [add(f"l{layer}.experts.group{g}", [router], 40, Role.EXPERTS, g) for g in range(4)]
        last = [add(f"l{layer}.combine", [*experts, attention], 5, Role.COMBINE)]
    return CoarseGraph("small", "digest", tuple(groups), tuple(values)), CostTable("digest", tuple(entries))


def ranks_of(placement: Placement) -> list[int]:
    """The rank of every group of the small model."""
    found = {group: stage.ranks[0] for stage in placement.stages for group in stage.groups}
    return [found[group] for group in sorted(found)]


def test_durations_follow_the_tokens() -> None:
    """60 of 80 tokens make group 0 three times as long as at an even share; the sum of all groups stays."""
    coarse, costs = moe()
    scaled = with_expert_loads(costs, coarse, SKEWED)
    times = [scaled.find(f"l0.experts.group{g}", "gpu").times_ns[Phase.F] for g in range(4)]
    assert times == [120_000, 1, 40_000, 1]
    assert scaled.find("l0.attn", "gpu") == costs.find("l0.attn", "gpu")
    assert with_expert_loads(costs, coarse, EVEN).entries == costs.entries
    assert "3.00 times an even share" in scaled.notes["expert_loads"]
    _, roofline = moe("roofline")
    assert with_expert_loads(roofline, coarse, SKEWED).find("l0.experts.group0", "gpu").times_ns[Phase.F] == 30_000
    assert group_shares(coarse, SKEWED)["l1.experts.group3"] == (0.75, 4)


def test_a_skewed_bank_changes_the_stage_split() -> None:
    """Two ranks, one layer: the last expert group is as busy as all others together and gets a rank without them."""
    coarse, costs = moe(layers=1)
    loads = [ExpertLoads((tokens,), "small") for tokens in ((10.0,) * 8, (0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 50.0, 10.0))]
    problems = [build_problem(coarse, with_expert_loads(costs, coarse, load), Topology.uniform(2, kind="gpu"),
                              num_microbatches=4) for load in loads]
    options = PlanOptions(time_limit_s=1.0, seed=0, use_milp=False, threads=1, placement="chain")
    even, skewed = (solve(problem, options).plan for problem in problems)
    assert even is not None and skewed is not None
    ranks = ranks_of(skewed.placement)
    assert ranks != ranks_of(even.placement)
    assert ranks[5] not in ranks[:5]
    moved = Plan("even's", problems[1], even.placement, even.schedule)
    blind = simulate(moved, lower(moved)).makespan_ns
    assert skewed.makespan_ns is not None and skewed.makespan_ns < 0.95 * blind


@pytest.mark.parametrize(("loads", "message"), [
    (ExpertLoads(((1.0,) * 8,)), "have 1 layers, but small has 2 MoE layers"),
    (ExpertLoads(((1.0,) * 6,) * 2), "6 experts do not divide into the 4 expert groups"),
])
def test_loads_of_another_model_are_one_line(loads: ExpertLoads, message: str) -> None:
    """What was found, what was expected."""
    coarse, costs = moe()
    with pytest.raises(InputError, match=message):
        with_expert_loads(costs, coarse, loads)


def test_what_cannot_be_weighed_is_refused() -> None:
    """No expert groups; a table measured under a run's own routing."""
    coarse, _ = moe()
    _, calibrated = moe("calibrated")
    with pytest.raises(ProblemError, match="was calibrated from a run"):
        with_expert_loads(calibrated, coarse, SKEWED)
    dense = CoarseGraph("dense", "digest", coarse.groups[:2], ())
    with pytest.raises(ProblemError, match="capture it with --expert-groups"):
        group_shares(dense, SKEWED)
