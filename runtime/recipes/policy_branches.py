"""Branches that train side by side and teach each other (CoPD, arXiv 2604.27083), as one run.

The processes of a branch are a run of their own, with a process group, an engine and a plan; branches talk through the
run's store, first process to first process. Before every step a branch's first process takes the engine's weights into
a copy of the policy, and the task's function samples rollouts with it; all processes of the branch get the batch. In a
taught step the foreign rows go to the teacher's first process, whose copy gives the log probabilities of their tokens.
Branches end a step together, so that all stop, and save, after the same one.

Legend: N rows of a batch, S tokens.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mipipe.graphs.errors import InputError, MipipeError, RunError
from mipipe.graphs.named_code import import_named
from mipipe.graphs.recipes.objective import REFERENCE
from mipipe.graphs.recipes.rows import batch_inputs
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import first_of, gather, rank, world
from mipipe.runtime.recipes.whole import whole_tensors
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.models import build_module, take_reference
from mipipe.runtime.train.policy_branches import BranchesConfig

GIVEN = ("foreign", "teacher_log_probs")
"""Inputs that the run makes, and no task's function."""


@dataclass(frozen=True, slots=True)
class BranchPeer:
    """This process's branch, and the store through which branches talk."""

    number: int
    config: BranchesConfig
    store: dist.Store
    timeout_s: float

    @property
    def name(self) -> str:
        return self.config.names[self.number]

    def say(self, key: str, value: Any) -> None:
        """Leave something for the other branches; for `hear` with the same key."""
        stream = io.BytesIO()
        torch.save(value, stream)
        self.store.set(f"branches/{key}", stream.getvalue())  # type: ignore[arg-type]  # stores take bytes

    def hear(self, key: str, of: int) -> Any:
        """What branch ``of`` left under a key.

        Raises:
            RunError: it left nothing in time.
        """
        try:
            self.store.wait([f"branches/{key}"], timedelta(seconds=self.timeout_s))
        except RuntimeError:  # torch's DistStoreError
            raise RunError(f"branch {self.name}: nothing from branch {self.config.names[of]} for {self.timeout_s:g} s"
                           f" ({key}); it hangs or is gone") from None
        # what `say` of another process of this run wrote; by torch's restricted reader, which calls nothing it names
        return torch.load(io.BytesIO(self.store.get(f"branches/{key}")), weights_only=True)

    def forget(self, key: str) -> None:
        """Take back what was left, once all have heard it."""
        self.store.delete_key(f"branches/{key}")

    def meet(self, key: str, word: bool = False) -> bool:
        """Wait for all branches; whether one of them says ``word``. The first process of each calls it."""
        self.say(f"{key}/{self.number}", word)
        said = [self.hear(f"{key}/{other}", other) for other in range(len(self.config.tasks))]
        return any(said)


class Together:
    """Whether a run is to end, the same in all branches: asked after every step, on every process."""

    def __init__(self, branch: BranchPeer, asked: Callable[[], bool], steps: Callable[[], int]) -> None:
        self._branch, self._asked, self._steps = branch, asked, steps
        self._count, self._found = 0, False

    def __call__(self) -> bool:
        done = self._steps()
        if done <= self._count:  # asked once more for a step
            return self._found
        self._count = done
        self._found = self._asked()
        if rank() == 0:
            self._found = self._branch.meet(f"step{done}", self._found)
            if done > 2:
                self._branch.forget(f"step{done - 2}/{self._branch.number}")
        return self._found


