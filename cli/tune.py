"""``mipipe tune``: the values that a recipe leaves open, found by merging and measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mipipe.cli.printing.output import Json, check_files, emit, log, progress, stdout
from mipipe.cli.requests.files import read_size
from mipipe.graphs.errors import InputError

if TYPE_CHECKING:
    from mipipe.runtime.tuning.tune import TuneResult

EXAMPLE = "mipipe tune recipe.yaml --perplexity math.txt --perplexity code.txt --search map --budget 30 -o tuned"


def tune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, with search: a range, or choose: a"
                                                                  " list, in"
                                                                  " braces in place of values.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to work in: journal.jsonl, and best, the"
                                                                " best"
                                                                " model. The same command goes on with its journal.")],
    perplexity: Annotated[list[Path] | None, typer.Option(help="A text or JSONL file: its mean next-token loss. May be"
                                                               " repeated.")] = None,
    evaluate: Annotated[list[str] | None, typer.Option(metavar="PACKAGE.MODULE:FUNCTION",
                                                       help="A function of a model's folder that returns a number, or a"
                                                            " mapping of names to numbers; higher is better. May be"
                                                            " repeated.")] = None,
    minimise: Annotated[bool, typer.Option("--minimise", help="Of what --evaluate gives, lower is better.")] = False,
    lm_eval: Annotated[list[str] | None, typer.Option("--lm-eval", metavar="TASK", help="A task of"
                                                      " lm-evaluation-harness by name, or a YAML file of one (which is"
                                                      " code: it runs). May be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each --lm-eval task; all if not given.",
                                              min=1)] = None,
    search: Annotated[str, typer.Option(help="grid, cma (CMA-ES on the weighted sum), nsga3 (NSGA-III on all"
                                             " scores), map or bayes-map (quadratic surrogates of every score),"
                                             " nested-map (pairs of experts, one score for each).")] = "grid",
    budget: Annotated[int, typer.Option(help="Merges, at most (all but grid).", min=1)] = 40,
    points: Annotated[int, typer.Option(help="Values of each range in a grid.", min=1)] = 5,
    weight: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="A score's weight in the sum that"
                                                                                 " decides"
                                                                                 " which point is best. May be"
                                                                                 " repeated;"
                                                                                 " without any, all count the same."
                                                     )] = None,
    samples: Annotated[int, typer.Option(help="Windows of each text file.", min=1)] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 256,
    ranks: Annotated[int, typer.Option(help="Processes that merge side by side.", min=1)] = 1,
    memory: Annotated[str | None, typer.Option(help="Memory per rank beyond the bare process, as 4GB.")] = None,
    loader: Annotated[list[str] | None, typer.Option("--loader", metavar="PACKAGE.MODULE:FUNCTION", help="A function"
                                                     " that the recipe's calibration may call for samples.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search and of which windows are measured.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Also write trials and front as a page.")] = None,
    json_output: Json = False,
) -> None:
    """Search a recipe's free values: each point is merged (only tensors that change) and measured."""
    check_files(recipe, *(perplexity or ()), html=html)
    from mipipe.cli.requests.given import refuse
    from mipipe.runtime.merge.launching.launch import MergeOptions
    from mipipe.runtime.tuning.objectives import Objectives
    from mipipe.runtime.tuning.tune import TuneOptions
    from mipipe.runtime.tuning.tune import tune as run

    refuse(("budget",) if search == "grid" else ("points",), f"does not apply to --search {search}; a grid has"
                                                             " --points, all others a --budget")
    for asked, others, needed in ((evaluate, ("minimise",), "--evaluate"), (lm_eval, ("limit",), "--lm-eval"),
                                  (perplexity, ("samples", "length"), "--perplexity")):
        if not asked:
            refuse(others, f"is of {needed}, which is not given")
    objectives = Objectives(tuple(map(str, perplexity or ())), tuple(evaluate or ()), samples, length, seed=seed,
                            minimise=minimise, tasks=tuple(lm_eval or ()), limit=limit)
    options = TuneOptions(search, budget, points, seed, tuple(_weights(weight or [])))
    merging = MergeOptions(ranks, memory_cap=None if memory is None else read_size(memory, "--memory"),
                           loaders=tuple(loader or ()))
    with progress("tuning") as update:
        result = run(recipe, output, objectives, options, merging, lambda line: log(f"mipipe: {line}"),
                     lambda count, trial: update(f"{count} points, last {_short(trial.scores)}"))
    if html is not None:
        from mipipe.cli.printing.front import write_front
        write_front(html, str(recipe), result)
    if json_output:
        emit(facts(result))
        return
    _show(result)
    if html is not None:
        stdout().print(f"front: {html}", soft_wrap=True)


def _weights(given: list[str]) -> list[tuple[str, float]]:
    found = []
    for item in given:
        name, _, text = item.rpartition("=")
        try:
            found.append((name, float(text)))
        except ValueError:
            raise InputError(f"--weight {item}: expected NAME=NUMBER") from None
        if not name:
            raise InputError(f"--weight {item}: expected NAME=NUMBER")
    return found


def facts(result: TuneResult) -> dict[str, Any]:
    """A search's result, for machines."""
    return {"names": list(result.names), "best": result.best, "front": list(result.front), "facts": dict(result.facts),
            "folder": str(result.folder),
            "trials": [{"values": list(trial.values), "scores": dict(trial.scores), "merge_s": round(trial.merge_s, 3),
                        "measure_s": round(trial.measure_s, 3), "merged": trial.merged} for trial in result.trials]}


def _short(scores: Any) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def value_text(value: Any) -> str:
    """A free value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _show(result: TuneResult) -> None:
    """The front and the best point, for people."""
    console, scores = stdout(), list(result.trials[0].scores)
    sheet = Table("", *result.names, *scores, "merge", "measure")
    rows = list(result.front) if len(scores) > 1 else sorted(
        range(len(result.trials)), key=lambda index: index != result.best)[:10]
    for index in rows:
        trial = result.trials[index]
        sheet.add_row("best" if index == result.best else "", *map(value_text, trial.values),
                      *(f"{trial.scores[name]:.4f}" for name in scores), f"{trial.merge_s:.1f} s",
                      f"{trial.measure_s:.1f} s")
    console.print(sheet)
    shown = "that no other beats" if len(scores) > 1 else "shown"
    console.print(f"{len(result.trials)} points measured, {len(rows)} {shown}; the best model: {result.folder}/best",
                  soft_wrap=True)
    for name, value in result.facts.get("r_squared", {}).items():
        console.print(f"the quadratic of {name} explains {value:.1%} of points left out of its fit", soft_wrap=True)
