"""Predictions beside what others measured and published.

    python benchmarks/published.py --runs runs.csv
    python benchmarks/published.py --zero-bubble zero_bubble.csv --sailor sailor.csv --profiles profiles.json [--json]

``--runs``: every row is built as `predictions/rows.py` says (the model captured on the meta device, degrees, schedule,
recomputation and precision as given, costs of the shipped device kinds, the simulator) and reported as
`predictions/report.py` says. ``--zero-bubble`` and ``--sailor``: `predictions/zero_bubble.py` and
`predictions/sailor.py`. Rows that cannot be built are listed with the reason. Progress goes to stderr. A model is
captured once at each length of its sequences; captures are kept in a folder (``--cache``), where a second run finds
them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from predictions.build import Builder
from predictions.plot import draw
from predictions.report import predict, show, summary
from predictions.rows import read_runs
from predictions.sailor import sailor, show_sailor
from predictions.zero_bubble import show_zero_bubble, zero_bubble
from rich.console import Console

from mipipe.graphs.cache import cache_folder
from mipipe.graphs.errors import MipipeError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--zero-bubble", type=Path)
    parser.add_argument("--sailor", type=Path)
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--plot", type=Path, help="with --runs: also draw them as an SVG picture")
    parser.add_argument("--brief", action="store_true", help="with --runs: errors by source, not every row")
    parser.add_argument("--cache", type=Path, default=cache_folder("published"), help="folder of captured graphs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.runs is None and options.zero_bubble is None and options.sailor is None:
        parser.error("give --runs FILE, --zero-bubble FILE, or --sailor FILE with --profiles FILE")
    if (options.sailor is None) != (options.profiles is None):
        parser.error("--sailor and --profiles go together")
    if options.runs is None and (options.plot is not None or options.brief):
        parser.error("--plot and --brief go with --runs")
    if options.plot is not None and not options.plot.resolve().parent.is_dir():
        parser.error(f"--plot {options.plot}: no such folder")
    began = time.monotonic()

    def told(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    told(f"captures are kept in {options.cache}")
    try:
        builder = Builder(folder=options.cache)
        runs, left = ([], []) if options.runs is None else predict(read_runs(options.runs), builder, told)
        rates, steps, odd = ([], [], []) if options.zero_bubble is None else zero_bubble(options.zero_bubble)
        plans = [] if options.sailor is None else sailor(options.sailor, options.profiles, builder, told)
    except (OSError, MipipeError) as error:
        sys.exit(f"published: {error}")
    told("done")
    if options.plot is not None and any(row.measured_tokens_s for row in runs):
        draw(runs, options.plot)
    console = Console(width=140)
    if options.json:
        json.dump({"runs": [asdict(row) for row in runs], "runs_summary": summary(runs, left),
                   "zero_bubble": {"rates": [asdict(row) for row in rates], "steps": [asdict(row) for row in steps],
                                   "not_built": odd},
                   "sailor": [asdict(row) for row in plans]}, sys.stdout, indent=1)
        return
    if runs or left:
        show(Console(width=130 if options.brief else 200), runs, left, brief=options.brief)
    if rates or steps or odd:
        show_zero_bubble(console, rates, steps, odd)
    if plans:
        show_sailor(console, plans)


if __name__ == "__main__":
    main()
