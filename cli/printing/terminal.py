"""Timelines as text: one line per rank, width is true duration, readable with and without colours.

A cell shows what its action is and on which microbatch (``F3``, ``I3``, ``W3``, ``B3``; ``F3B1`` for an overlapped
pair). Lower case is every second stage of a rank, so that the two halves of a V or of a two-way pipeline can be told
apart. Dots are idle time. The collective stream gets a line of its own where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from mipipe.graphs.topology import UNLIMITED_BYTES
from mipipe.graphs.units import format_bytes, format_ns
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.timeline import ALL_KINDS, ALL_STREAMS, Span, Timeline

STYLES = {
    ActionKind.F: ("black on #8ab4f8", "black on #c6dafc"),
    ActionKind.I: ("black on #81c995", "black on #c5e7cd"),
    ActionKind.W: ("black on #fcc55c", "black on #fde3ad"),
    ActionKind.B: ("black on #66c2a5", "black on #b8e4d7"),
    ActionKind.OVERLAP_F_B: ("black on #c79be8", "black on #e3cdf4"),
    ActionKind.RECOMPUTE: ("black on #b0bec5", "black on #d8dfe2"),
    ActionKind.OPTIMIZER_STEP: ("black on #e6b8a2", "black on #e6b8a2"),
    ActionKind.CALIBRATE: ("black on #d7aefb", "black on #e9d2fd"),
    ActionKind.MEASURE: ("black on #fcc55c", "black on #fde3ad"),
    ActionKind.COMBINE: ("black on #8ab4f8", "black on #c6dafc"),
    ActionKind.SAVE: ("black on #81c995", "black on #c5e7cd"),
}
_COMM = ("black on #f48fb1", "black on #f9c6d8")
_OVERLAP = re.compile(r"\(\d+F(\d+);\d+B(\d+)\)OVERLAP_F_B")


def format_time(ns: float, unit_ns: int) -> str:
    """A time in the unit people gave (``15``), or with a unit of its own where times were measured (``1.2 ms``)."""
    return f"{ns / unit_ns:g}" if unit_ns != 1 else format_ns(ns)


def draw_timeline(timeline: Timeline, width: int, until_ns: int | None = None) -> Text:
    """The timeline as lines of at most ``width`` characters.

    ``until_ns`` is the time at the right edge (default: the makespan); several timelines drawn with the same value
    have the same scale.
    """
    until = max(until_ns or timeline.makespan_ns, 1)
    names = [f"rank {rank}" for rank in range(timeline.num_ranks)]
    gutter = max(map(len, names)) + 1
    columns = max(width - gutter - 9, 10)
    text = Text(no_wrap=True, overflow="crop")
    bubbles = timeline.bubbles_ns()
    makespan = max(timeline.makespan_ns, 1)
    stages = stages_by_rank(timeline)
    for stream in (Stream.COMPUTE, Stream.COLLECTIVE):
        if stream is Stream.COLLECTIVE and not _visible(timeline, stream, columns, until):
            continue
        if stream is Stream.COLLECTIVE:
            text.append("communication stream\n", "dim")
        for rank in range(timeline.num_ranks):
            text.append(f"{names[rank]:<{gutter}}", "bold")
            text.append_text(_line(_seen(timeline, rank, stream, columns, until), stages[rank], columns, until))
            if stream is Stream.COMPUTE:
                text.append(f" {bubbles[rank] / makespan:6.1%} ", "dim")
            text.append("\n")
    text.append_text(_axis(until, timeline.unit_ns, columns, gutter))
    return text


def _visible(timeline: Timeline, stream: Stream, columns: int, until: int) -> bool:
    """Whether anything on the stream is drawn: reaches into another column than it begins in."""
    at = timeline.columns
    own = at.stream == ALL_STREAMS.index(stream)
    begin, end = (np.rint(time[own].astype(float) * columns / until) for time in (at.start_ns, at.end_ns))
    return bool((np.minimum(end, columns) > begin).any())


def stages_by_rank(timeline: Timeline) -> list[list[int]]:
    """The stages each rank computes, in the order of their numbers."""
    at = timeline.columns
    chosen = (at.stage >= 0) & (at.stream != ALL_STREAMS.index(Stream.CHANNEL))
    found: list[list[int]] = [[] for _ in range(timeline.num_ranks)]
    width = int(at.stage.max(initial=0)) + 1
    for key in np.unique(at.rank[chosen] * width + at.stage[chosen]).tolist():
        found[key // width].append(key % width)
    return found


def _seen(timeline: Timeline, rank: int, stream: Stream, columns: int, until: int) -> list[Span]:
    """The spans of a line that reach into another column than they begin in, by start."""
    at = timeline.columns
    own = np.flatnonzero((at.rank == rank) & (at.stream == ALL_STREAMS.index(stream)))
    begin, end = (np.rint(time[own].astype(float) * columns / until) for time in (at.start_ns, at.end_ns))
    return sorted((timeline.spans[n] for n in own[end > begin].tolist()), key=lambda span: (span.start_ns, span.end_ns))


def _line(spans: Sequence[Span], stages: Sequence[int], columns: int, until: int) -> Text:
    line = Text()
    at = 0
    for span in spans:
        begin, end = (round(time * columns / until) for time in (span.start_ns, span.end_ns))
        begin, end = max(begin, at), min(end, columns)
        if end <= begin:
            continue
        line.append("·" * (begin - at), "dim")
        second = span.stage in stages and stages.index(span.stage) % 2 == 1
        style = STYLES.get(span.kind, _COMM)[second]
        label = _label(span, end - begin)
        line.append((label.lower() if second else label).ljust(end - begin), style)
        at = end
    line.append("·" * (columns - at), "dim")
    return line


def _label(span: Span, room: int) -> str:
    overlap = _OVERLAP.fullmatch(span.label)
    if overlap:
        choices = [f"F{overlap[1]}B{overlap[2]}", "FB", "X"]
    elif span.kind is ActionKind.OPTIMIZER_STEP:
        choices = ["optimizer", "opt", "O"]
    elif span.kind is ActionKind.ALL_REDUCE:
        choices = ["all-reduce", "ar", "A"]
    else:
        letter = "R" if span.kind is ActionKind.RECOMPUTE else span.kind.value[0]
        choices = [f"{letter}{span.microbatch}" if span.microbatch >= 0 else letter, letter]
    return next((choice for choice in choices if len(choice) <= room), "")


def _axis(until: int, unit_ns: int, columns: int, gutter: int) -> Text:
    """A ruler with a tick at every quarter."""
    ruler = [" "] * (columns + 12)
    for quarter in range(5):
        label = format_time(until * quarter / 4, unit_ns) if quarter else "0"
        at = round(columns * quarter / 4)
        label = "|" + label
        for offset, letter in enumerate(label):
            if at + offset < len(ruler):
                ruler[at + offset] = letter
    return Text(" " * gutter + "".join(ruler).rstrip() + "\n", "dim")


def legend(*timelines: Timeline) -> Text:
    """The kinds of actions that occur in any of the timelines, in their colours."""
    names = {ActionKind.F: "F forward", ActionKind.I: "I input gradient", ActionKind.W: "W weight gradient",
             ActionKind.B: "B both gradients", ActionKind.OVERLAP_F_B: "FB or X forward and backward overlapped",
             ActionKind.RECOMPUTE: "R recompute", ActionKind.ALL_REDUCE: "A all-reduce",
             ActionKind.ALL_TO_ALL: "all-to-all", ActionKind.OPTIMIZER_STEP: "O optimizer",
             ActionKind.CALIBRATE: "K calibrate", ActionKind.MEASURE: "M measure", ActionKind.COMBINE: "C combine",
             ActionKind.SAVE: "S save"}
    kinds = {ALL_KINDS[kind] for at in (timeline.columns for timeline in timelines) for kind in np.unique(
        at.kind[(at.stream != ALL_STREAMS.index(Stream.CHANNEL)) & (at.end_ns > at.start_ns)]).tolist()}
    text = Text()
    for kind, name in names.items():
        if kind in kinds:
            text.append(f" {name} ", STYLES.get(kind, _COMM)[0])
            text.append(" ")
    text.append("· idle, blank: the action goes on", "dim")
    if any(len(stages) > 1 for timeline in timelines for stages in stages_by_rank(timeline)):
        text.append("  lower case: every second stage of the rank (of two half-stages: the second); right: the rank's"
                    " bubble", "dim")
    else:
        text.append("  right: the rank's bubble", "dim")
    return text


def summary(timeline: Timeline) -> str:
    """Makespan and bubbles in one line."""
    unit = timeline.unit_ns
    bubbles = timeline.bubbles_ns()
    mean = sum(bubbles) / len(bubbles)
    return (f"makespan {format_time(timeline.makespan_ns, unit)}, bubble {format_time(max(bubbles), unit)} (mean"
            f" {format_time(mean, unit)}), bubble ratio {timeline.bubble_ratio:.1%}")


def memory_lines(timeline: Timeline, capacities: Sequence[int | None], uses: Sequence[str] = ()) -> list[str]:
    """One line per rank: peak against capacity, and what it is used for. Empty where no memory was recorded."""
    if not timeline.memory:
        return []
    lines = []
    for rank, capacity in enumerate(capacities):
        peak = timeline.peak_bytes(rank)
        resident = timeline.resident_bytes[rank] if timeline.resident_bytes else 0
        use = uses[rank] if uses else f"resident {format_bytes(resident)}"
        text = f"rank {rank}: peak {format_bytes(peak)} ({use})"
        if capacity is not None and capacity < UNLIMITED_BYTES:
            text += f" of {format_bytes(capacity)}, {peak / max(capacity, 1):.0%}"
        lines.append(text)
    return lines
