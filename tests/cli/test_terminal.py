"""The drawn timeline: true durations, labels that fit, one scale for several, nothing wider than asked."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mipipe.cli.printing import terminal
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.timeline import Span, Timeline

MS = 10**6


def compute(rank: int, label: str, start: int, end: int, stage: int | None = None) -> Span:
    """A span on the compute stream from its text form, in milliseconds."""
    from mipipe.planner.actions import Action

    action = Action.parse(label)
    return Span(rank, Stream.COMPUTE, action.kind, label, start * MS, end * MS,
                action.stage if stage is None else stage, action.microbatch)


@pytest.fixture
def timeline() -> Timeline:
    """Two ranks, 20 units: rank 0 computes F0 F1 and the gradients of 0, rank 1 sits between."""
    spans = (compute(0, "0F0", 0, 4), compute(0, "0F1", 4, 8), compute(0, "0I0", 14, 18), compute(0, "0W0", 18, 20),
             compute(1, "1F0", 5, 9), compute(1, "1B0", 9, 13))
    return Timeline("simulated", 2, spans, (((0, 10), (4 * MS, 30)), ((0, 10), (9 * MS, 20))), (10, 10), unit_ns=MS)


def lines(timeline: Timeline, width: int, until: int | None = None) -> list[str]:
    return terminal.draw_timeline(timeline, width, until).plain.splitlines()


def test_widths_are_durations(timeline: Timeline) -> None:
    """20 units on 40 columns: two columns for a unit, labels at the start of their action, dots where idle."""
    drawn = lines(timeline, 7 + 40 + 9)
    assert drawn[0].startswith("rank 0 F0      F1      ············I0      W0  ")
    assert drawn[1].startswith("rank 1 ··········F0      B0      ··············")
    assert drawn[0].rstrip().endswith("30.0%")
    assert drawn[1].rstrip().endswith("60.0%")


def test_one_scale_for_several(timeline: Timeline) -> None:
    """Drawn until twice its makespan, a timeline takes half the width."""
    row = lines(timeline, 7 + 40 + 9, 40 * MS)[0]
    assert row.startswith("rank 0 F0  F1  ······I0  W0" + "·" * 20)


@given(width=st.integers(30, 300), cuts=st.lists(st.integers(0, 1000), min_size=2, max_size=30, unique=True))
def test_no_line_is_wider_than_asked(width: int, cuts: list[int]) -> None:
    cuts = sorted(cuts)
    spans = tuple(compute(0, f"0F{number}", start, end)
                  for number, (start, end) in enumerate(zip(cuts[::2], cuts[1::2], strict=False)))
    drawn = lines(Timeline("simulated", 1, spans, unit_ns=MS), width)
    assert all(len(line) <= width + 4 for line in drawn[1:])
    assert len(drawn[0]) <= width


def test_second_stage_is_lower_case() -> None:
    spans = (compute(0, "0F0", 0, 5), compute(0, "3F0", 5, 10))
    assert "F0" in lines(Timeline("simulated", 1, spans), 60)[0]
    assert "f0" in lines(Timeline("simulated", 1, spans), 60)[0]


def test_overlapped_pairs_show_both_microbatches() -> None:
    spans = (compute(0, "(0F3;1B2)OVERLAP_F_B", 0, 10),)
    assert "F3B2" in lines(Timeline("simulated", 1, spans), 60)[0]


def test_collective_stream_only_where_used(timeline: Timeline) -> None:
    assert "communication stream" not in terminal.draw_timeline(timeline, 60).plain
    reduce = Span(0, Stream.COLLECTIVE, ActionKind.ALL_REDUCE, "reduce 0", 15 * MS, 20 * MS, 0)
    more = Timeline("simulated", 2, (*timeline.spans, reduce), unit_ns=MS)
    assert "communication stream" in terminal.draw_timeline(more, 60).plain


@given(start=st.integers(0, 1000), length=st.integers(1, 1000), width=st.integers(30, 120))
def test_a_stream_of_which_nothing_would_show_has_no_lines(start: int, length: int, width: int) -> None:
    compute_span = compute(0, "0F0", 0, 2000)
    span = Span(0, Stream.COLLECTIVE, ActionKind.ALL_REDUCE, "A0", start * MS, (start + length) * MS, 0, None)
    drawn = lines(Timeline("simulated", 1, (compute_span, span), unit_ns=MS), width)
    shown = [line for line in drawn if line.startswith("rank")]
    assert ("communication stream" in drawn) == (len(shown) == 2)
    assert len(shown) == 1 or shown[1].removeprefix("rank 0 ").strip("· ")


def test_summary_and_memory(timeline: Timeline) -> None:
    assert terminal.summary(timeline) == "makespan 20, bubble 12 (mean 9), bubble ratio 45.0%"
    assert terminal.memory_lines(timeline, [60, None]) == ["rank 0: peak 30 B (resident 10 B) of 60 B, 50%",
                                                           "rank 1: peak 20 B (resident 10 B)"]


def test_an_empty_timeline_is_drawn() -> None:
    assert lines(Timeline("measured", 1, ()), 40)[0].startswith("rank 0 ···")


def test_without_a_terminal_there_are_no_escape_codes(timeline: Timeline) -> None:
    stream = io.StringIO()
    Console(file=stream, width=80).print(terminal.draw_timeline(timeline, 80))
    assert "\x1b" not in stream.getvalue()
