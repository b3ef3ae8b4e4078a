"""The memory-bubble frontier of a problem; see `mipipe.planner.objectives`."""

from mipipe.planner.objectives import ParetoPoint, pareto

__all__ = ["ParetoPoint", "pareto"]
