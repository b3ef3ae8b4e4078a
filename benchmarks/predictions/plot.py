"""Predicted over measured rates of published runs as a picture: one dot a run, by source, with a band of 10 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from predictions.report import Row

from mipipe.graphs.write_files import write_text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 800, 520, 64, 56, 20
INK, QUIET, LINE, PAPER, BAND = "#22303c", "#66757f", "#d9dfe3", "#ffffff", "#eaf1f7"
BEYOND = {0.5: "≤ ", 2.0: "≥ "}
"""What lies beyond the axis is drawn at its end."""
COLOURS = ("#2f6db3", "#d9822b", "#3f8f5b", "#a8466a", "#7a5fb0", "#8a7a2f", "#2e9c9c", "#c0504d", "#5b6b78", "#1b2a5a")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes an SVG file: x the measured tokens/s per device (logarithmic), y predicted over measured."""
    shown = [row for row in rows if row.measured_tokens_s]
    groups = list(dict.fromkeys(row.group for row in shown))
    low = math.floor(math.log10(min(row.measured_tokens_s or 1 for row in shown)))
    high = math.ceil(math.log10(max(row.measured_tokens_s or 1 for row in shown)))
    right = WIDTH - 230

    def across(rate: float) -> float:
        return LEFT + (math.log10(rate) - low) / (high - low) * (right - LEFT)

    def up(ratio: float) -> float:
        clipped = min(2.0, max(0.5, ratio))
        return TOP + (1 - math.log2(clipped)) / 2 * (HEIGHT - BOTTOM - TOP)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="13"'
             f' font-family="system-ui, sans-serif" fill="{INK}">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{PAPER}"/>',
             f'<rect x="{LEFT}" y="{up(1.1):.1f}" width="{right - LEFT}" height="{up(1 / 1.1) - up(1.1):.1f}"'
             f' fill="{BAND}"/>']
    for ratio in (0.5, 0.7, 0.9, 1.0, 1.1, 1.4, 2.0):
        strong = INK if ratio == 1 else LINE
        parts += [f'<line x1="{LEFT}" x2="{right}" y1="{up(ratio):.1f}" y2="{up(ratio):.1f}" stroke="{strong}"/>',
                  f'<text x="{LEFT - 8}" y="{up(ratio) + 4:.1f}" text-anchor="end" fill="{QUIET}">'
                  f'{BEYOND.get(ratio, "")}{ratio:g}</text>']
    for power in range(low, high + 1):
        x = across(10 ** power)
        parts += [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{LINE}"/>',
                  f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="{QUIET}">'
                  f'{10 ** power:,}</text>']
    parts += [f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">measured tokens/s per device'
              '</text>',
              f'<text x="16" y="{(HEIGHT - BOTTOM) / 2}" text-anchor="middle"'
              f' transform="rotate(-90 16 {(HEIGHT - BOTTOM) / 2})">predicted / measured rate</text>']
    for row in shown:
        colour = COLOURS[groups.index(row.group) % len(COLOURS)]
        x, y = across(row.measured_tokens_s or 1), up(1 / row.ratio)
        told = escape(f"{row.name} {row.model}, {row.hardware}: {1 / row.ratio:.2f}")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.75">'
                     f'<title>{told}</title></circle>')
    for number, group in enumerate(groups):
        y = TOP + 14 + 22 * number
        parts += [f'<circle cx="{right + 16}" cy="{y - 4}" r="5" fill="{COLOURS[number % len(COLOURS)]}"/>',
                  f'<text x="{right + 28}" y="{y}" font-size="12">{group.replace("_", " ")}</text>']
    write_text(path, "\n".join([*parts, "</svg>", ""]))
