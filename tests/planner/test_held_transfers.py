"""Transfers that hold the compute stream, against closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import ProblemError
from mipipe.planner.problems.held_transfers import hold_transfers
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES


def step(ranks: int, microbatches: int, f: int, i: int, w: int, comm: int, held: bool) -> float:
    problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=f, i=i, w=w, comm=comm, layers=ranks, copies=1,
                              activations=ranks)
    one_f_one_b = next(baseline for baseline in BASELINES if baseline.name == "1F1B")
    plan = one_f_one_b.plan(hold_transfers(problem) if held else problem, split=False)
    assert plan.makespan_ns is not None
    return plan.makespan_ns / problem.unit_ns


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 6), st.integers(6, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9),
       st.integers(0, 5))
def test_a_middle_rank_pays_four_transfers_a_microbatch(ranks: int, microbatches: int, f: int, i: int, w: int,
                                                        comm: int) -> None:
    """1F1B of equal stages: (P - 1 + M) (F + B) with the transfers of a stage in F and B, less those that the two ends
    do not have: at the head of the pipeline one in F and one in B, and so at its tail."""
    even = (ranks - 1 + microbatches) * (f + i + w)
    assert step(ranks, microbatches, f, i, w, 0, held=True) == even
    assert step(ranks, microbatches, f, i, w, comm, held=True) >= even + 4 * comm * microbatches
    assert step(ranks, microbatches, f, i, w, comm, held=True) <= even + 4 * comm * (ranks - 1 + microbatches)


def test_two_ranks_by_hand() -> None:
    """One microbatch: F, send, receive, F, B, send, receive, B."""
    assert step(2, 1, 10, 12, 8, 1, held=True) == 2 * 10 + 2 * 20 + 4
    assert step(2, 1, 10, 12, 8, 1, held=False) == 2 * 10 + 2 * 20 + 2


def test_only_where_every_rank_has_one_group() -> None:
    with pytest.raises(ProblemError, match="8 groups on 4 ranks"):
        hold_transfers(uniform_problem(ranks=4, microbatches=4, f=1, i=1, w=1, comm=1))
