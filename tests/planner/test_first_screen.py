"""What the README's first screen says of its example: the figures, the bounds, and how the plan was found."""

from mipipe.planner.comparison_rows import baseline_rows
from mipipe.planner.options import PlanOptions
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan


def test_the_first_screen_is_true():
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, copies=2, activations=5)
    rows = [row for baseline in BASELINES for row in baseline_rows(problem, baseline) if row.makespan is not None]
    figures = {(row.name, row.accounting): row.makespan for row in rows}
    assert figures["1F1B", "indivisible"] == 55 and figures["DualPipe", "split"] == 43
    within = [row for row in rows if row.parameter_copies <= 2 and row.peak_activations <= 5]
    assert min(row.makespan for row in within) == 43
    zb_v = next(row for row in rows if row.name == "ZB-V")
    assert (zb_v.makespan, zb_v.parameter_copies, zb_v.peak_activations) == (43, 1, 4)

    found = plan(problem, PlanOptions(time_limit_s=2, use_baselines=False))
    assert [value / problem.unit_ns for value in (found.makespan_ns, found.bound_ns, found.placement_bound_ns)] == [
        41, 40, 41]
    assert found.rung == "list" and found.how.calls > 0  # HiGHS looked for better placements
    assert sorted(len(stage.groups) for stage in found.plan.placement.stages) == [1, 2, 2, 3]
