"""The independent check of plans and programs: one call each, raising the first violated rule with its place.

Everything is recomputed from the problem: durations, edges, times and memory. Nothing here uses the formulations
(`milp/`), the stage view, the evaluation, lowering or the simulator, so their mistakes do not pass. The order in which
a run opens its communicators is read, and checked like the program.
"""

from mipipe.planner.check.plan import check_plan
from mipipe.planner.check.program import check_first_contact, check_program

__all__ = ["check_first_contact", "check_plan", "check_program"]
