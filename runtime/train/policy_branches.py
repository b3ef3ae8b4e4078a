"""What `train.yaml` says of branches of a policy (CoPD, arXiv 2604.27083): tasks, cycles, each branch's outputs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.named_code import is_named_code
from mipipe.graphs.serialize import STRICT


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """A branch's task: ``source``, a function ``package.module:name``, makes rollouts when it is called as
    ``source(policy, rows, generator, **options)``. ``policy`` is the branch's model as it is, in eval mode; the result
    has a tensor of ``rows`` rows for ``input_ids``, ``labels``, ``rewards`` and ``group_ids``, and for whatever else
    the graph reads of a batch but ``foreign`` and ``teacher_log_probs``."""

    __pydantic_config__: ClassVar = STRICT
    source: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_named_code(self.source):
            raise InputError(f"train config, branches.tasks: source: found {shown(self.source)}, expected a function as"
                             " package.module:name")


@dataclass(frozen=True, slots=True)
class BranchesConfig:
    """Branches that are trained side by side, one for each of ``tasks``, all from the same weights.

    A cycle has ``rewarded`` steps by the rewards of a branch's own task, then ``taught`` steps, half of whose rows are
    the branch's own rollouts on another branch's task, with that branch's log probabilities of their tokens as the
    teacher's. With more than two, the first is the hub: it is taught by the others in turn, and teaches each of them.
    """

    __pydantic_config__: ClassVar = STRICT
    tasks: dict[str, TaskConfig]
    rewarded: int = 6
    taught: int = 4

    def __post_init__(self) -> None:
        odd = next((name for name in self.tasks if not re.fullmatch(r"[\w-]{1,64}", name)), None)
        if not self.tasks or odd is not None:
            raise InputError("train config, branches.tasks: found " + (f"the name {shown(odd)}" if odd else "none")
                             + "; expected tasks by name, of at most 64 letters, digits, _ and -")
        if self.rewarded < 0 or self.taught < 0 or self.rewarded + self.taught < 1:
            raise InputError(f"train config, branches: rewarded {self.rewarded}, taught {self.taught}; expected none"
                             " below 0, and at least one step in a cycle")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    def teachers(self, step: int) -> dict[int, int]:
        """Who is taught by whom in a step, counted from 0; none in a step by rewards alone."""
        cycle, count = self.rewarded + self.taught, len(self.tasks)
        turn, place = divmod(step, cycle)
        if place < self.rewarded or count == 1:
            return {}
        number = turn * self.taught + place - self.rewarded
        return {0: 1 + number % (count - 1), **dict.fromkeys(range(1, count), 0)}


def apart(path: str | None, name: str) -> str | None:
    """A branch's own file or folder in place of one of all: ``metrics.jsonl`` -> ``metrics.sums.jsonl``."""
    if path is None:
        return None
    file = Path(path)
    return str(file.with_name(f"{file.stem}.{name}{file.suffix}"))
