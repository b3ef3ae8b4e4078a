"""Scores of a merged model: losses on text files, tasks of lm-evaluation-harness, and functions of the user's.

A text file's score is the mean next-token loss in nats over windows of it; lower is better. A user's function is called
with the folder and gives a number, or a mapping of names to numbers; higher is better unless it is said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import InputError, RunError, shown
from mipipe.graphs.named_code import import_named
from mipipe.runtime.calibration.tokens import Samples, draw_samples
from mipipe.runtime.calibration.whole_model import load_model
from mipipe.runtime.tuning.harness import check_tasks, task_scores


@dataclass(frozen=True, slots=True)
class Objectives:
    """What is measured of every model.

    ``texts``: text or JSONL files. ``functions``: ``package.module:function``, as the command line names them.
    ``samples`` windows of ``length`` tokens of each file, the same for all models. ``minimise``: scores of functions
    are the better the lower. ``experts_per_token``: of a mixture of experts, for texts and tasks; None: its own.
    ``tasks``: of lm-evaluation-harness, names or files; ``limit`` examples of each (None: all).
    """

    texts: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    samples: int = 64
    length: int = 256
    batch: int = 8
    seed: int = 0
    minimise: bool = False
    experts_per_token: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.texts and not self.functions and not self.tasks:
            raise InputError("nothing to measure: give --perplexity FILE, --evaluate package.module:function or"
                             " --lm-eval TASK")
        if self.minimise and self.tasks:
            raise InputError("--minimise is of --evaluate's numbers, and with --lm-eval it is not known whose: let the"
                             " function give numbers of which higher is better")
        for name, value in (("samples", self.samples), ("length", self.length), ("batch", self.batch)):
            if value < 1:
                raise InputError(f"--{name} {value}: expected at least 1")
        if self.experts_per_token is not None and self.experts_per_token < 1:
            raise InputError(f"--experts-per-token {self.experts_per_token}: expected at least 1")


@dataclass(slots=True)
class Measure:
    """Measures models; samples and functions are prepared once."""

    objectives: Objectives
    _samples: dict[str, Samples] = field(default_factory=dict)
    _functions: dict[str, Callable[[str], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.objectives.functions:
            found = import_named(name)
            if not callable(found):
                raise InputError(f"--evaluate {name}: is a {type(found).__name__}, expected a function of a model's"
                                 " folder")
            self._functions[name] = found
        check_tasks(self.objectives.tasks)
        for text in self.objectives.texts:
            if not Path(text).is_file():
                raise InputError(f"--perplexity {text}: no such file")

    def scores(self, folder: Path) -> dict[str, float]:
        """Every score of a model by name.

        Raises:
            InputError: no tokenizer, or a text without two tokens. RunError: a function or task failed, or gave no
                number.
        """
        found: dict[str, float] = {}
        given = self.objectives
        if given.texts or given.tasks:
            model = load_model(folder, given.experts_per_token)
            for text in given.texts:
                found[text_name(text, given.texts)] = self._loss(model, folder, text)
            if given.tasks:
                found |= task_scores(model, folder, given.tasks, given.limit, given.batch)
            del model
        for name, function in self._functions.items():
            found |= _called(name, function, folder)
        return found

    def lower_is_better(self, name: str) -> bool:
        """Whether a score is a loss."""
        texts = {text_name(text, self.objectives.texts) for text in self.objectives.texts}
        return name in texts or self.objectives.minimise

    def _loss(self, model: Any, folder: Path, text: str) -> float:
        given = self.objectives
        if text not in self._samples:
            self._samples[text] = draw_samples(text, str(folder), given.samples, given.length, given.seed,
                                               model.config.get_text_config().vocab_size, where="--perplexity")
        loss, _, count = token_losses(model, self._samples[text], given.batch)
        return loss / count


def text_name(text: str, every: Sequence[str]) -> str:
    """What a text file's score is called: its name without ending, where that is the file's alone."""
    stem = Path(text).stem
    return stem if sum(Path(other).stem == stem for other in every) == 1 else text


def token_losses(model: Any, samples: Samples, batch: int) -> tuple[float, int, int]:
    """The sum of next-token losses in nats, how many predictions are right, and how many there are."""
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(samples.ids), batch):
            ids = torch.from_numpy(samples.ids[start:start + batch]).long()
            lengths = torch.from_numpy(samples.lengths[start:start + batch])
            valid = torch.arange(1, ids.shape[1])[None] < lengths[:, None]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][valid].float()
            wanted = ids[:, 1:][valid]
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            count += len(wanted)
    return total, right, count


def _called(name: str, function: Callable[[str], Any], folder: Path) -> dict[str, float]:
    """A user's scores, checked."""
    try:
        found = function(str(folder))
    except Exception as error:
        raise RunError(f"--evaluate {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    short = name.rpartition(":")[2]
    values = {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {short: found}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RunError(f"--evaluate {name}: gave {shown(value)} for {key}, expected a finite number")
    return {key: float(value) for key, value in values.items()}
