"""``python -m mipipe.planner.warm``: compile the search kernels now, so that the first plan does not wait for it.

numba keeps the result beside the source (or in the user's cache folder); installing runs this once.
"""

from __future__ import annotations

from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan
from mipipe.planner.uniform import uniform_problem


def warm() -> None:
    """Compile every kernel by one small solve."""
    problem = uniform_problem(ranks=2, microbatches=4, f=3, i=4, w=2, comm=1, copies=1, activations=2)
    plan(problem, PlanOptions(time_limit_s=60.0, placement="v", use_milp=False, use_baselines=False, gap=0.1))


if __name__ == "__main__":
    warm()
