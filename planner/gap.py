"""How far a value that is minimised is above a bound on it: one definition, whatever is planned."""

from __future__ import annotations

SOLVER_GAP = 1e-6
"""Relative gap at which a MIP stops and its incumbent counts as optimal, where nothing else is asked for."""

BOUND_SLACK = 100 * SOLVER_GAP
"""Units of its objective by which a MIP's bound may be too high: rows hold within the solver's tolerances."""


def gap_of(value: float | None, bound: float | None) -> float | None:
    """``(value - bound) / |bound|``: 0 is a proof. None where either is unknown, or the bound is 0 and says nothing."""
    if value is None or bound is None:
        return None
    if value == bound:
        return 0.0
    return (value - bound) / abs(bound) if bound else None
