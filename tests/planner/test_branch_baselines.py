"""Published schedules with an encoder: on the first stage, or on a rank of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mipipe.graphs.errors import ProblemError
from mipipe.planner.check import check_plan
from mipipe.planner.placements.branches import encoders
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.schedules.branch_baselines import plan_with_encoder

sys.path.insert(0, str(Path(__file__).parent))
from planner_problems import multimodal_problem


@pytest.mark.parametrize("cut", ["even", "balanced"])
@pytest.mark.parametrize("where", ["first", "apart"])
@pytest.mark.parametrize("name", ["1F1B", "ZB-H1", "ZB-V", "GPipe"])
@pytest.mark.parametrize("images", [(), (0.0, 4.0, 1.0, 2.0, 0.0, 3.0)])
def test_plans_are_valid_and_the_encoder_is_where_it_should_be(name: str, where: str, cut: str,
                                                               images: tuple[float, ...]) -> None:
    problem = multimodal_problem(images=images)
    baseline = next(item for item in BASELINES if item.name == name)
    found = plan_with_encoder(problem, baseline, where, cut=cut)  # type: ignore[arg-type]
    check_plan(found)
    chosen = set(encoders(problem))
    ranks = {rank for stage in found.placement.stages if chosen.intersection(stage.groups) for rank in stage.ranks}
    others = {rank for stage in found.placement.stages if not chosen.intersection(stage.groups) for rank in stage.ranks}
    assert ranks == {0} and (0 in others) == (where == "first" and name == "ZB-V")


def test_a_chain_has_no_encoder_to_place() -> None:
    with pytest.raises(ProblemError, match="no encoder"):
        plan_with_encoder(uniform_problem(ranks=4, microbatches=4, f=1, i=1, w=1), BASELINES[0], "first")
