"""What a solve says about itself: what binds, the ablation, and the frontier of memory."""

from __future__ import annotations

from mipipe.planner.ladder.candidate import peak_activations
from mipipe.planner.options import PlanOptions
from mipipe.planner.pareto import pareto
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import plan


def test_names_the_bound_the_device_the_channel_and_the_memory() -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, activations=4, copies=1)
    result = plan(problem, PlanOptions(time_limit_s=3, placement="chain", use_milp=False))
    text = "\n".join(result.explanation)
    for word in ("placement chain: 4 stages on 4 ranks", "bound at this placement", "device: rank",
                 "channel: transfers take latency alone", "memory: rank 0 uses 100%", "more memory may shorten"):
        assert word in text


def test_ample_memory_does_not_bind() -> None:
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, activations=50, copies=1)
    result = plan(problem, PlanOptions(time_limit_s=2, placement="chain", use_milp=False))
    assert any("does not bind" in line for line in result.explanation)


def test_the_ablation_has_a_row_for_each_rung_that_ran() -> None:
    problem = uniform_problem(ranks=3, microbatches=5, f=10, i=12, w=8, comm=1, activations=2, copies=1)
    result = plan(problem, PlanOptions(time_limit_s=6, placement="v"))
    assert "annealing" in {row["rung"] for row in result.ablation}
    first = next(row for row in result.ablation if row["before"] is None)  # what the loop began with, as it was found
    assert (first["rung"], first["placement"], first["makespan"] * problem.unit_ns) in {
        (item.rung, item.placement, item.makespan_ns) for item in result.history}
    for row in result.ablation:
        assert set(row) >= {"rung", "placement", "before", "makespan", "variables", "constraints", "seconds"}


def test_less_memory_costs_makespan_on_the_frontier() -> None:
    problem = uniform_problem(ranks=4, microbatches=6, f=1, i=1, w=1, activations=8, copies=1)
    points = pareto(problem, PlanOptions(time_limit_s=2, placement="chain", use_milp=False), points=3)
    solved = [point for point in points if point.makespan_ns is not None]
    assert len(solved) >= 2
    spans = [point.makespan_ns for point in sorted(solved, key=lambda point: point.activation_bytes)]
    assert spans == sorted(spans, reverse=True) and len(set(spans)) == len(spans)


def test_the_memory_objective_trades_makespan_within_epsilon() -> None:
    problem = uniform_problem(ranks=4, microbatches=6, f=1, i=1, w=1, activations=8, copies=1)
    options = {"placement": "chain", "use_milp": False}
    fast = plan(problem, PlanOptions(time_limit_s=0.5, **options))  # type: ignore[arg-type]
    lean = plan(problem, PlanOptions(time_limit_s=1.5, objective="memory", epsilon=0.25, **options))  # type: ignore[arg-type]
    assert fast.plan and lean.plan and fast.makespan_ns and lean.makespan_ns
    assert peak_activations(lean.plan) <= peak_activations(fast.plan)
    assert lean.makespan_ns <= 1.25 * fast.makespan_ns + 1
