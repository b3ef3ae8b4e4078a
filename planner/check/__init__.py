"""The independent check of plans and programs: one call each, raising the first violated rule with its place.

Everything is recomputed from the problem: durations, edges, times and memory. Nothing here uses the formulations
(`milp/`), the stage view, the evaluation, lowering or the simulator, so their mistakes do not pass.
"""

from mipipe.planner.check.plan import check_plan
from mipipe.planner.check.program import check_program

__all__ = ["check_plan", "check_program"]
