"""A small language model with every recipe's loss, and the same losses written out plainly in float64."""

from __future__ import annotations

import functools

import torch

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.models.sources import open_source
from mipipe.graphs.recipes.options import LossConfig, RecipeConfig, ReferenceConfig
from mipipe.graphs.recipes.source import with_recipe
from mipipe.runtime.engine.engine import Engine

ROWS, LENGTH, VOCABULARY = 2, 8, 23
SIZES = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Of a model that computes in float64 throughout, with its head tied to the embedding."""


def recipe(name, reference=False, chunk=0, mask=False, **options):
    return RecipeConfig(LossConfig(name, options, chunk, mask), ReferenceConfig() if reference else None)


def source(made):
    return with_recipe(open_source("GPT2LMHeadModel", seq=LENGTH, batch=ROWS, dtype="float64", overrides=SIZES), made)


@functools.cache
def _built(key):
    opened = source(recipe(key[0], *key[1:4], **dict(key[4:])))
    torch.manual_seed(5)
    module = opened.build("cpu")
    with torch.no_grad():
        for item in module.parameters():
            item.normal_(0.0, 0.4)
    graph = capture_module(module, opened.inputs("cpu"), loss=opened.loss, loss_info=opened.loss_info,
                           withheld=opened.withheld, constants=opened.constants, source=opened.record, verify=False)
    return module, graph


def built(name, reference=False, chunk=0, mask=False, **options):
    """(module, graph) of a loss, made once."""
    return _built((name, reference, chunk, mask, *sorted(options.items())))


def batch(graph, rows, seed=0, length=LENGTH, vocabulary=VOCABULARY, each=3):
    """A batch with everything that a loss may ask for; groups of ``each`` responses, prompts of two or three tokens."""
    from mipipe.graphs.recipes.rows import batch_inputs
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=draw)
    labels = ids.clone()
    for row in range(rows):
        labels[row, :2 + row % 2] = -100
        labels[row, length - row % 3:] = -100
    real = {name: torch.randn(rows, length, generator=draw, dtype=torch.float64) * 0.3 - 3.0
            for name in ("old_log_probs", "teacher_log_probs")}
    made = {"input_ids": ids, "labels": labels, "rewards": torch.randn(rows, generator=draw, dtype=torch.float64),
            "group_ids": torch.arange(rows) // each + 7, "foreign": (torch.arange(rows) % 2).double(),
            "response_mask": torch.randint(0, 2, (rows, length), generator=draw), **real,
            "fused_ids": torch.randint(0, vocabulary, (rows, length, 4), generator=draw),
            "fused_probs": torch.rand(rows, length, 4, generator=draw, dtype=torch.float64)}
    made["advantages"] = made["rewards"]
    wanted = batch_inputs(graph)
    made["reference_log_probs"] = real["old_log_probs"] - 0.2 if len(getattr(
        wanted.get("reference_log_probs"), "shape", ())) == 2 else made["rewards"] - 9.0
    return {name: made[name] for name in wanted}


def log_probs(module, whole):
    """Log probabilities of the labels, response by response: a list of vectors without what is no response."""
    logits = module(input_ids=whole["input_ids"], use_cache=False).logits
    return picked(logits.log_softmax(-1), whole)


def picked(table, whole):
    found = []
    for row, labels in enumerate(whole["labels"].tolist()):
        places = [t for t in range(1, LENGTH) if labels[t] != -100
                  and ("response_mask" not in whole or whole["response_mask"][row, t])]
        found.append(torch.stack([table[row, t - 1, labels[t]] for t in places]) if places
                     else table.new_zeros(0))
    return found


def places_of(whole, name):
    """A number per token of the batch, where responses are."""
    return [torch.stack([whole[name][row, t] for t in range(1, LENGTH) if labels[t] != -100
                         and ("response_mask" not in whole or whole["response_mask"][row, t])])
            for row, labels in enumerate(whole["labels"].tolist())]


def group_advantages(whole):
    groups = {}
    for row, number in enumerate(whole["group_ids"].tolist()):
        groups.setdefault(number, []).append(row)
    mean = {row: sum(float(whole["rewards"][item]) for item in rows) / len(rows)
            for rows in groups.values() for row in rows}
    share = {row: 1.0 / len(rows) / len(groups) for rows in groups.values() for row in rows}
    return [(float(whole["rewards"][row]) - mean[row], share[row]) for row in sorted(mean)]


def plain(name, module, whole, chunk=0, **options):
    """The loss of a whole step, as the papers write it, response by response."""
    frozen = getattr(module, "reference", None)
    own = log_probs(module, whole)
    rewards = whole.get("rewards")
    if name == "rift":
        def term(row):
            reward, total = rewards[row], own[row].sum() if not options.get("length_norm") else own[row].mean()
            linear = reward > 0 or options.get("negatives") == "linear"
            return -reward * (total if linear else torch.exp(total))

        terms = [term(row) for row in range(len(own))]
        if options.get("means") == "separate":
            parts = [[item for item, reward in zip(terms, rewards, strict=True) if sign * reward > 0]
                     for sign in (1, -1)]
            return sum(sum(part) / len(part) for part in parts)
        return sum(terms) / len(terms)
    if name == "dpo":
        known = [item.sum() for item in log_probs(frozen, whole)] if frozen is not None \
            else list(whole["reference_log_probs"])
        ratios = [item.sum() - other for item, other in zip(own, known, strict=True)]
        pairs = [-torch.log(torch.sigmoid(0.1 * (ratios[row] - ratios[row + 1]))) for row in range(0, len(own), 2)]
        return sum(pairs) / len(pairs)
    if name == "fuse":
        table = module(input_ids=whole["input_ids"], use_cache=False).logits.log_softmax(-1)
        places = [(row, t) for row, labels in enumerate(whole["labels"].tolist()) for t in range(1, LENGTH)
                  if labels[t] != -100]
        parts = [sum(share * table[row, t - 1, token] for token, share in
                     zip(whole["fused_ids"][row, t].tolist(), whole["fused_probs"][row, t].tolist(), strict=True))
                 for row, t in places]
        weight = options["labels"]
        return (-weight * sum(item.sum() for item in own) - (1 - weight) * sum(parts)) / len(places)
    if name == "distill":
        heat = options.get("temperature", 1.0)
        student, teacher = ((part(input_ids=whole["input_ids"], use_cache=False).logits / heat).softmax(-1)
                            for part in (module, frozen))
        apart = (teacher * (teacher.log() - student.log())).sum(-1)
        mask = whole["labels"][:, 1:] != -100
        labels = options.get("labels", 0.0)
        return ((1 - labels) * heat**2 * apart[:, :-1][mask].sum()
                - labels * sum(item.sum() for item in own)) / mask.sum()
    total, tokens = 0.0, sum(len(item) for item in own)
    for row, (advantage, share) in enumerate(group_advantages(whole)):
        loss = -own[row].sum() / max(1, len(own[row]))
        if name == "asympo":
            total = total + share * advantage * torch.log(loss)
        elif name == "spo":
            total = total + share * advantage * loss * (options.get("negative_scale", 0.5) if advantage < 0 else 1.0)
        else:
            total = total + clipped(own[row], row, advantage, whole, frozen, options) \
                * (1.0 / tokens if options.get("average") == "token" else share / len(own[row]))
    return total


def clipped(own, row, advantage, whole, frozen, options):
    """GRPO's terms of one response, summed."""
    old = places_of(whole, "old_log_probs")[row] if "old_log_probs" in whole else own.detach()
    known = log_probs(frozen, whole)[row] if frozen is not None else \
        places_of(whole, "reference_log_probs")[row] if "reference_log_probs" in whole else None
    total = 0.0
    for place in range(len(own)):
        ratio, a = torch.exp(own[place] - old[place]), advantage
        if options.get("distill") and whole["foreign"][row]:
            apart = places_of(whole, "teacher_log_probs")[row][place] - own[place].detach()
            a = a + options["distill"] * apart.clamp(-5.0, 5.0)
        total = total - torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        if options.get("kl"):
            apart = known[place].detach() - own[place]
            total = total + options["kl"] * (apart.exp() - apart - 1)
    return total


def state_of(module):
    return {**{name: item.detach() for name, item in module.named_parameters(remove_duplicate=False)},
            **dict(module.named_buffers(remove_duplicate=False))}


def steps(cases):
    """What a rank does: one step of each (plan, graph, state, whole batch), on its copy's rows."""
    answers = []
    for plan, graph, state, whole in cases:
        engine = Engine(plan, graph, state)
        rows = {name: item.chunk(engine.mesh.num_copies)[engine.mesh.copy] for name, item in whole.items()}
        loss = engine.step(rows)
        answers.append((loss, {name: item.grad for name, item in engine.named_parameters() if item.grad is not None}))
    return answers


