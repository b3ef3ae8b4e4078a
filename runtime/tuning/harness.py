"""Tasks of lm-evaluation-harness as scores of a model folder; the extra ``mipipe[lm-eval]``.

A task is one of the harness's own, by its name, or a YAML file in its format. Such a file is code: its templates and
functions run. So tasks are named on the command line alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError, RunError


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Raise `InputError` where the harness is not installed, or a file of a task is not there."""
    if not tasks:
        return
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError("--lm-eval needs the library lm-eval: pip install 'mipipe[lm-eval]'") from None
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise InputError(f"--lm-eval {task}: no such file")


def task_scores(model: Any, folder: Path, tasks: tuple[str, ...], limit: int | None, batch: int) -> dict[str, float]:
    """The first metric of every task, as ``task`` or, of groups, of all that they hold; the higher the better.

    Args:
        limit: how many examples of each task; None: all.

    Raises:
        InputError: no tokenizer, or one without a token that begins a text. RunError: the harness failed, or gave no
            number.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{folder}: --lm-eval needs a tokenizer ({(str(error).splitlines() or ['?'])[0]})") from None
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no token that begins or ends a text, which lm-eval puts first")
    try:
        with _quiet():
            found = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                                    tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=False)
    except Exception as error:
        raise RunError(f"--lm-eval {', '.join(tasks)}: {type(error).__name__}:"
                       f" {(str(error).splitlines() or [''])[0]}") from error
    return {name: _first(name, metrics, found["higher_is_better"].get(name, {}))
            for name, metrics in found["results"].items()}


def _first(name: str, metrics: Mapping[str, Any], higher: Mapping[str, bool]) -> float:
    """A task's first metric; one of which lower is better with its sign changed."""
    for key, value in metrics.items():
        metric, _, form = key.partition(",")
        if form and not metric.endswith("_stderr") and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value) if higher.get(metric, True) else -float(value)
    raise RunError(f"--lm-eval {name}: gave no finite number")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside: the harness's loggers say errors alone."""
    logger = logging.getLogger("lm_eval")
    kept = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(kept)
