"""Timelines as one self-contained HTML file: true durations, memory under each rank, zoom; no network, no library.

`page` puts the data as JSON into ``timeline.html``, whose script draws it. Several timelines on one page share one
time axis, so a simulated and a measured run can be compared by eye.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mipipe.cli.printing.terminal import stages_by_rank
from mipipe.graphs.serialize import write_text
from mipipe.graphs.topology import UNLIMITED_BYTES
from mipipe.graphs.units import format_bytes
from mipipe.planner.actions import Stream
from mipipe.planner.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Panel:
    """One timeline on the page. ``capacities`` are the devices' memories in bytes, None where unlimited.

    ``sizes``: each rank's peak memory as text, in place of bytes, where the problem counts none; ``size_unit`` is then
    what one activation counts. ``stages`` names the groups of each stage.
    """

    title: str
    timeline: Timeline
    capacities: tuple[int | None, ...] = ()
    sizes: tuple[str, ...] = ()
    size_unit: float = 0.0
    stages: tuple[str, ...] = ()


def page(title: str, panels: Sequence[Panel], facts: Sequence[tuple[str, str]] = (), extra: str = "") -> str:
    """The whole HTML document. ``facts`` are shown as tiles above the timelines, ``extra`` is HTML put below them."""
    data = {"panels": [_panel(panel) for panel in panels]}
    text = script_json(data)
    tiles = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
    template = resources.files("mipipe.cli.printing").joinpath("timeline.html").read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(title), "FACTS": tiles, "EXTRA": extra, "DATA": text}
    return re.sub("%(TITLE|FACTS|EXTRA|DATA)%", lambda place: parts[place[1]], template)  # at once: parts stay as given


def script_json(data: Any) -> str:
    """JSON that may stand in a script element: no ``<``, so that no label opens a comment or ends the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write(path: str | Path, title: str, panels: Sequence[Panel], facts: Sequence[tuple[str, str]] = (),
          extra: str = "") -> None:
    """Write the page of `page` to a file."""
    write_text(path, page(title, panels, facts, extra))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; columns of numbers are aligned to the right."""
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{kind}>{html.escape(cell)}</th>" for kind, cell in zip(kinds, header, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in
                                    zip(kinds, row, strict=True)) + "</tr>" for row in rows)
    return f'<table class="report"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def frontier(points: Sequence[tuple[int, float, float, str]], size: Callable[[int], str] = format_bytes) -> str:
    """An SVG picture of (peak bytes, bubble ratio, least possible bubble ratio, label) points; ``size`` tells bytes.

    The points are joined from the least to the most memory; a dashed line joins what no plan can be below.
    """
    if not points:
        return ""
    points = sorted(points)
    wide, high, left, bottom = 720.0, 300.0, 70.0, 44.0
    most, worst = max(point[0] for point in points) * 1.08, max(max(point[1] for point in points) * 1.15, 0.01)

    def place(peak: int, ratio: float) -> tuple[float, float]:
        return left + peak / most * (wide - left), (high - bottom) * (1 - ratio / worst)

    places = [place(peak, ratio) for peak, ratio, _, _ in points]
    floor = [place(peak, least) for peak, _, least, _ in points]
    parts = [_line(floor, 'stroke="var(--soft)" stroke-dasharray="4 4"'), _line(places, 'stroke="var(--F)"')]
    for (x, y), (peak, ratio, least, label) in zip(places, points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="var(--F)"><title>{html.escape(label)}:'
                     f' {size(peak)}, bubble {ratio:.1%}, no plan below {least:.1%}</title></circle>'
                     f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{ratio:.1%}</text>'
                     f'<text x="{x:.1f}" y="{high - bottom + 18:.1f}" text-anchor="middle">{size(peak)}</text>')
    axes = (f'<path d="M{left} 0V{high - bottom}H{wide}" fill="none" stroke="var(--line)"/>'
            f'<text x="{wide / 2}" y="{high - 6}" text-anchor="middle">peak activation memory of a device</text>'
            f'<text x="{left}" y="-10">bubble ratio; dashed: no plan can be below</text>')
    frame = f'viewBox="0 -24 {wide + 30} {high + 24}" width="{wide}" font-size="12" fill="var(--soft)"'
    return f"<figure><svg {frame}>{axes}{''.join(parts)}</svg></figure>"


def _line(places: Sequence[tuple[float, float]], style: str) -> str:
    """A line through the places."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{through}" fill="none" {style} stroke-width="2"/>'


def _is_number(text: str) -> bool:
    return not text or text[0] in "-.0123456789"


def _panel(panel: Panel) -> dict[str, Any]:
    timeline = panel.timeline
    labels: dict[str, int] = {}
    kinds: dict[str, int] = {}
    stages = stages_by_rank(timeline)
    ranks: list[dict[str, Any]] = [{"compute": [], "collective": [], "channel": []} for _ in range(timeline.num_ranks)]
    shown = (span for span in timeline.spans if span.end_ns > span.start_ns)
    for span in sorted(shown, key=lambda span: (span.start_ns, span.end_ns)):
        second = int(span.stage in stages[span.rank] and stages[span.rank].index(span.stage) % 2)
        ranks[span.rank][span.stream.value].append(
            [span.start_ns, span.end_ns, kinds.setdefault(span.kind.value, len(kinds)),
             labels.setdefault(span.label, len(labels)), span.microbatch, second, span.peer, span.stage])
    for item in timeline.axes:
        ranks[item.rank].setdefault(f"along {item.axis}", []).append(
            [item.start_ns, item.end_ns, kinds.setdefault("COLLECTIVE", len(kinds)),
             labels.setdefault(item.label, len(labels)), -1, 0, None, -1])
    bubbles = timeline.bubbles_ns()
    for number, rank in enumerate(ranks):
        rank["bubble"] = bubbles[number]
        capacity = panel.capacities[number] if panel.capacities else None
        if timeline.memory and timeline.memory[number]:
            rank["memory"] = [list(step) for step in timeline.memory[number]]
            rank["peak"] = timeline.peak_bytes(number)
            rank["resident"] = timeline.resident_bytes[number] if timeline.resident_bytes else 0
            rank["peak_text"] = panel.sizes[number] if panel.sizes else format_bytes(timeline.peak_bytes(number))
            if capacity is not None and capacity < UNLIMITED_BYTES:
                rank["capacity"] = capacity
                rank["peak_text"] += f" of {format_bytes(capacity)}"
    return {"title": panel.title, "origin": timeline.origin, "makespan": timeline.makespan_ns,
            "unit": timeline.unit_ns, "ratio": timeline.bubble_ratio, "labels": list(labels), "kinds": list(kinds),
            "ranks": ranks, "streams": [stream.value for stream in Stream], "stages": list(panel.stages),
            "size_unit": panel.size_unit}
