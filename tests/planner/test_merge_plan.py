"""Balance of merges over ranks: every unit once, near the bound, never worse than longest first; memory as a limit."""

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from merge_units import RATES, graph, unit

from mipipe.graphs.errors import InfeasibleError
from mipipe.planner.merging.costs import work_bytes
from mipipe.planner.merging.plan import longest_first, plan_merge
from mipipe.planner.milp.merge_balance import EPSILON, UnitKind, balance


def longest(ranks, times):
    return max(sum(times[index] for index in rank) for rank in ranks)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), ranks=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_every_unit_has_one_rank_and_the_plan_is_no_worse_than_longest_first(sizes, ranks):
    plan = plan_merge(graph(sizes), ranks, RATES)
    assert sorted(index for rank in plan.ranks for index in rank) == list(range(len(sizes)))
    times = [plan_merge(graph([size]), 1, RATES).time_ns for size in sizes]
    assert plan.time_ns >= plan.bound_ns
    greedy = longest(longest_first(times, ranks), times)
    assert plan.time_ns <= greedy * (1 + 3 * EPSILON) + ranks


@given(times=st.lists(st.integers(1, 20), min_size=2, max_size=7))
@settings(max_examples=10, deadline=None)
def test_the_milp_finds_the_best_split_of_tiny_cases(times):
    """Against all assignments to two ranks; the balance of bytes may cost its small weight."""
    kinds = {time: times.count(time) for time in times}
    order = sorted(kinds)
    start = [[kinds[time], 0] for time in order]
    counts, outcome = balance([UnitKind(kinds[time], time, 1, 1, 1) for time in order], 2, start, 5.0)
    found = max(sum(time * row[rank] for time, row in zip(order, counts, strict=True)) for rank in range(2))
    best = min(max(sum(times[index] for index in chosen), sum(times) - sum(times[index] for index in chosen))
               for size in range(len(times) + 1) for chosen in itertools.combinations(range(len(times)), size))
    assert outcome.has_solution
    assert found <= best * (1 + 3 * EPSILON) + 0.5 * EPSILON * sum(times)


def test_many_equal_layers_are_balanced_by_kind():
    """20,000 units of four kinds: the size of the MIP is the number of kinds."""
    plan = plan_merge(graph([1024, 512, 512, 16] * 5000), 8, RATES)
    assert plan.provenance["kinds"] == 3
    assert plan.time_ns <= plan.bound_ns * 1.01


def test_the_memory_cap_is_kept_or_refused():
    small = plan_merge(graph([100, 200]), 2, RATES, memory_cap=10**9)
    assert small.memory_bytes <= 10**9
    with pytest.raises(InfeasibleError, match=r"merging t000 of shape .* takes .* at once; raise --memory"):
        plan_merge(graph([4096]), 1, RATES, memory_cap=10**6)


def test_tiles_bound_the_memory_of_elementwise_methods_but_not_of_spectral_ones():
    assert work_bytes(unit("a", 10**6)) == work_bytes(unit("b", 10**7))
    assert work_bytes(unit("a", 4096, "tsvm", 4096)) > 5 * work_bytes(unit("b", 4096, "linear", 4096))
