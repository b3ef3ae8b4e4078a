"""A coarse graph as SVG: top to bottom in ranks, branches side by side, long edges in lanes beside the groups.

A layered drawing (Sugiyama, Tagawa and Toda, 1981): ranks by longest path, places for edges that pass a rank, order
within ranks by barycentres, then positions pulled towards the neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from mipipe.graphs.coarse.graph import CoarseGraph, OpGroup
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.units import format_bytes

WIDTH, HEIGHT, GAP_X, GAP_Y, LANE = 220.0, 34.0, 26.0, 22.0, 10.0
COLOURS = ("#4c78a8", "#e6872d", "#54a24b", "#b279a2", "#9c755f", "#d4a72c")
COLLECTIVE = "#888888"
SWEEPS = 6


@dataclass(slots=True)
class _Layout:
    """Places in ranks: groups have their number, lanes negative ids. ``above`` and ``below`` are neighbours."""

    ranks: list[list[int]]
    above: dict[int, list[int]] = field(default_factory=dict)
    below: dict[int, list[int]] = field(default_factory=dict)
    x: dict[int, float] = field(default_factory=dict)

    def join(self, upper: int, lower: int) -> None:
        if lower not in self.below.setdefault(upper, []):
            self.below[upper].append(lower)
            self.above.setdefault(lower, []).append(upper)


def draw_graph(coarse: CoarseGraph) -> str:
    """The SVG text of a coarse graph; every group and edge has a title with its numbers."""
    sizes: dict[tuple[int, int], int] = {}
    for value in coarse.values:
        for target in value.targets:
            sizes[value.source, target] = sizes.get((value.source, target), 0) + value.num_bytes
    rank_of = _ranks(len(coarse.groups), sizes)
    layout, paths = _lay_out(rank_of, sizes)
    _order(layout)
    _place(layout)
    left = min(layout.x[place] - _half(place) for row in layout.ranks for place in row)
    right = max(layout.x[place] + _half(place) for row in layout.ranks for place in row)
    branches = sorted({group.tags.branch for group in coarse.groups if group.tags.branch})
    legend = 24.0 if branches else 0.0
    width, height = right - left + 2 * GAP_X, len(layout.ranks) * (HEIGHT + GAP_Y) + GAP_Y + legend
    rank = {place: number for number, row in enumerate(layout.ranks) for place in row}
    at = {place: (layout.x[place] - left + GAP_X, legend + GAP_Y + rank[place] * (HEIGHT + GAP_Y)) for place in rank}
    widest = max(sizes.values(), default=1)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
             f' height="{height:.0f}" font-family="system-ui, sans-serif" font-size="11" role="img">',
             f"<title>{escape(coarse.model)}: {len(coarse.groups)} groups</title>"]
    for number, branch in enumerate(branches):
        parts.append(f'<text x="{GAP_X + 110 * number:.0f}" y="16" fill="{_colour(branches, branch)}"'
                     f' font-weight="bold">{escape(branch)}</text>')
    for (source, target), size in sizes.items():
        title = f"{coarse.groups[source].name} to {coarse.groups[target].name}: {format_bytes(size)}"
        parts.append(_edge([at[place] for place in paths[source, target]], 1 + 2 * size / max(widest, 1), title))
    heaviest = max(sum(group.flops.values()) for group in coarse.groups) or 1
    for number, group in enumerate(coarse.groups):
        colour = COLLECTIVE if group.collective else _colour(branches, group.tags.branch)
        parts.append(_box(group, *at[number], colour, sum(group.flops.values()) / heaviest))
    return "\n".join([*parts, "</svg>"])


def _colour(branches: Sequence[str], branch: str | None) -> str:
    return COLOURS[branches.index(branch) % len(COLOURS)] if branch in branches else COLOURS[0]


def _half(place: int) -> float:
    return WIDTH / 2 if place >= 0 else LANE / 2


def _ranks(count: int, sizes: dict[tuple[int, int], int]) -> list[int]:
    """Longest path from a source; groups without predecessors sit right above their first reader."""
    rank = [0] * count
    for source, target in sorted(sizes, key=lambda pair: pair[1]):
        rank[target] = max(rank[target], rank[source] + 1)
    entered = {target for _, target in sizes}
    for number in range(count):
        readers = [rank[target] for source, target in sizes if source == number]
        if number not in entered and readers:
            rank[number] = min(readers) - 1
    return rank


def _lay_out(rank_of: list[int],
             sizes: dict[tuple[int, int], int]) -> tuple[_Layout, dict[tuple[int, int], list[int]]]:
    """Ranks with lanes for long edges, and the places each edge passes.

    Long edges share a lane with the others of their source or of their target, whichever has more of them.
    """
    layout = _Layout([[] for _ in range(max(rank_of) + 1)])
    for number, rank in enumerate(rank_of):
        layout.ranks[rank].append(number)
    long = [pair for pair in sizes if rank_of[pair[1]] - rank_of[pair[0]] > 1]
    leaving: dict[int, int] = {}
    entering: dict[int, int] = {}
    for source, target in long:
        leaving[source] = leaving.get(source, 0) + 1
        entering[target] = entering.get(target, 0) + 1
    lanes: dict[tuple[str, int, int], int] = {}
    paths: dict[tuple[int, int], list[int]] = {}
    for source, target in sizes:
        path = [source]
        by_source = leaving.get(source, 0) >= entering.get(target, 0)
        for rank in range(rank_of[source] + 1, rank_of[target]):
            key = ("from", source, rank) if by_source else ("to", target, rank)
            if key not in lanes:
                lanes[key] = -1 - len(lanes)
                layout.ranks[rank].append(lanes[key])
            path.append(lanes[key])
        path.append(target)
        for upper, lower in itertools.pairwise(path):
            layout.join(upper, lower)
        paths[source, target] = path
    return layout, paths


def _order(layout: _Layout) -> None:
    """Order every rank by the mean position of its neighbours, down and up in turns."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        near = layout.above if down else layout.below
        rows = layout.ranks if down else layout.ranks[::-1]
        for before, row in itertools.pairwise(rows):
            position = {place: number for number, place in enumerate(before)}
            own = {place: number for number, place in enumerate(row)}

            def centre(place: int, position: dict[int, int] = position, own: dict[int, int] = own,
                       near: dict[int, list[int]] = near) -> float:
                known = [position[other] for other in near.get(place, ()) if other in position]
                return sum(known) / len(known) if known else float(own[place])

            row.sort(key=lambda place: (centre(place), place < 0))


