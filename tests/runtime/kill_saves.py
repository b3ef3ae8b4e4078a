"""Run as a script: train with a checkpoint after every step, and be killed while saving, again and again.

``python kill_saves.py FOLDER ROUNDS`` prints one JSON object: the losses of the undisturbed run and of the killed one,
and how many kills left a half-written checkpoint. Imports once and forks, so that a round costs a fraction of a second.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer imports it, a second of CPU for each child

sys.path.insert(0, str(Path(__file__).parent))
import runtime_cases as cases

from mipipe.runtime.checkpoints.checkpoint import Checkpoints  # noqa: F401  (imported before forking)
from mipipe.runtime.checkpoints.checkpoint_folder import complete, read_state, verify
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import CheckpointConfig, OptimizerConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.training import Trainer

STEPS, COUNT = 24, 2


class Loader:
    """Endless random batches; its state is that of its generator, a tensor, as in torchdata's StatefulDataLoader."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self):
        while True:
            yield {name: torch.randn(cases.ROWS * COUNT, cases.WIDTH, dtype=torch.float64, generator=self.generator)
                   for name in ("x", "t")}

    def state_dict(self):
        return {"generator": self.generator.get_state(), "note": ["any", 1.5, None]}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def one_rank():
    problem = cases.problem_of(cases.chain_graph(), COUNT, 1)
    return cases.plan_of(problem, [([0, 1, 2], [0])], [[0, 0]], ["0F0 0B0 0F1 0B1"])


def trainer(folder, asynchronous=True, loader=None, steps=STEPS, **more):
    """A trainer of the hand-made chain on one rank, with Adam and a checkpoint after every step."""
    made = CheckpointConfig(str(folder / "checkpoints"), every=1, asynchronous=asynchronous)
    config = TrainConfig(steps, optimizer=OptimizerConfig("adamw", 1e-2), checkpoint=made,
                         metrics=str(folder / "metrics.jsonl"), **more)
    return Trainer(Engine(one_rank(), cases.chain_graph(), cases.chain_state()), config, Batches(loader or Loader()))


def run(folder, asynchronous):
    """Train in a child process, from the newest checkpoint."""
    child = os.fork()
    if child == 0:
        made = trainer(folder, asynchronous)
        made.run(made.resume())
        os._exit(0)
    return child


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss_metrics/global_avg_loss"] for line in lines]


def main(folder, rounds):
    """Undisturbed, then killed ``rounds`` times; every complete checkpoint is verified after every kill."""
    torch.set_num_threads(1)
    calm, killed = folder / "calm", folder / "killed"
    calm.mkdir()
    killed.mkdir()
    os.waitpid(run(calm, True), 0)
    rng, halves, saved = random.Random(1), 0, killed / "checkpoints"
    for number in range(rounds):
        child = run(killed, number % 2 == 0)
        before = set(complete(saved)) if saved.exists() else set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if saved.exists() and set(complete(saved)) - before and list(saved.glob("*.partial")):
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        halves += len(list(saved.glob("*.partial")))
        for path in complete(saved):
            verify(path, read_state(path))
    _, status = os.waitpid(run(killed, True), 0)
    print(json.dumps({"calm": losses(calm), "killed": losses(killed), "halves": halves, "status": status,
                      "kept": [path.name for path in complete(killed / "checkpoints")]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
