"""The abstract models: totals are exact, conventions hold, and odd sizes do not lose a nanosecond."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipipe.graphs.errors import ProblemError
from mipipe.planner.actions import Stream
from mipipe.planner.problems.uniform import (
    activation_unit_bytes,
    in_activations,
    in_copies,
    in_units,
    parameter_share_bytes,
    two_stream_problem,
    uniform_problem,
)

TENTHS = st.integers(1, 50).map(lambda n: n / 10)


@given(ranks=st.integers(1, 9), layers=st.integers(1, 30), f=TENTHS, i=TENTHS, w=TENTHS, first=TENTHS, last=TENTHS)
def test_work_is_exact(ranks, layers, f, i, w, first, last):
    """All durations together are ranks + first + last even stages, to the nanosecond."""
    problem = uniform_problem(ranks=ranks, microbatches=2, f=f, i=i, w=w, layers=layers, first=first, last=last)
    total = sum(group.times["device"].total_ns for group in problem.groups)
    f, i, w, first, last = (Fraction(str(number)) for number in (f, i, w, first, last))
    assert total == (f + i + w) * (ranks + first + last) * problem.unit_ns
    assert problem.unit_ns % 10**6 == 0


def test_uneven_model_of_the_issue():
    """32 layers on 8 ranks, embedding 0.2, head 0.6, F = I = W = 1: 20 microbatches are 66 units of work per rank."""
    problem = uniform_problem(ranks=8, microbatches=20, f=1, i=1, w=1, layers=32, first=0.2, last=0.6)
    assert len(problem.groups) == 34
    work = sum(group.times["device"].total_ns for group in problem.groups) * 20
    assert in_units(problem, work) / 8 == pytest.approx(66)
    assert problem.groups[0].resident_bytes == 0 and problem.groups[-1].saved_fw_bytes == 0


def test_limits_are_in_even_shares():
    problem = uniform_problem(ranks=8, microbatches=20, f=2, i=2, w=1, copies=2, activations=8.5)
    assert problem.limits.resident_bytes == 2 * parameter_share_bytes(problem)
    assert problem.limits.activation_bytes == Fraction(17, 2) * activation_unit_bytes(problem)
    assert in_copies(problem, problem.limits.resident_bytes) == 2
    assert in_activations(problem, problem.limits.activation_bytes) == 8.5
    assert uniform_problem(ranks=8, microbatches=20, f=2, i=2, w=1).limits.activation_bytes \
        == 9 * activation_unit_bytes(problem)


@pytest.mark.parametrize("fb", [25.5, 30, 0.85 * 30, Fraction(77, 3)])
def test_overlap_is_exact_on_the_even_cut(fb):
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=11, w=9, fb=fb)
    unit = problem.unit_ns
    assert problem.overlap.duration_ns(10 * unit, 20 * unit) == round(Fraction(fb).limit_denominator(10**6) * unit)


def test_transfers_take_comm_within_and_between():
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1.5)
    assert in_units(problem, problem.topology.transfer_ns(0, 3, 0)) == 1.5
    assert problem.topology.transfer_ns(2, 2, 0) == 0


def test_two_streams():
    """The issue's layer: 36 of F, 39 of I, 17 of W; collectives without W; overlap brings 92 to 60."""
    problem = two_stream_problem(ranks=8, microbatches=20)
    layer = [group.times["device"] for group in problem.groups[:4]]
    unit = problem.unit_ns
    assert sum(times.f_ns for times in layer) == 36 * unit
    assert sum(times.i_ns for times in layer) == 39 * unit
    assert sum(times.w_ns or 0 for times in layer) == 17 * unit
    assert [group.stream for group in problem.groups[:4]] == [Stream.COMPUTE, Stream.COLLECTIVE] * 2
    assert [times.w_ns is None for times in layer] == [False, True, False, True]
    assert problem.overlap.duration_ns(36 * unit, 56 * unit) == 60 * unit
    assert problem.colocate[1] == (4, 5, 6, 7)
    assert problem.limits.activation_bytes == 9 * activation_unit_bytes(problem)


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"microbatches": 0}, {"layers": 0}, {"f": -1}, {"comm": -0.1},
                                   {"w": "soon"}, {"i": float("inf")}, {"w": "1/0"}, {"f": 1e-7}, {"i": "1e-7"},
                                   {"comm": 4e-7}, {"first": 1e-9}, {"last": 1e-7}, {"fb": 1e-7}, {"copies": 1e-7},
                                   {"activations": 1e-7}])
def test_bad_numbers(wrong):
    arguments = {"ranks": 2, "microbatches": 2, "f": 1, "i": 1, "w": 1} | wrong
    with pytest.raises(ProblemError, match=f"^{next(iter(wrong))}: found|ranks|layers|microbatches"):
        uniform_problem(**arguments)


def test_what_is_above_zero_stays_so():
    problem = uniform_problem(ranks=2, microbatches=2, f=1e-6, i=1e-6, w=0, comm=1e-6, layers=6)
    assert all(group.times["device"].f_ns > 0 == group.times["device"].w_ns for group in problem.groups)
    assert problem.topology.within_host.latency_ns > 0
    with pytest.raises(ProblemError, match="attention"):
        two_stream_problem(ranks=2, microbatches=2, attention=(1, 1e-7, 1))
