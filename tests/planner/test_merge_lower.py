"""Programs of merges: every row read and merged once, memory within the cap, damage found by the simulator."""

import dataclasses
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from merge_units import RATES, graph, unit

from mipipe.graphs.errors import InfeasibleError, ProgramError
from mipipe.graphs.merging.graph import MergeGraph, MergeModel
from mipipe.planner.actions import ActionKind
from mipipe.planner.merging.lower import lower_merge
from mipipe.planner.merging.plan import plan_merge
from mipipe.planner.merging.simulate import simulate_merge
from mipipe.planner.merging.steps import TILE_ENTRIES, unit_steps

K = ActionKind


def with_parameters(made, **parameters):
    units = tuple(dataclasses.replace(item, parameters=parameters) for item in made.units)
    return dataclasses.replace(made, units=units)


def ties(rows, scope="tensor"):
    return with_parameters(graph(rows, "ties"), weight=[1.0, 1.0], density=[0.5, 0.5], scope=scope, zero_sum="plus")


@given(rows=st.lists(st.integers(1, 40_000), min_size=1, max_size=4), scope=st.sampled_from(["tensor", "model"]),
       portion=st.sampled_from([TILE_ENTRIES, 3 * TILE_ENTRIES]), ahead=st.integers(0, 2), ranks=st.integers(1, 2))
@settings(max_examples=15, deadline=None)
def test_every_row_is_read_once_per_round_and_saved_once(rows, scope, portion, ahead, ranks):
    made = ties(rows, scope)
    plan = dataclasses.replace(plan_merge(made, ranks, RATES), portion_entries=portion, ahead=ahead)
    program = lower_merge(plan)
    simulate_merge(plan, program)
    for index, item in enumerate(made.units):
        steps = unit_steps(item, made, portion)
        for number in (0, 1, None):
            covered = [(step.start, step.stop) for step in steps if step.round == number]
            assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
            assert covered[-1][1] == item.shape[0]
        found = [(instruction.kind, instruction.action.microbatch) for rank in program.ranks for instruction in rank
                 if instruction.action is not None and instruction.action.stage == index]
        expected = [(kind, place) for place, step in enumerate(steps)
                    for kind in (K.LOAD, step.kind, K.FREE, *([K.SAVE] if step.round is None else []))]
        assert sorted(found) == sorted(expected)
    exchanges = [sum(item.kind is K.ALL_REDUCE for item in rank) for rank in program.ranks]
    assert exchanges == [2 if scope == "model" else 0] * ranks


@given(cap=st.integers(10**6, 3 * 10**8), cores=st.integers(1, 4), method=st.sampled_from(["linear", "tsvm"]))
@settings(max_examples=15, deadline=None)
def test_the_simulated_peak_stays_within_the_cap(cap, cores, method):
    made = graph([30_000, 5_000, 100, 1], method)
    try:
        plan = plan_merge(made, 2, dataclasses.replace(RATES, cores=cores), cap)
    except InfeasibleError as error:
        assert "raise --memory" in str(error)
        return
    timeline = simulate_merge(plan, lower_merge(plan))
    assert all(0 < timeline.peak_bytes(rank) <= plan.memory_bytes <= cap for rank in range(2))


def test_reading_ahead_hides_reading_behind_computing():
    made = graph([40_000] * 4)
    ahead = plan_merge(made, 1, dataclasses.replace(RATES, cores=4))
    behind = dataclasses.replace(ahead, ahead=0)
    first, second = (simulate_merge(plan, lower_merge(plan)) for plan in (ahead, behind))
    assert ahead.ahead == 1 and second.makespan_ns == pytest.approx(ahead.time_ns, rel=1e-3)
    reading = sum(load.read_bytes for load in ahead.loads) / RATES.read * 1e9
    assert second.makespan_ns - reading <= first.makespan_ns < second.makespan_ns - 0.75 * reading


def test_copies_have_no_arithmetic():
    copied = dataclasses.replace(unit("a", 10), method="copy")
    models = tuple(MergeModel(label, "folder", label, "mit", 0) for label in "ab")
    plan = plan_merge(MergeGraph((copied,), models, {}, {}, "folder", {}), 1, RATES)
    assert [item.kind for item in lower_merge(plan).ranks[0]] == [K.LOAD, K.SAVE, K.FREE]
    simulate_merge(plan, lower_merge(plan))


@pytest.mark.parametrize(("kind", "message"), [
    (K.LOAD, "computes on what was not loaded"), (K.FREE, "is never freed"), (K.COMBINE, "saves what was not merged"),
    (K.SAVE, "is never saved"), (K.ALL_REDUCE, "waits at an ALL_REDUCE that not all ranks reach"),
])
def test_a_program_that_lacks_an_instruction_is_refused(kind, message):
    plan = plan_merge(ties([100, 200], "model"), 2, RATES)
    first, second = lower_merge(plan).ranks
    place = next(number for number, item in enumerate(first) if item.kind is kind)
    program = dataclasses.replace(lower_merge(plan), ranks=(first[:place] + first[place + 1:], second))
    with pytest.raises(ProgramError, match=message):
        simulate_merge(plan, program)
