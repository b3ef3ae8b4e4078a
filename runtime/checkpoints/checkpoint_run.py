"""Which run a checkpoint is of: what makes it that run and no other, and what may change when it is resumed.

Another plan, other ranks and other degrees of parallelism are the same run. Another seed, graph, optimizer or data
source are not: resuming with them would train something else, from the wrong state, without a word.
"""

from __future__ import annotations

import enum
import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT, from_data, to_data
from mipipe.runtime.train.config import TrainConfig


class Start(enum.Enum):
    """How a run begins: anew, in a folder without checkpoints; from the newest checkpoint, which must be there, or may
    be; or as torchrun's restart of workers, from this very run's newest checkpoint, if it has one."""

    FRESH = "fresh"
    RESUME = "resume"
    RESUME_IF_ANY = "resume-if-any"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """A run's identity. ``data``: source, suffix and options; ``settings``: what a resumed run may change, and says."""

    FORMAT: ClassVar = "mipipe.run"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    id: str
    seed: int
    graph: str
    optimizer: str
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def new_id() -> str:
    """A run's name of its own."""
    return uuid.uuid4().hex[:12]


def run_of(config: TrainConfig, graph_digest: str, run_id: str = "") -> RunIdentity:
    """The identity of a configuration's run of a graph; a data folder by its place, however it is written."""
    source = config.data.source
    if ":" not in source and Path(source).is_dir():
        source = str(Path(source).resolve())
    optimizer = config.optimizer
    name = optimizer.name if ":" in optimizer.name else optimizer.name.lower()
    run = RunIdentity(run_id, config.seed, graph_digest, name,
              {"source": source, "suffix": config.data.suffix, "options": config.data.options},
              {"optimizer.lr": optimizer.lr, "optimizer.options": optimizer.options,
               "optimizer.groups": optimizer.groups, "schedule": config.schedule, "clip": config.clip,
               "dtype": config.dtype})
    as_read_back = json.loads(json.dumps(to_data(run), default=str))
    return from_data(as_read_back, RunIdentity, "train config")


def check_same(saved: RunIdentity, now: RunIdentity, where: str, accept: Collection[str] = ()) -> None:
    """Raise `InputError`, naming all that differs, unless a checkpoint is of the run that wants to resume it.

    ``where``: the checkpoint; ``accept``: differences that the user allows (``seed``, ``optimizer``, ``data``).
    """
    found = [(key, getattr(saved, key), getattr(now, key)) for key in ("graph", "seed", "optimizer")]
    found += [(f"data.{key}", saved.data.get(key), now.data.get(key)) for key in ("source", "suffix", "options")]
    wrong = [(key, old, new) for key, old, new in found if old != new and key.partition(".")[0] not in accept]
    if not wrong:
        return
    listed = "; ".join(f"{key} was {_short(old)} and is {_short(new)} now" for key, old, new in wrong)
    keys = sorted({key.partition(".")[0] for key, _, _ in wrong} - {"graph"})
    advice = "" if any(key == "graph" for key, _, _ in wrong) else \
        f", or allow the change with checkpoint: {{accept: [{', '.join(keys)}]}}"
    raise InputError(f"checkpoint {where}: is of another run ({saved.id}): {listed}; give the same, or another"
                     f" checkpoint folder{advice}")


def changes(saved: RunIdentity, now: RunIdentity) -> list[str]:
    """What a resumed run does otherwise than before, for people."""
    return [f"{key} was {_short(saved.settings.get(key))} and is {_short(value)} from here on"
            for key, value in now.settings.items() if saved.settings.get(key) != value]


def named(run: RunIdentity, run_id: str) -> RunIdentity:
    """The run under its id."""
    return replace(run, id=run_id)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
