"""Two abilities that grow side by side and teach each other, against one after the other (CoPD, arXiv 2604.27083).

A model that often errs at sums and at differences becomes two branches. In each cycle a branch is trained by the
rewards of its own task (the loss ``grpo``), then also towards the other branch on that one's task: it answers there
itself, and the other's log probabilities of its tokens make the advantage. In the end the branches are averaged. The
baseline trains one model on the sums and then on the differences, for as many steps in all. ``python
examples/copd.py`` prints what each gets right, and how often the two branches' likeliest tokens agree.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import arithmetic as task
import torch

from mipipe.graphs import LossConfig, RecipeConfig

CYCLES, REWARDED, TAUGHT_BY_OTHER, EACH, ROWS = 12, 6, 4, 8, 64
SIGNS = (1, -1)
LOSS = LossConfig("grpo", {"old_from": "current", "deviation": True, "distill": 0.5})


class Branch:
    """A policy with its engine, its optimizer and its task."""

    def __init__(self, start, sign, seed) -> None:
        self.sign, self.draw = sign, torch.Generator().manual_seed(seed)
        self.module, self.engine, self.optimizer = task.policy(RecipeConfig(LOSS), start, 5e-4)

    def rollouts(self, rows, sign, first):
        """Groups of this branch's own answers, with rewards; numbered from ``first``."""
        pairs = [pair for pair in task.draw_pairs(rows // EACH, self.draw, sign) for _ in range(EACH)]
        found = task.answers(self.module, pairs, self.draw)
        right = [float(one == task.answer(*pair)) for one, pair in zip(found, pairs, strict=True)]
        return {**task.rows(pairs, found), "rewards": torch.tensor(right),
                "group_ids": torch.arange(rows) // EACH + first, "foreign": torch.zeros(rows),
                "teacher_log_probs": torch.zeros(rows, task.LENGTH)}

    def step(self, other=None):
        """One update by rewards; with another branch half of the rows are of its task, and it is their teacher."""
        batch = self.rollouts(ROWS if other is None else ROWS // 2, self.sign, 0)
        if other is not None:
            foreign = self.rollouts(ROWS // 2, other.sign, ROWS)
            foreign |= {"rewards": torch.zeros(ROWS // 2), "foreign": torch.ones(ROWS // 2),
                        "teacher_log_probs": task.log_probs(other.module, foreign)}
            batch = {name: torch.cat([item, foreign[name]]) for name, item in batch.items()}
        task.update(self.engine, self.optimizer, batch)
        task.put_back(self.engine, self.module)


@torch.no_grad()
def overlap(first, second, pairs, most=3):
    """The share of the likeliest tokens of one policy that are another's, on shared prefixes."""
    ids = task.rows(pairs, [task.answer(*pair) for pair in pairs])["input_ids"]
    tops = [policy(input_ids=ids, use_cache=False).logits[:, task.PROMPT - 1:-1].topk(most).indices
            for policy in (first, second)]
    return float((tops[0][..., None] == tops[1][..., None, :]).any(-1).float().mean())


def main() -> None:
    torch.set_num_threads(1)
    start = task.taught(0.3, both=True)
    draw = torch.Generator().manual_seed(21)
    held_out = [task.draw_pairs(300, draw, sign) for sign in SIGNS]

    def tell(name, module):
        sums, apart = (task.accuracy(module, pairs) for pairs in held_out)
        print(f"{name:<34} sums {sums:6.1%}  differences {apart:6.1%}  mean {(sums + apart) / 2:6.1%}", flush=True)

    branches = [Branch(start, sign, seed) for seed, sign in enumerate(SIGNS)]
    tell("before", branches[0].module)
    agreed = []
    for _ in range(CYCLES):
        for _ in range(REWARDED):
            for branch in branches:
                branch.step()
        for _ in range(TAUGHT_BY_OTHER):
            for branch, other in zip(branches, reversed(branches), strict=True):
                branch.step(other)
        agreed.append(overlap(branches[0].module, branches[1].module, held_out[0] + held_out[1]))
    tell("the branch of sums", branches[0].module)
    tell("the branch of differences", branches[1].module)
    states = [branch.module.state_dict() for branch in branches]
    averaged, _ = task.model()
    averaged.load_state_dict({name: (item + states[1][name]) / 2 for name, item in states[0].items()})
    tell("both, averaged", averaged)
    print(f"{'':<34} likeliest three tokens shared: at least {min(agreed):.1%}, {agreed[-1]:.1%} in the end")
    single = Branch(start, SIGNS[0], 5)
    for sign in SIGNS:
        single.sign = sign
        for _ in range(CYCLES * (REWARDED + TAUGHT_BY_OTHER)):
            single.step()
        tell(f"one model, after its {'sums' if sign > 0 else 'differences'}", single.module)


if __name__ == "__main__":
    main()