def _place(layout: _Layout) -> None:
    """Horizontal centres: each rank packed, then pulled towards its neighbours above and below in turns."""
    for row in layout.ranks:
        _pack(layout, row, dict.fromkeys(row, 0.0))
    for sweep in range(2 * SWEEPS):
        near, rows = (layout.above, layout.ranks) if sweep % 2 == 0 else (layout.below, layout.ranks[::-1])
        for row in rows:
            wanted = {}
            for place in row:
                around = [layout.x[other] for other in near.get(place, ())]
                wanted[place] = sum(around) / len(around) if around else layout.x[place]
            _pack(layout, row, wanted)


def _pack(layout: _Layout, row: list[int], wanted: dict[int, float]) -> None:
    """Positions as near to the wanted ones as the order and the widths allow."""
    offsets = [0.0]
    for left, right in itertools.pairwise(row):
        gap = GAP_X if left >= 0 or right >= 0 else 2.0
        offsets.append(offsets[-1] + _half(left) + _half(right) + gap)
    blocks: list[tuple[float, int]] = []  # pool adjacent violators: least squares under the minimal distances
    for place, offset in zip(row, offsets, strict=True):
        blocks.append((wanted[place] - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, size), (second, other) = blocks[-2:]
            blocks[-2:] = [((first * size + second * other) / (size + other), size + other)]
    shifts = [shift for shift, size in blocks for _ in range(size)]
    for place, offset, shift in zip(row, offsets, shifts, strict=True):
        layout.x[place] = offset + shift


def _edge(points: list[tuple[float, float]], width: float, title: str) -> str:
    """A smooth line from the bottom of the first place through lanes to the top of the last."""
    x, y = points[0]
    text = f"M{x:.1f},{y + HEIGHT:.1f}"
    y += HEIGHT
    for number, (next_x, top) in enumerate(points[1:], 1):
        middle = (y + top) / 2
        text += f" C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{top:.1f}"
        x, y = next_x, top
        if number < len(points) - 1:
            y = top + HEIGHT
            text += f" L{x:.1f},{y:.1f}"
    return (f'<path d="{text}" fill="none" stroke="#999999" stroke-width="{width:.1f}" stroke-opacity="0.7">'
            f"<title>{escape(title)}</title></path>")


def _box(group: OpGroup, x: float, y: float, colour: str, share: float) -> str:
    """A group: its name, and a bar as long as its share of the heaviest group's work."""
    lines = [group.name, f"{len(group.segments)} segments", f"parameters {format_bytes(group.parameter_bytes)}",
             f"saved {format_bytes(group.saved_fi_bytes + group.saved_fw_bytes)} per microbatch"]
    lines += [f"{phase}: {group.flops[phase] / 1e9:.4g} GFLOP" for phase in Phase if phase in group.flops]
    label = group.name if len(group.name) <= 28 else f"{group.name[:9]}…{group.name[-18:]}"
    left = x - WIDTH / 2
    phases = "".join(phase.value for phase in Phase if phase in group.flops)
    return (f'<g><title>{escape(chr(10).join(lines))}</title>'
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{WIDTH:.0f}" height="{HEIGHT:.0f}" rx="4" fill="{colour}"'
            f' fill-opacity="0.15" stroke="{colour}"/>'
            f'<rect x="{left:.1f}" y="{y + HEIGHT - 5:.1f}" width="{WIDTH * share:.1f}" height="5" fill="{colour}"/>'
            f'<text x="{left + 6:.1f}" y="{y + 18:.1f}" fill="currentColor">{escape(label)}</text>'
            f'<text x="{left + WIDTH - 6:.1f}" y="{y + 18:.1f}" text-anchor="end" fill="{colour}">{phases}</text></g>')
