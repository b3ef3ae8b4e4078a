"""The merge methods as a table for people, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from mipipe.cli.printing.output import emit, stdout

if TYPE_CHECKING:
    from mipipe.graphs.merging.method_table.method_spec import MethodSpec


def list_methods(name: str | None, json_output: bool) -> None:
    """Print every merge method with its parameters, or the one of a name."""
    from mipipe.graphs.merging.method_table.methods import METHODS, RECIPE_NAMES

    chosen = [spec for spec in METHODS if name in (None, spec.name)]
    if not chosen:
        raise typer.BadParameter(f"there is no method {name!r}; found {', '.join(RECIPE_NAMES)}",
                                 param_hint="--methods")
    if json_output:
        emit({"methods": [_method_facts(spec) for spec in chosen]})
        return
    sheet = Table("method", "base", "models", "parameters (default)", "source", show_lines=True)
    for spec in chosen:
        words = []
        for item in spec.parameters:
            default = "needed" if item.default is None and not item.optional else item.default
            words.append(f"{item.name} ({'' if default is None else default}{', per model' * item.per_model}):"
                         f" {item.doc}".replace("(, ", "(").replace(" ()", ""))
        least, most = spec.min_models, spec.max_models
        models = f"{least}" if least == most else f"{least}+" if most is None else f"{least} to {most}"
        sheet.add_row(spec.name, spec.base.value, models, "\n".join(words),
                      spec.title + (f", arXiv {spec.arxiv}" if spec.arxiv else ""))
    stdout().print(sheet)


def _method_facts(spec: MethodSpec) -> dict[str, Any]:
    """A method for machines; ``default`` null: the recipe must give it, unless ``optional``."""
    parameters = [{"name": item.name, "default": item.default, "kind": item.kind.__name__, "per_model": item.per_model,
                   "low": item.low, "high": item.high, "choices": list(item.choices), "optional": item.optional,
                   "doc": item.doc} for item in spec.parameters]
    return {"name": spec.name, "title": spec.title, "arxiv": spec.arxiv or None, "base": spec.base.value,
            "min_models": spec.min_models, "max_models": spec.max_models, "parameters": parameters}
