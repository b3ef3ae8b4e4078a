"""``python -m mipipe.planner.warm``: compile the search kernels now, so that the first plan does not wait for it.

numba keeps the result beside the source (or in the user's cache folder); installing runs this once.
"""

from __future__ import annotations

from mipipe.planner.check.plan import check_plan
from mipipe.planner.devices.compiled import compile_kernels
from mipipe.planner.jobs.arrays import build
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.large import LARGE_ACTIONS
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.search import annealing, follow, lists
from mipipe.planner.sizes import COMPILED
from mipipe.planner.solve import plan


def warm() -> None:
    """Compile the kernels of lists, of searches with and without pairs, of large problems, of the
    check of large plans and of `place`: a minute."""
    small = uniform_problem(ranks=2, microbatches=4, f=3, i=4, w=2, comm=1, copies=1, activations=2)
    instance = build(view(small, next(propose_shapes(small, "chain"))))
    orders = lists.schedule(instance, lists.RULES[0])
    assert orders is not None
    annealing.advance(annealing.start(instance, orders, seed=0), seconds=0.1)
    follow.squeezed(instance, instance.head.astype(float), float(instance.dur.sum()))
    pairs = uniform_problem(ranks=2, microbatches=4, f=3, i=4, w=2, fb=8, copies=2, activations=3)
    large = uniform_problem(ranks=4, microbatches=LARGE_ACTIONS // 12 + 1, f=3, i=4, w=2, activations=3)
    for problem in (small, large):
        plan(problem, PlanOptions(time_limit_s=2.0, placement="v", use_milp=False, use_baselines=False))
    plan(pairs, PlanOptions(time_limit_s=20.0, placement="two-way", use_milp=False, use_baselines=False))
    many = uniform_problem(ranks=4, microbatches=COMPILED // 12 + 1, f=3, i=4, w=2)
    chain = next(baseline for baseline in BASELINES if baseline.name == "1F1B")
    check_plan(chain.plan(many), large=1)
    build(view(many, next(propose_shapes(many, "chain"))))
    compile_kernels()


if __name__ == "__main__":
    warm()
