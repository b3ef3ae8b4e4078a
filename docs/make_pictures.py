"""Draws the pictures of the concepts page into ``docs/img``: small SVG files, the schedules in them really planned.

    python docs/make_pictures.py        # a few seconds
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mipipe.planner.bounds.at_placement import heads_and_tails
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.job_shop import job_shop
from mipipe.planner.jobs.stages import view
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import SolveResult, plan
from mipipe.planner.timeline import Timeline

FOLDER = Path(__file__).resolve().parent / "img"
INK, QUIET, LINE, PAPER = "#22303c", "#66757f", "#c3ccd3", "#ffffff"
FILL = {"F": ("#4c84c4", "#93b8e2"), "I": ("#e0973c", "#f2c68f"), "W": ("#4f9d69", "#a3d0b1"),
        "B": ("#b4607a", "#dba8b7")}
"""Per kind of action: the colour of a rank's first stage, and the paler one of its second."""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, copies=2, activations=5)
    found = plan(problem, PlanOptions(time_limit_s=10, use_baselines=False))
    published = {baseline.name: baseline for baseline in BASELINES}
    fused = published["1F1B"].plan(problem, split=False)
    dual = published["DualPipe"].plan(problem, split=True)
    assert found.plan is not None
    write("fiw", phases())
    write("placement", placements(problem, found.plan))
    write("order", orders([("1F1B, backward as one block", fused), ("DualPipe's order, split", dual),
                           ("mipipe", found.plan)]))
    write("bound", bounds(found))


