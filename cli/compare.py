"""``mipipe compare``: published schedules and our plan on one problem, each in its stated accounting."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mipipe.cli.printing.output import (
    MOST_SECONDS,
    Html,
    Json,
    Seed,
    Without,
    check_files,
    emit,
    number,
    progress,
    stdout,
)

if TYPE_CHECKING:
    from mipipe.planner.comparison_rows import ComparisonRow
    from mipipe.planner.problem import PlanningProblem

EXAMPLE = "mipipe compare --ranks 8 --microbatches 20 --f 2 --i 2 --w 1"

CHAIN = ("ranks", "microbatches", "f", "i", "w", "comm", "fb", "layers", "first", "last", "copies", "activations",
         "attention", "dispatch", "experts", "combine")
"""What describes equal stages."""
_CHAIN = "Equal stages"
_STREAMS = "Equal MoE stages on two streams (give all four instead of --f, --i, --w)"


def compare(
    ranks: Annotated[int | None, typer.Option(help="Devices.", rich_help_panel=_CHAIN)] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches of one step.", rich_help_panel=_CHAIN)] = None,
    f: Annotated[float, typer.Option("--f", help="Forward of an even stage.", rich_help_panel=_CHAIN)] = 1.0,
    i: Annotated[float, typer.Option("--i", help="Its input gradient.", rich_help_panel=_CHAIN)] = 1.0,
    w: Annotated[float, typer.Option("--w", help="Its weight gradient.", rich_help_panel=_CHAIN)] = 1.0,
    comm: Annotated[float, typer.Option(help="Duration of each transfer.", rich_help_panel=_CHAIN)] = 0.0,
    fb: Annotated[float | None, typer.Option(help="Duration of an overlapped F&B of an even stage (default: F+I+W).",
                                             rich_help_panel=_CHAIN)] = None,
    layers: Annotated[int | None, typer.Option(help="Equal layers of the model (default: 2 per rank; on two"
                                                    " streams 1).",
                                               rich_help_panel=_CHAIN)] = None,
    first: Annotated[float, typer.Option(help="Embedding before the layers, as a fraction of an even stage.",
                                         rich_help_panel=_CHAIN)] = 0.0,
    last: Annotated[float, typer.Option(help="Head after the layers, as a fraction of an even stage.",
                                        rich_help_panel=_CHAIN)] = 0.0,
    attention: Annotated[str | None, typer.Option(help="F,I,W of an even stage's attention, such as 10,13,7.",
                                                  rich_help_panel=_STREAMS)] = None,
    dispatch: Annotated[str | None, typer.Option(help="F,I of its dispatch, on the communication stream: 8,8.",
                                                 rich_help_panel=_STREAMS)] = None,
    experts: Annotated[str | None, typer.Option(help="F,I,W of its experts: 10,10,10.",
                                                rich_help_panel=_STREAMS)] = None,
    combine: Annotated[str | None, typer.Option(help="F,I of its combine, on the communication stream: 8,8.",
                                                rich_help_panel=_STREAMS)] = None,
    copies: Annotated[float | None, typer.Option(help="Planned rows: parameters per device, in even shares, at most"
                                                      " (default 2).", min=1.0, rich_help_panel=_CHAIN)] = None,
    activations: Annotated[float | None, typer.Option(help="Planned rows: activations per device at most, in even"
                                                           " stages of one microbatch (default ranks + 1).",
                                                      rich_help_panel=_CHAIN)] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages per rank of interleaved 1F1B (default 2; where given, the"
                                                    " model has as many layers per rank, unless --layers says"
                                                    " more).", min=2, max=64, rich_help_panel=_CHAIN)] = None,
    problem_file: Annotated[Path | None, typer.Option("--problem", help="A planning problem or a plan (for its"
                                                                        " problem) instead of equal stages.")] = None,
    placement: Annotated[str, typer.Option(help="Placement of the planned row: free, chain, v, interleaved, wave,"
                                                " two-way, ...")] = "free",
    without: Without = None,
    schedules: Annotated[str | None, typer.Option(help="Which rows, separated by commas (default: all; mipipe is the"
                                                       " planned one).")] = None,
    time_limit: Annotated[float, typer.Option(
        "--time-limit", min=0.1, max=MOST_SECONDS,
        help="Seconds for all rows: published ones have half of them (below a second together up to 8 ranks, half a"
             " minute at 64 x 1,024; what is not measured by then is left out, with a note), the planned row's solves,"
             " checks and all what is left.")] = 30.0,
    seed: Seed = 0,
    draw: Annotated[bool, typer.Option("--draw", help="Draw the timelines of all rows on one time scale.")] = False,
    html_file: Html = None,
    json_output: Json = False,
) -> None:
    """Compare published schedules with the planned one: makespan, bubble, memory, bound and gap."""
    check_files(problem_file, html=html_file)
    from mipipe.cli.requests.abstract import abstract_problem
    from mipipe.cli.requests.given import refuse
    from mipipe.planner.compare import compare as compare_schedules
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.options import without as parts_off
    from mipipe.planner.schedules.one_f_one_b import CHUNKS

    if problem_file is not None:
        refuse(CHAIN, f"describes equal stages, but --problem {problem_file} is given; leave one of both out")
    elif attention is not None:
        refuse(("f", "i", "w", "first", "last"), "does not apply to stages on two streams; their durations are"
                                                       " given by --attention, --dispatch, --experts, --combine")
    chain = {"ranks": ranks, "microbatches": microbatches, "f": f, "i": i, "w": w, "comm": comm, "fb": fb,
             "layers": layers, "first": first, "last": last, "copies": copies, "activations": activations,
             "attention": attention, "dispatch": dispatch, "experts": experts, "combine": combine}
    if chunks is not None and layers is None and attention is None and ranks is not None:
        chain["layers"] = chunks * ranks
    problem = abstract_problem(problem_file, chain)
    options = PlanOptions(time_limit_s=time_limit, seed=seed, placement=placement,  # type: ignore[arg-type]
                          **parts_off(without or ()))  # type: ignore[arg-type]
    names = None if schedules is None else [name.strip() for name in schedules.split(",") if name.strip()]
    with progress("comparing") as update:
        rows = compare_schedules(problem, names, options, update, chunks or CHUNKS)
    if html_file is not None:
        _write_html(html_file, problem, rows)
    if json_output:
        emit({"problem": problem_data(problem, {} if problem_file else chain), "rows": [row.data() for row in rows]})
        return
    if draw:
        _draw(rows)
    _print(problem, rows)


def problem_data(problem: PlanningProblem, chain: dict[str, Any]) -> dict[str, Any]:
    """What was compared, with the assumptions every row rests on, as JSON data."""
    from mipipe.planner.problems.uniform import in_activations, in_copies

    limits = problem.limits
    stated = {name: value if isinstance(value, str) else number(value)
              for name, value in chain.items() if value is not None}
    return {
        "name": problem.name, "digest": problem.digest(), "unit_ns": problem.unit_ns, **stated,
        "ranks": problem.num_ranks, "microbatches": problem.num_microbatches, "groups": len(problem.groups),
        "copies": None if limits.resident_bytes is None else number(in_copies(problem, limits.resident_bytes)),
        "activations": None if limits.activation_bytes is None
        else number(in_activations(problem, limits.activation_bytes)),
        "reduction": "none" if not any(group.gradient_bytes for group in problem.groups) else "all-reduce"}


_COLUMNS = ("schedule", "accounting", "makespan", "period", "bubble", "ratio", "copies", "activations", "bound", "gap",
            "placement", "seconds", "note")


def _cells(row: ComparisonRow, unit_ns: int) -> dict[str, Any]:
    from mipipe.cli.printing.terminal import format_time

    def time(value: float | None) -> float | str | None:
        return format_time(value, 1) if unit_ns == 1 and value is not None else value

    values = (row.name, row.accounting, time(row.makespan), time(row.period), time(row.bubble),
              None if row.bubble_ratio is None else f"{row.bubble_ratio:.1%}", row.parameter_copies,
              row.peak_activations, time(row.bound), None if row.gap is None else f"{row.gap:.1%}", row.placement,
              None if row.seconds is None else round(row.seconds, 1), row.note)
    return dict(zip(_COLUMNS, values, strict=True))


def _print(problem: PlanningProblem, rows: list[ComparisonRow]) -> None:
    from mipipe.cli.printing.tables import print_rows
    from mipipe.planner.compare import PLANNED

    console = stdout()
    data = problem_data(problem, {})
    told = [f"{data[name]:g} {name}" for name in ("copies", "activations") if data[name] is not None]
    caps = f"; planned with at most {' and '.join(told)}" if told else ""
    console.print(f"{data['name']}: {data['ranks']} ranks, {data['microbatches']} microbatches{caps}")
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    marks = {note: f"({number + 1})" for number, note in enumerate(notes)}
    cells = [_cells(row, problem.unit_ns) | {"note": marks.get(row.note)} for row in rows]
    kept = [name for name in _COLUMNS if any(line[name] is not None for line in cells)]
    styles = ["bold" if row.name == PLANNED else "dim" if row.accounting == "published" else "" for row in rows]
    print_rows(console, [{name: line[name] for name in kept} for line in cells], styles=styles)
    for note, mark in marks.items():
        console.print(f"{mark} {note}", style="dim")
    for line in explanation(rows, kept):
        console.print(line, style="dim", soft_wrap=True)
    for line in planned_lines(problem, rows):
        console.print(line, markup=False)


def planned_lines(problem: PlanningProblem, rows: Sequence[ComparisonRow]) -> list[str]:
    """How the planned row was found: by which rung, what its bound holds over, HiGHS's part in it."""
    from mipipe.cli.printing.terminal import format_time
    from mipipe.planner.compare import PLANNED
    from mipipe.planner.how import how_lines

    told = []
    for row in (row for row in rows if row.name == PLANNED and row.plan is not None):
        against = "" if row.without_baselines is None else (
            "; without any published schedule as a start:"
            f" {format_time(row.without_baselines * problem.unit_ns, problem.unit_ns)}")
        proven = "no bound" if row.bound is None else f"the bound holds over {row.bound_scope}"
        told += [f"{row.name}: {line}" for line in (f"found by {row.rung}, {proven}{against}",
                                                    *(() if row.how is None else how_lines(row.how)))]
    return told


