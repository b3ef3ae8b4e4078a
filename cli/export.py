"""``mipipe export``: a plan's order as CSV in torch's grammar, its degrees as other engines' options, its timeline as a
Perfetto trace or HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.printing.output import Html, Json, Trace, check_files, emit, stdout
from mipipe.graphs.errors import InputError

EXAMPLE = "mipipe export plan.json --csv order.csv --trace trace.json"


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, or a timeline (for --trace and --html).")],
    csv_file: Annotated[Path | None, typer.Option(
        "--csv", help="The order of actions for torch.distributed.pipelining's schedule runtime.")] = None,
    megatron: Annotated[Path | None, typer.Option(
        help="A plan of teams as Megatron-LM's flags, one a line.")] = None,
    bridge: Annotated[Path | None, typer.Option(
        help="The same as overrides of Megatron-Bridge's configuration (JSON).")] = None,
    torchtitan: Annotated[Path | None, typer.Option(
        help="The same for torchtitan (JSON), with the order of actions in a .csv beside it.")] = None,
    trace_file: Trace = None,
    html_file: Html = None,
    json_output: Json = False,
) -> None:
    """Write a plan or a timeline in other tools' formats."""
    from mipipe.cli.printing import html, panels
    from mipipe.cli.printing.report import report_tiles
    from mipipe.cli.requests.files import open_any
    from mipipe.graphs.serialize import write_text
    from mipipe.planner.execution.export import perfetto_text, torch_csv
    from mipipe.planner.execution.lower import lower
    from mipipe.planner.execution.simulate import simulate
    from mipipe.planner.plan import Plan
    from mipipe.planner.teams import export as engines
    from mipipe.planner.timeline import Timeline

    wanted = {"csv": csv_file, "megatron": megatron, "bridge": bridge, "torchtitan": torchtitan, "trace": trace_file,
              "html": html_file}
    if not any(wanted.values()):
        raise InputError("export: nothing to write; give --csv, --megatron, --bridge, --torchtitan, --trace or --html"
                         " with a file name")
    order_file = None if torchtitan is None else torchtitan.with_suffix(".csv")
    check_files(file, **wanted, **{"torchtitan's order": order_file})
    found = open_any(file, Plan, Timeline)
    plan = found if isinstance(found, Plan) else None
    texts: list[tuple[Path, str]] = []
    if csv_file is not None:
        if plan is None:
            raise InputError(f"{file}: a timeline has no order of actions to export; give the plan for --csv")
        texts.append((csv_file, torch_csv(plan)))
    for engine, path in (("megatron", megatron), ("bridge", bridge), ("torchtitan", torchtitan)):
        if path is not None and plan is None:
            raise InputError(f"{file}: a timeline has no degrees to export; give the plan for --{engine}")
    if plan is not None and megatron is not None:
        texts.append((megatron, engines.megatron_flags(plan)))
    if plan is not None and bridge is not None:
        texts.append((bridge, engines.bridge_config(plan)))
    if plan is not None and torchtitan is not None and order_file is not None:
        text, order = engines.torchtitan_config(plan, str(order_file))
        texts += [(torchtitan, text), *([] if order is None else [(order_file, order)])]
    if trace_file is not None or html_file is not None:
        timeline = found if plan is None else simulate(plan, lower(plan))
        if trace_file is not None:
            texts.append((trace_file, perfetto_text(timeline)))
        if html_file is not None:
            page = html.page(plan.name if plan else file.name, [panels.panel_of(timeline.origin, timeline, plan)],
                             report_tiles(plan, timeline) if plan else [])
            texts.append((html_file, page))
    for path, text in texts:
        write_text(path, text)
    written = {name: str(path) for name, path in wanted.items() if path is not None}
    if json_output:
        emit({"written": written})
    else:
        stdout().print("wrote " + ", ".join(written.values()))