def write(name: str, drawing: tuple[int, int, Sequence[str]]) -> None:
    """One SVG file: a white card with the drawing on it."""
    width, height, parts = drawing
    text = "\n".join((f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="13"'
                      ' font-family="Roboto, Helvetica, Arial, sans-serif">',
                      f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>', *parts, "</svg>", ""))
    (FOLDER / f"{name}.svg").write_text(text)


def box(x: float, y: float, w: float, h: float, fill: str, label: str = "", ink: str = INK, size: int = 12) -> str:
    shown = f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="1.5" fill="{fill}" stroke="{PAPER}"/>'
    if label:
        shown += words(x + w / 2, y + h / 2 + size * 0.35, label, ink, size, "middle")
    return shown


def words(x: float, y: float, text: str, ink: str = INK, size: int = 13, anchor: str = "start",
          weight: str = "normal") -> str:
    bold = f' font-weight="{weight}"' if weight != "normal" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{ink}" font-size="{size}" text-anchor="{anchor}"{bold}>{text}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float, ink: str = INK) -> str:
    """A straight arrow; horizontal or vertical."""
    dx, dy = (6 if to_x > x else -6 if to_x < x else 0), (6 if to_y > y else -6 if to_y < y else 0)
    back_x, back_y = to_x - dx, to_y - dy
    head = f"{to_x},{to_y} {back_x - 0.6 * dy},{back_y - 0.6 * dx} {back_x + 0.6 * dy},{back_y + 0.6 * dx}"
    return (f'<line x1="{x}" y1="{y}" x2="{to_x - dx / 2}" y2="{to_y - dy / 2}" stroke="{ink}" stroke-width="1.6"/>'
            f'<polygon points="{head}" fill="{ink}"/>')


def phases() -> tuple[int, int, list[str]]:
    """What F, I and W of a stage read, make and keep; and why W may wait."""
    parts = [words(24, 30, "One stage, one microbatch", weight="bold")]
    for number, (kind, name) in enumerate((("F", "forward"), ("I", "input gradient"), ("W", "weight gradient"))):
        y = 52 + 62 * number
        parts += [box(150, y, 190, 40, FILL[kind][0], f"{kind}  {name}", PAPER, 14)]
    parts += [words(24, 77, "input x"), arrow(80, 72, 146, 72), words(412, 77, "output y, to the next stage"),
              arrow(344, 72, 406, 72),
              words(412, 139, "gradient of y, from the next stage"), arrow(406, 134, 344, 134),
              words(24, 139, "grad. of x"), arrow(146, 134, 92, 134),
              words(412, 201, "gradient of the weights, stays here"),
              arrow(344, 196, 406, 196)]
    parts += [arrow(200, 94, 200, 112, QUIET), arrow(300, 156, 300, 174, QUIET),
              words(356, 108, "saved: what gradients read (the activations)", QUIET, 12),
              words(356, 170, "only after I of the same microbatch", QUIET, 12)]
    parts += [words(24, 256, "Nobody waits for W: it fills gaps in which a rank would be idle", weight="bold")]
    lines = (("B = I and W at once", (("B", 0, 150, "B0"), ("B", 250, 150, "B1"))),
             ("I first, W later", (("I", 0, 100, "I0"), ("W", 100, 50, "W0"), ("I", 200, 100, "I1"),
                                   ("W", 300, 50, "W1"))))
    for row, (label, row_parts) in enumerate(lines):
        y = 274 + 40 * row
        parts.append(words(24, y + 18, label))
        for kind, at, width, text in row_parts:
            parts.append(box(170 + at, y, width, 26, FILL[kind][0], text, PAPER))
    parts += [words(580, 292, "the rank before can go on after 3 units,", QUIET, 12),
              words(580, 332, "here after 2", QUIET, 12)]
    return 820, 360, parts


def stage_names(found: Plan) -> list[list[str]]:
    """Per rank the layers of its stages, as ``1-2``."""
    rows: list[list[str]] = [[] for _ in range(found.problem.num_ranks)]
    for stage in found.placement.stages:
        first, last = min(stage.groups) + 1, max(stage.groups) + 1
        for rank in stage.ranks:
            rows[rank].append(f"{first}" if first == last else f"{first}-{last}")
    return rows


def placements(problem: PlanningProblem, planned: Plan) -> tuple[int, int, list[str]]:
    """Who holds which of eight layers under a chain, a V, DualPipe's two-way chain and the plan."""
    published = {baseline.name: baseline for baseline in BASELINES}
    shown = [("chain (1F1B)", published["1F1B"].plan(problem, split=True)),
             ("V (ZB-V)", published["ZB-V"].plan(problem, split=True)),
             ("two-way (DualPipe)", published["DualPipe"].plan(problem, split=True)),
             ("two-way, uneven (planned)", planned)]
    parts = []
    for number, (title, found) in enumerate(shown):
        left = 24 + 198 * number
        parts.append(words(left, 28, title, weight="bold"))
        for rank, stages in enumerate(stage_names(found)):
            y = 44 + 34 * rank
            parts.append(words(left, y + 19, f"rank {rank}", QUIET, 12))
            width = 126 / len(stages)
            for place, name in enumerate(stages):
                parts.append(box(left + 46 + width * place, y, width - 2, 28, FILL["F"][place % 2], name,
                                 PAPER if place % 2 == 0 else INK))
    parts.append(words(24, 200, "Numbers are layers. In the two-way placements every layer is on two ranks: half of the"
                       " microbatches run down, half up.", QUIET, 12))
    return 816, 214, parts


def orders(shown: Sequence[tuple[str, Plan]]) -> tuple[int, int, list[str]]:
    """Timelines of several plans of one problem on one scale."""
    timelines = [(title, found, simulate(found, lower(found))) for title, found in shown]
    until = max(timeline.makespan_ns for _, _, timeline in timelines)
    parts, y = list(legend(24, 20)), 52.0
    for title, found, timeline in timelines:
        unit = found.problem.unit_ns
        bubble = max(timeline.bubbles_ns()) / unit
        parts.append(words(24, y, f"{title}: makespan {timeline.makespan_ns / unit:g}, bubble {bubble:g}",
                           weight="bold"))
        parts += rows(found, timeline, 24, y + 10, 700 / until)
        y += 10 + 24 * found.problem.num_ranks + 30
    return 816, int(y) - 14, parts


def legend(x: float, y: float) -> Iterator[str]:
    kinds = (("F", "forward"), ("I", "input gradient"), ("W", "weight gradient"), ("B", "I and W"))
    for number, (kind, name) in enumerate(kinds):
        yield box(x + 140 * number, y - 11, 14, 14, FILL[kind][0])
        yield words(x + 140 * number + 20, y + 1, f"{kind} {name}", QUIET, 12)
    yield words(x + 560, y + 1, "pale: the rank's second stage", QUIET, 12)


def rows(found: Plan, timeline: Timeline, x: float, y: float, scale: float) -> Iterator[str]:
    """One row for each rank; microbatch numbers in boxes."""
    own: list[list[int]] = [[number for number, stage in enumerate(found.placement.stages) if rank in stage.ranks]
                            for rank in range(timeline.num_ranks)]
    for rank in range(timeline.num_ranks):
        yield words(x, y + 24 * rank + 15, f"rank {rank}", QUIET, 11)
        yield box(x + 48, y + 24 * rank, timeline.makespan_ns * scale, 21, "#eef1f4")
    for span in timeline.spans:
        if span.stream.value == "compute":
            second = own[span.rank].index(span.stage) % 2
            left, top = x + 48 + span.start_ns * scale, y + 24 * span.rank
            width = (span.end_ns - span.start_ns) * scale - 1
            yield (f'<rect x="{left:.1f}" y="{top:.0f}" width="{width:.1f}" height="21"'
                   f' fill="{FILL[span.kind.value][second]}"/>')
            if width > 8:
                yield (f'<text x="{left + width / 2:.1f}" y="{top + 14:.0f}" font-size="10" text-anchor="middle"'
                       f' fill="{INK if second else PAPER}">{span.microbatch}</text>')


def bounds(result: SolveResult) -> tuple[int, int, list[str]]:
    """Every rank's earliest start, load and what must follow, beside the makespan."""
    found = result.plan
    assert found is not None and result.makespan_ns and result.bound_ns and result.placement_bound_ns
    unit = found.problem.unit_ns
    jobs = job_shop(view(found.problem, found.placement))
    heads, tails = heads_and_tails(jobs)
    scale = 640 / (result.makespan_ns / unit)
    parts = [words(24, 28, "At a placement: earliest start + load + what must follow", weight="bold")]
    for rank in range(found.problem.num_ranks):
        members = [job for job, machine in enumerate(jobs.machine) if machine == 2 * rank]
        load = sum(jobs.durations[job] for job in members) / unit
        head = min(heads[job] for job in members) / unit
        tail = min(tails[job] - jobs.durations[job] for job in members) / unit
        y = 44 + 34 * rank
        parts += [words(24, y + 18, f"rank {rank}", QUIET, 12), box(80, y, max(head * scale, 0.1), 26, LINE),
                  box(80 + head * scale, y, load * scale, 26, FILL["F"][1], f"load {load:g}"),
                  box(80 + (head + load) * scale, y, max(tail * scale, 0.1), 26, LINE)]
        if head:
            parts.append(words(84, y + 17, f"{head:g}", INK, 11))
        if tail:
            parts.append(words(84 + (head + load) * scale, y + 17, f"{tail:g}", INK, 11))
    for row, (value, text) in enumerate((
            (result.bound_ns, "bound over all placements: all work, evenly spread, nobody waiting"),
            (result.placement_bound_ns, "bound at this placement, and the plan's makespan: proven best there"))):
        x = 80 + value / unit * scale
        parts += [f'<line x1="{x:.1f}" y1="40" x2="{x:.1f}" y2="{198 + 22 * row}" stroke="{INK}"'
                  ' stroke-dasharray="4 3"/>',
                  words(x - 6, 196 + 22 * row, f"{text}: {value / unit:g}", INK, 12, "end")]
    return 816, 232, parts


if __name__ == "__main__":
    main()
