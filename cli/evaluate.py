"""``mipipe evaluate``: merged models against their experts and their base, by MergeBench's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mipipe.cli.printing.output import Json, emit, progress, stdout

EXAMPLE = "mipipe evaluate models.yaml"


def evaluate(
    models: Annotated[Path, typer.Argument(metavar="MODELS", help="YAML: base, experts by domain, merged models by"
                                                                  " name,"
                                                                  " and what is measured of domains and general"
                                                                  " tasks.")],
    function: Annotated[list[str] | None, typer.Option("--evaluate", metavar="PACKAGE.MODULE:FUNCTION",
                                                       help="A function of a model's folder that MODELS may call. May"
                                                            " be"
                                                            " repeated.")] = None,
    lm_eval: Annotated[list[str] | None, typer.Option("--lm-eval", metavar="TASK", help="A task of"
                                                      " lm-evaluation-harness (a name, or a YAML file, which is code)"
                                                      " that MODELS may run. May be repeated.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="Of mixtures of experts, in place of their own"
                                                               " number (texts and tasks).", min=1)] = None,
    json_output: Json = False,
) -> None:
    """Measure merged models: performance relative to the experts, what was forgotten of the base, and what merging
    took."""
    from mipipe.runtime.tuning.protocol import evaluate_models, read_models

    found = read_models(models)
    with progress("measuring") as update:
        rows = evaluate_models(found, (*(function or ()), *(lm_eval or ())), str(models), update,
                               experts_per_token)
    if json_output:
        emit({"models": [{"name": row.name, "kind": row.kind, "scores": dict(row.scores), "normalised": row.normalised,
                          "forgetting": row.forgetting, "seconds": row.seconds} for row in rows]})
        return
    tasks = list(rows[0].scores)
    sheet = Table("model", "", *tasks, "normalised", "forgetting", "merge")
    for row in rows:
        sheet.add_row(row.name, row.kind, *(f"{row.scores[task]:.4f}" for task in tasks),
                      "" if row.normalised is None else f"{row.normalised:.3f}",
                      "" if row.forgetting is None else f"{row.forgetting:+.4f}",
                      "" if row.seconds is None else f"{row.seconds:.1f} s")
    console = stdout()
    console.print(sheet)
    lower = [name for name, task in (*found.domains.items(), *((f"general {key}", value)
                                                               for key, value in found.general.items()))
             if task.perplexity]
    if lower:
        console.print(f"mean next-token loss in nats, lower is better: {', '.join(lower)}", soft_wrap=True)
