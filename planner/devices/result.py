"""`PlaceResult`: what is known of an assignment of operators to devices; the vocabulary of all searches for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PlaceProgress = Callable[[float, str], None]
TOLERANCE = 2e-6


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
    def gap(self) -> float:
        """``(objective - bound) / objective``; 0 up to the solver's tolerance of 2e-6, which counts as proven."""
        gap = (self.objective - self.bound) / self.objective if self.objective else 0.0
        return gap if gap > TOLERANCE else 0.0
