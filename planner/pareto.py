"""The memory-bubble frontier of a problem; see `mipipe.planner.ladder.objectives`."""

from mipipe.planner.ladder.objectives import ParetoPoint, pareto

__all__ = ["ParetoPoint", "pareto"]
