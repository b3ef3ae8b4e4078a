"""A model given where a graph is expected: captured on the way, and kept for the next time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipipe.cli.printing.output import progress
from mipipe.cli.requests.settings import parse_settings
from mipipe.graphs.errors import InputError

if TYPE_CHECKING:
    from mipipe.graphs.capture.cached import Captured

DTYPES = ("float64", "float32", "bfloat16", "float16")


def names_model(source: str) -> bool:
    """Whether this names a model to capture, not a file of mipipe's.

    A model is a folder, a ``.pt2`` program, ``package.module:factory``, a transformers configuration or class name.
    """
    path = Path(source)
    if path.is_file():
        return source.endswith(".pt2") or path.name == "config.json"
    return path.is_dir() or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*|[A-Za-z_]\w*", source) is not None


def captured(source: str, *, seq: int | None, batch: int | None, dtype: str | None, settings: list[str],
             use_cache: bool) -> tuple[Captured, str]:
    """The graph of a model, from the cache where nothing has changed, and a line on what was assumed.

    Raises:
        InputError: the source does not give a model. GraphError: it cannot be captured.
    """
    options: dict[str, Any] = {"seq": seq or 128, "batch": batch or 1, "dtype": dtype or own_dtype(source),
                               "overrides": parse_settings(settings)}
    with progress(f"capturing {source}") as update:
        from mipipe.graphs.capture.cached import Captured, capture_cached
        from mipipe.graphs.capture.model import capture

        found = (capture_cached(source, options, progress=update) if use_cache
                 else Captured(capture(source, **options, progress=update), None, False))
    how = "as captured before" if found.reused else "captured"
    if ":" in source:
        return found, f"{source}: {how} in {options['dtype']} (--dtype changes it, --set the factory's arguments)"
    return found, (f"{source}: {how}, {options['batch']} x {options['seq']} tokens a microbatch, {options['dtype']}"
                   " (--batch, --seq and --dtype change it)")


def captured_if_model(source: str, cluster: Path | None, costs: Path | None, *, seq: int | None, batch: int | None,
                      dtype: str | None, settings: list[str], use_cache: bool,
                      save_graph: Path | None) -> tuple[Captured | None, str]:
    """As `captured` where a model is given, which ``save_graph`` keeps; None for a file of mipipe's.

    Raises:
        InputError: as `captured`; a model without a cluster, or an option of the capture for a file.
    """
    if not names_model(source):
        refuse_capture_options(source, seq=seq, batch=batch, dtype=dtype, set=settings,
                               **{"save-graph": save_graph, "no-cache": not use_cache})
        return None, ""
    from mipipe.cli.requests.inputs import check_cluster
    from mipipe.graphs.serialize import save

    check_cluster(source, cluster, costs, {"seq": seq, "batch": batch, "dtype": dtype,
                                           "set": " --set ".join(settings) if settings else None})
    model, note = captured(source, seq=seq, batch=batch, dtype=dtype, settings=settings, use_cache=use_cache)
    if save_graph is not None:
        save(model.graph, save_graph)
    return model, note


def own_dtype(source: str) -> str:
    """The dtype that a model's configuration names, where it names a usual one; else float32."""
    path = Path(source)
    try:
        config = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "float32"
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    named = [part.get(key) for part in parts if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    return next((name for name in named if name in DTYPES), "float32")


def refuse_capture_options(source: str, **options: Any) -> None:
    """Raise where an option of the capture is given for a graph that is captured already."""
    for name, value in options.items():
        if value:
            raise InputError(f"{source}: --{name} is for models that are captured on the way; this file is captured"
                             " already (`mipipe capture` makes another)")
