"""The gap is one measure, whatever is planned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mipipe.planner.devices.result import PlaceResult
from mipipe.planner.experts.plan import LayerReport
from mipipe.planner.gap import gap_of
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.solve import SolveResult, Termination
from mipipe.planner.teams.found import Found


@pytest.mark.parametrize(("value", "bound", "gap"), [(12, 10, 0.2), (12, 12, 0.0), (12, 0, None), (0, 0, 0.0)])
def test_the_gap_is_above_the_bound_everywhere(value: int, bound: int, gap: float | None) -> None:
    """Of device placements, maps of experts, MIPs and plans alike; a proof is 0, no bound is no gap."""
    found = (PlaceResult(value, bound, 1.0, {}, "start", 1, 1), LayerReport(value, value, bound, 1, 1, 0, 0, 0),
             SolverOutcome(SolverStatus.FEASIBLE, value, bound, 1.0, 1, 1),
             SolveResult(None, value, bound, None, Termination.FEASIBLE, 1.0),
             Found(SimpleNamespace(seconds=value), bound, bound, bound, [], [], 1, 1, 1, 1.0))  # type: ignore[arg-type]
    assert [item.gap for item in found] == [pytest.approx(gap)] * 5


def test_the_gap_of_a_maximum_is_below_its_bound() -> None:
    """HiGHS minimises -profit: -90 found, none below -100."""
    assert gap_of(-90, -100) == pytest.approx(0.1) and gap_of(None, 3) is None and gap_of(3, None) is None
