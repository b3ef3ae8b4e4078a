"""Encoders beside a trunk: which groups they are, and every placement shape on graphs with branches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mipipe.graphs.operator_graph import Tags
from mipipe.planner.check import check_plan
from mipipe.planner.jobs.stages import view
from mipipe.planner.options import PLACEMENTS, PlanOptions
from mipipe.planner.placements.branches import encoders
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.problem import PhaseTimes
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import Termination, plan

sys.path.insert(0, str(Path(__file__).parent))
from planner_problems import multimodal_problem


def test_encoders_are_found_by_their_branch_and_without_tags_by_structure() -> None:
    problem = multimodal_problem()
    names = [problem.groups[g].name for g in encoders(problem)]
    assert names == ["patches", "vision0", "vision1", "vision2", "vision3", "projector"]
    untagged = problem.replace(groups=tuple(replace(group, tags=Tags()) for group in problem.groups))
    assert encoders(untagged) == encoders(problem)
    assert encoders(uniform_problem(ranks=4, microbatches=4, f=1, i=1, w=1)) == []


def test_parameters_tied_across_the_join_leave_no_encoder() -> None:
    problem = multimodal_problem(colocate=((3, 14),))
    assert encoders(problem) == [] and not list(propose_shapes(problem, "apart"))


@pytest.mark.parametrize("images", [pytest.param((), marks=pytest.mark.slow), (0.0, 4.0, 1.0, 2.0, 0.0, 3.0)])
@pytest.mark.parametrize("shape", [name for name in PLACEMENTS if name != "free"])
def test_every_shape_plans_a_model_with_branches(shape: str, images: tuple[float, ...]) -> None:
    problem = multimodal_problem(images=images)
    result = plan(problem, PlanOptions(time_limit_s=5.0, placement=shape, use_milp=False,  # type: ignore[arg-type]
                                       use_baselines=False, use_search=False))
    assert result.termination in (Termination.FEASIBLE, Termination.OPTIMAL), result.reason
    assert result.plan is not None and result.plan.placement.name.removesuffix("+spread") == shape


def test_apart_shares_no_rank_and_colocated_shares_the_first() -> None:
    problem = multimodal_problem()
    chosen = set(encoders(problem))
    for name in ("apart", "colocated"):
        found = list(propose_shapes(problem, name))
        assert found
        for placement in found:
            view(problem, placement)
            ranks = {True: set(), False: set()}
            for stage in placement.stages:
                assert chosen.issuperset(stage.groups) or chosen.isdisjoint(stage.groups)
                ranks[chosen.issuperset(stage.groups)].update(stage.ranks)
            assert ranks[True] and ranks[False] and (name == "apart") == ranks[True].isdisjoint(ranks[False])
            assert ranks[False] == set(range(4)) - ranks[True] if name == "apart" else ranks[False] == set(range(4))


def test_encoders_on_every_rank_even_out_the_load() -> None:
    problem = multimodal_problem(microbatches=8, images=(0.0, 4.0, 1.0, 2.0, 0.0, 3.0, 1.0, 1.0))
    spread = next(placement for placement in propose_shapes(problem, "colocated") if placement.name.endswith("+spread"))
    stages = view(problem, spread)
    load = [0] * 4
    for s in range(stages.num_stages):
        for m in range(8):
            load[stages.rank(s, m)] += stages.f_ns[s][m]
    assert max(load) - min(load) <= 4 * 16  # no more than the largest microbatch's encoder


@pytest.mark.parametrize(("shape", "words"), [("apart", "apart from the rest"), ("colocated", "beside the rest")])
def test_the_explanation_says_where_encoders_are(shape: str, words: str) -> None:
    result = plan(multimodal_problem(), PlanOptions(time_limit_s=5.0, placement=shape, use_milp=False,  # type: ignore[arg-type]
                                                    use_baselines=False, use_search=False))
    assert words in result.explanation[0]


def test_a_frozen_encoder_is_placed_without_a_backward() -> None:
    problem = multimodal_problem()
    chosen = set(encoders(problem)[:-1])
    groups = tuple(replace(group, times={"d": PhaseTimes(group.times["d"].f_ns, None, None)}, recompute_bytes=None)
                   if g in chosen else group for g, group in enumerate(problem.groups))
    edges = tuple(replace(edge, grad_bytes=None) if edge.source in chosen else edge for edge in problem.edges)
    for shape in ("apart", "colocated", "free"):
        result = plan(problem.replace(groups=groups, edges=edges), PlanOptions(
            time_limit_s=1.0, placement=shape, use_baselines=False, use_search=False))  # type: ignore[arg-type]
        assert result.plan is not None, result.reason
        check_plan(result.plan)


def test_a_model_without_encoders_says_that_the_shape_does_not_exist() -> None:
    result = plan(uniform_problem(ranks=4, microbatches=4, f=1, i=1, w=1), PlanOptions(placement="apart"))
    assert result.termination is Termination.INFEASIBLE and "does not exist" in result.reason