_ACCOUNTINGS = {
    "published": "the closed form of the schedule's paper, under its own assumptions: a bubble and nothing else",
    "indivisible": "B, the backward, is one block: input and weight gradient (I and W) without a gap; an overlapped"
                   " forward and backward (X) is one block, too",
    "split": "the same order with every block split into F, I and W, each as early as it can run",
    "streams": "the same order with all-to-alls on a communication stream beside computing"}
_MEANINGS = {
    "period": "the time from step to step where no barrier parts them: a rank begins its next once its own work is"
              " done; zero-bubble papers take their bubbles of it",
    "bubble": "the most idle time of any device (ratio: the mean idle share)",
    "copies": "parameters on the fullest device, in even shares of the model (1: each parameter on one device)",
    "activations": "kept on the fullest device at once; 1 is what an even stage (of one device) keeps of one"
                   " microbatch, a half-stage keeps 0.5",
    "bound": "no plan within the same copies and activations has a smaller makespan; gap: how far above it a row is"}


def explanation(rows: list[ComparisonRow], columns: Sequence[str]) -> list[str]:
    """What the accountings and columns of a table mean, as far as they occur in it."""
    used = {row.accounting for row in rows}
    return [f"{name}: {text}" for name, text in (*_ACCOUNTINGS.items(), *_MEANINGS.items())
            if name in used or name in columns]