class BranchRollouts:
    """A branch's batches, for `Batches`: number n depends on the weights after n steps, the seed and n alone."""

    def __init__(self, engine: Engine, config: TrainConfig, branch: BranchPeer, rows: int) -> None:
        self._engine, self._branch, self._seed = engine, branch, config.seed
        self._specs = batch_inputs(engine.graph)
        mesh = engine.mesh
        self._rows = rows * mesh.num_copies
        self._next = 0
        self._policy: Any = None
        if branch.config.taught and len(branch.config.tasks) > 1 and self._rows % 2:
            raise InputError(f"branches: a step has {self._rows} rows, of which half are foreign in taught steps; plan"
                             " an even number")
        tasks = list(branch.config.tasks.values())
        self._sources = [(import_named(task.source), task.options, task.source) for task in tasks]
        if rank() == 0:
            with torch.random.fork_rng(devices=[]):  # its weights are the engine's, and no draw may be missed after
                module = build_module(engine.graph, config)
            take_reference(module)
            self._policy = module.eval().requires_grad_(False).to(mesh.device)

    def skip(self, count: int) -> None:
        """Make ``count`` the number of the next batch."""
        self._next = count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            number, self._next = self._next, self._next + 1
            yield self.batch(number)

    def batch(self, number: int) -> dict[str, Tensor]:
        """This copy's rows of batch ``number``. All processes of all branches call it.

        Raises:
            InputError: a task's function gives something else than rollouts. RunError: another branch is gone.
        """
        self._take_weights()
        made: dict[str, Tensor] = {}
        fault: BaseException | None = None
        if rank() == 0:
            try:
                made = self._made(number)
            except Exception as error:  # the others of the branch would wait for this process
                fault = error
        found: list[Any] = [made, None if fault is None else f"{type(fault).__name__}: {fault}"]
        if world() > 1:
            dist.broadcast_object_list(found, 0)
        if fault is not None:
            raise fault if isinstance(fault, MipipeError) else InputError(
                f"branches: task {self._branch.name}: {type(fault).__name__}: {fault}") from fault
        if found[1] is not None:
            raise RunError(f"branch {self._branch.name}: its first process could not make a batch: {found[1]}")
        mesh = self._engine.mesh
        return {name: item.chunk(mesh.num_copies)[mesh.copy] for name, item in found[0].items()}

    @torch.no_grad()
    def _take_weights(self) -> None:
        """The engine's weights, into the copy of the policy on the first process."""
        whole = whole_tensors(self._engine, lambda name: not name.startswith(f"{REFERENCE}."), first_only=True)
        if self._policy is not None:
            held = {**dict(self._policy.named_parameters()), **dict(self._policy.named_buffers())}
            for name, item in whole.items():
                held[name].copy_(item)

    def _made(self, number: int) -> dict[str, Tensor]:
        branch, me = self._branch, self._branch.number
        teachers = branch.config.teachers(number)
        own_rows = self._rows // 2 if teachers else self._rows
        batch = self._sampled(me, own_rows, number)
        if teachers:
            first = int(batch["group_ids"].max()) + 1
            foreign = self._sampled(teachers[me], self._rows - own_rows, number)
            foreign["group_ids"] = foreign["group_ids"] + first
            foreign["rewards"] = torch.zeros_like(foreign["rewards"])
            foreign["foreign"] = torch.ones_like(foreign["foreign"])
            foreign["teacher_log_probs"] = self._taught(number, teachers, foreign)
            batch = {name: torch.cat([item, foreign[name]]) for name, item in batch.items()}
        return {name: batch[name].to(getattr(torch, spec.dtype)) for name, spec in self._specs.items() if name in batch}

    def _sampled(self, task: int, rows: int, number: int) -> dict[str, Tensor]:
        """Rollouts of this branch's policy on a task, checked, without a teacher."""
        source, options, name = self._sources[task]
        width = max(8, len(self._sources))  # no two branches, tasks and numbers draw the same
        place = (self._seed * 1_000_003 + number) * width**2 + self._branch.number * width + task
        draw = torch.Generator().manual_seed(place)
        with torch.no_grad():
            found = source(self._policy, rows, draw, **options)
        where = f"branches: {name}"
        if not isinstance(found, Mapping):
            raise InputError(f"{where}: gives a {type(found).__name__}, expected tensors by the names of a batch")
        wanted = [key for key in self._specs if key not in GIVEN]
        odd = sorted(set(found) - set(wanted))
        missing = [key for key in wanted if key not in found]
        if odd or missing:
            raise InputError(f"{where}: gives " + (f"{odd[0]!r}, which the graph does not read" if odd else
                                                   f"no {missing[0]!r}") + f"; expected {', '.join(wanted)}")
        for key in wanted:
            shape = (rows, *self._specs[key].shape[1:])
            if not isinstance(found[key], Tensor) or tuple(found[key].shape) != shape:
                told = list(found[key].shape) if isinstance(found[key], Tensor) else type(found[key]).__name__
                raise InputError(f"{where}: {key} is {told}, expected a tensor of {list(shape)}")
        made = {key: found[key].cpu() for key in wanted}
        made["foreign"] = torch.zeros(rows, dtype=torch.float64)
        made["teacher_log_probs"] = torch.zeros(made["labels"].shape, dtype=torch.float64)
        return made

    def _taught(self, number: int, teachers: Mapping[int, int], foreign: Mapping[str, Tensor]) -> Tensor:
        """Ask the teacher, answer whoever asks this branch, and take the answer: log probabilities [N,S]."""
        branch, me, key = self._branch, self._branch.number, f"taught{number}"
        asked = {name: foreign[name] for name in ("input_ids", "labels", "attention_mask", "position_ids")
                 if name in foreign}
        branch.say(f"{key}/ask{me}", asked)
        for student, teacher in teachers.items():
            if teacher == me:
                rows = branch.hear(f"{key}/ask{student}", student)
                branch.say(f"{key}/answer{student}", log_probs(self._policy, rows))
                branch.forget(f"{key}/ask{student}")
        answer: Tensor = branch.hear(f"{key}/answer{me}", teachers[me])
        branch.forget(f"{key}/answer{me}")
        return answer


@torch.no_grad()
def log_probs(policy: Any, rows: Mapping[str, Tensor], at_once: int = 8) -> Tensor:
    """The policy's log probabilities of the labels, at their places [N,S]; 0 where there is no label. ``at_once``: rows
    whose logits are there at a time."""
    device = next(policy.parameters()).device
    found = torch.zeros(rows["labels"].shape, dtype=torch.float64)
    for start in range(0, len(found), at_once):
        part = {name: item[start:start + at_once].to(device) for name, item in rows.items()}
        labels = part.pop("labels")[:, 1:]
        logits = policy(**part, use_cache=False).logits[:, :-1]
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        picked = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
        found[start:start + at_once, 1:] = picked.cpu()
    return found


def check_positions(branch: BranchPeer, done: int) -> None:
    """Raise `InputError` where the branches' checkpoints are of different steps. All processes call it."""
    text: str | None = None
    if rank() == 0:
        branch.say(f"start/{branch.number}", done)
        steps = {name: branch.hear(f"start/{number}", number) for number, name in enumerate(branch.config.names)}
        if len(set(steps.values())) > 1:
            text = "branches: their newest checkpoints are of different steps (" \
                   + ", ".join(f"{name} {step}" for name, step in steps.items()) + "); remove the newer ones"
    text = first_of(gather(text))
    if text is not None:
        raise InputError(text)
