"""`PlaceResult`: what is known of an assignment of operators to devices; the vocabulary of all searches for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mipipe.planner.gap import SOLVER_GAP, gap_of

PlaceProgress = Callable[[float, str], None]
TOLERANCE = 2 * SOLVER_GAP
"""The gap up to which an assignment counts as proven: twice that at which the MIP stops."""


@dataclass(frozen=True, slots=True)
class PlaceResult:
    """An assignment (node id -> ``acc0`` or ``cpu0``) and what is known of it.

    ``method`` names the rung that found it.
    """

    objective: float
    bound: float
    seconds: float
    assignment: dict[str, str]
    method: str
    classes: int
    contracted_classes: int

    @property
    def gap(self) -> float | None:
        """``objective / bound - 1``; 0 up to the solver's tolerance of 2e-6, which counts as proven."""
        gap = gap_of(self.objective, self.bound)
        return 0.0 if gap is not None and gap <= TOLERANCE else gap