def _draw(rows: list[ComparisonRow]) -> None:
    from mipipe.cli.printing.terminal import draw_timeline, legend, summary

    console = stdout()
    drawn = [row for row in rows if row.timeline is not None]
    until = max((row.timeline.makespan_ns for row in drawn if row.timeline is not None), default=0)
    for row in drawn:
        assert row.timeline is not None
        console.print(f"{row.name} ({row.accounting}): {summary(row.timeline)}", style="bold")
        console.print(draw_timeline(row.timeline, console.width, until))
    if drawn:
        console.print(legend(*(row.timeline for row in drawn if row.timeline is not None)))
        console.print()


def _write_html(path: Path, problem: PlanningProblem, rows: list[ComparisonRow]) -> None:
    from mipipe.cli.printing import html
    from mipipe.cli.printing.panels import panel_of
    from mipipe.cli.printing.tables import cell

    panels = [panel_of(f"{row.name} ({row.accounting})", row.timeline, row.plan) for row in rows
              if row.timeline is not None]
    table = html.html_table(_COLUMNS, [[cell(value) for value in _cells(row, problem.unit_ns).values()]
                                       for row in rows])
    lines = "".join(f"<p>{escape(line)}</p>" for line in (*explanation(rows, _COLUMNS), *planned_lines(problem, rows)))
    html.write(path, f"{problem.name}: schedules compared", panels, extra=f"<h2>All rows</h2>{table}{lines}")
