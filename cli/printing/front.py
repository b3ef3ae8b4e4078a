"""Trials of a search as one self-contained HTML file: a scatter for every pair of scores, and the table."""

from __future__ import annotations

import html
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from mipipe.graphs.serialize import write_text

if TYPE_CHECKING:
    from mipipe.runtime.tuning.tune import TuneResult

SIZE, EDGE = 360, 48
"""Pixels of a scatter, and of its margins."""
STYLE = """body{font:14px system-ui;margin:2em;color:#202124}svg{margin:0 2em 1em 0}table{border-collapse:collapse}
td,th{border:1px solid #dadce0;padding:3px 8px;text-align:right}tr.front{background:#e6f4ea}tr.best{background:#a8dab5}
circle{fill:#9aa0a6}circle.front{fill:#1a73e8}circle.best{fill:#188038}text{font-size:11px;fill:#5f6368}"""


def write_front(path: Path, title: str, result: TuneResult) -> None:
    """Write the page."""
    scores = list(result.trials[0].scores)
    pairs = list(combinations(scores, 2)) or [(result.names[0], scores[0])]
    plots = "".join(_scatter(result, *pair) for pair in pairs)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (*result.names, *scores))
    rows = "".join(f'<tr class="{_kind(result, index)}">'
                   + "".join(f"<td>{html.escape(_text(value))}</td>" for value in
                             (*trial.values, *(trial.scores[name] for name in scores))) + "</tr>"
                   for index, trial in enumerate(result.trials))
    write_text(path, f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
                     f"<h1>{html.escape(title)}</h1><p>{len(result.trials)} points; blue: no other beats them; green:"
                     f" the"
                     f" best by the weighted sum.</p>{plots}<table><tr>{head}</tr>{rows}</table>\n")


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _kind(result: TuneResult, index: int) -> str:
    return "best" if index == result.best else "front" if index in result.front else ""


def _scatter(result: TuneResult, first: str, second: str) -> str:
    """One score (or free value) against another."""
    def column(name: str) -> list[float]:
        if name in result.names:
            place = result.names.index(name)
            return [float(trial.values[place]) if isinstance(trial.values[place], (int, float)) else float(number)
                    for number, trial in enumerate(result.trials)]
        return [trial.scores[name] for trial in result.trials]

    across, up = column(first), column(second)

    def at(value: float, values: list[float]) -> float:
        low, high = min(values), max(values)
        return EDGE + (SIZE - 2 * EDGE) * ((value - low) / (high - low) if high > low else 0.5)

    dots = "".join(f'<circle r=4 cx={at(x, across):.1f} cy={SIZE - at(y, up):.1f} class="{_kind(result, index)}">'
                   f"<title>{html.escape(', '.join(map(_text, result.trials[index].values)))}</title></circle>"
                   for index, (x, y) in enumerate(zip(across, up, strict=True)))
    ends = (f"<text x={EDGE} y={SIZE - 24}>{min(across):.4g}</text><text x={SIZE - EDGE} y={SIZE - 24} text-anchor=end>"
            f"{max(across):.4g}</text><text x=4 y={SIZE - EDGE}>{min(up):.4g}</text><text x=4"
            f" y={EDGE}>{max(up):.4g}</text>")
    names = (f"<text x={SIZE // 2} y={SIZE - 8} text-anchor=middle>{html.escape(first)}</text>"
             f"<text x=8 y=20>{html.escape(second)}</text>")
    side = SIZE - 2 * EDGE + 16
    frame = f"<rect x={EDGE - 8} y={EDGE - 8} width={side} height={side} fill=none stroke=#dadce0 />"
    return f"<svg width={SIZE} height={SIZE}>{frame}{dots}{ends}{names}</svg>"
