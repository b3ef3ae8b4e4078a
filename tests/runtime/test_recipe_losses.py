"""The losses of recipes: closed forms, and planned runs against the papers' formulas written out in float64."""

import math
import random
from dataclasses import replace

import pytest
import recipe_models as recipes
import runtime_dags as dags
import torch

from mipipe.graphs.errors import BatchError, InputError
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.recipes import losses
from mipipe.graphs.recipes.options import LossConfig, RecipeConfig, ReferenceConfig
from mipipe.graphs.recipes.rows import batch_inputs
from mipipe.planner.team import Team
from mipipe.runtime.engine.batches import split_batch
from mipipe.runtime.engine.compiling.team import member_graph
from mipipe.runtime.engine.engine import Engine

COUNT, COPIES = 3, 2
CASES = [
    ("rift", {}), ("rift", {"means": "separate", "chunk": 5}), ("rift", {"negatives": "linear", "length_norm": True}),
    ("asympo", {}), ("spo", {"negative_scale": 0.3, "chunk": 23}), ("spo", {"mask": True}),
    ("grpo", {}), ("grpo", {"reference": True, "kl": 0.2, "average": "token"}), ("grpo", {"distill": 0.5, "kl": 0.1}),
    ("dpo", {"reference": True, "chunk": 7}), ("dpo", {}),
    ("distill", {"reference": True, "temperature": 2.0, "labels": 0.3}),
    ("distill", {"reference": True, "chunk": 6}), ("fuse", {"labels": 0.7, "top": 4}),
]


def expected(name, options, module, whole):
    given = {key: item for key, item in options.items() if key not in ("reference", "mask")}
    loss = recipes.plain(name, module, whole, **given)
    module.zero_grad(set_to_none=True)
    loss.backward()
    found = {key: item.grad for key, item in module.named_parameters() if item.grad is not None}
    return loss.item(), found


def eager(name, options):
    """A loss with the plain model's numbers; a head in blocks gives way to the whole one."""
    module, graph = recipes.built(name, **options)
    whole = recipes.batch(graph, recipes.ROWS * COUNT * COPIES)
    plain = recipes.built(name, **{**options, "chunk": 0})[0]
    plain.load_state_dict(module.state_dict())
    return graph, module, whole, expected(name, options, plain, whole)


def close(own, gradients, wanted, value, tolerance, loss_is_value=True):
    if loss_is_value:
        assert own == pytest.approx(wanted[0], rel=tolerance, abs=tolerance)
    for name, gradient in gradients.items():
        size = torch.linalg.vector_norm(wanted[1][name])
        assert torch.linalg.vector_norm(gradient - wanted[1][name]) <= tolerance * size + 1e-14, f"{value}: {name}"


def backward_flops(graph):
    return [sum(graph.trace(segment).flops(phase) for segment in graph.segments) for phase in (Phase.I, Phase.W)]


@pytest.mark.parametrize("cases, context", [
    (CASES[1:2] + CASES[13:14], 1), *(pytest.param(CASES, size, marks=pytest.mark.slow) for size in (1, 2))],
    ids=["some", "all", "all, context"])
def test_losses_on_two_ranks_and_two_devices_each_equal_their_formulas(pool, cases, context):
    """Losses and gradients on two copies, or on two members with positions each; the groups of three cross microbatches
    of two rows. One process has them to 1e-12."""
    work, wanted = [], []
    for number, (name, options) in enumerate(cases):
        graph, module, whole, answer = eager(name, options)
        plan = dags.random_plan(random.Random(number), graph, 2, COUNT * COPIES if context > 1 else COUNT)
        team = Team({"context": context}) if context > 1 else None
        if team is not None:  # tables whole, rows of logits divided: products with a gradient at least
            member = member_graph(team, graph)
            assert not member.divisions
            assert [context * flops for flops in backward_flops(member.graph)] == backward_flops(graph)
        work.append((replace(plan, team=team), graph, recipes.state_of(module), whole))
        wanted.append(answer)
        alone = Engine(dags.random_plan(random.Random(number), graph, 1, COUNT * COPIES), graph,
                       recipes.state_of(module))
        own = alone.step(whole)
        grads = {key: item.grad for key, item in alone.named_parameters() if item.grad is not None}
        assert set(grads) == set(answer[1])
        close(own, grads, answer, f"{name} {options}", 1e-12, name != "asympo")
        if name == "asympo":
            assert abs(own) < 1e-12  # every group's advantages sum to zero
    answers = pool.run(4, recipes.__file__, "steps", work, timeout=240.0)
    for rank in answers:
        for (name, options), (own, gradients), answer in zip(cases, rank, wanted, strict=True):
            close(own, gradients, answer, f"{name} {options}", 1e-11, name != "asympo")


def test_rift_numbers():
    """L = 1 + .2 e^-2 for log pi = -1 (r 1) and -2 (r -.2); the negative's gradient vanishes with pi."""
    def run(low, negatives):
        logs = torch.tensor([[-1.0], [low]], dtype=torch.float64, requires_grad=True)
        ones = torch.ones(2, dtype=torch.float64)
        loss = losses.rift(logs, logs == logs, torch.tensor([1.0, -0.2], dtype=torch.float64), ones, length_norm=False,
                           negatives=negatives)
        loss.backward()
        return loss.item(), logs.grad.flatten().tolist()

    loss, gradient = run(-2.0, "bounded")
    assert loss == pytest.approx(1.0270670566, abs=1e-9) and gradient == pytest.approx([-1.0, 0.0270670566], abs=1e-9)
    assert run(-50.0, "bounded")[1][1] == pytest.approx(0.0, abs=1e-20)
    loss, gradient = run(-50.0, "linear")
    assert loss == pytest.approx(1.0 - 10.0) and gradient[1] == pytest.approx(0.2)


def test_asympo_and_plain_numbers():
    """l = (.5, 2, .25, 1.25), A = (1, 1, -1, -1): value 0 and gradient (2, .5, -4, -.8); the plain value is 1."""
    loss_of = torch.tensor([0.5, 2.0, 0.25, 1.25], dtype=torch.float64, requires_grad=True)
    a, ones = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    mask = torch.ones(4, 1, dtype=torch.bool)
    loss = losses.asympo(-loss_of[:, None], mask, a, ones, floor=1e-3)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert loss_of.grad.tolist() == pytest.approx([2.0, 0.5, -4.0, -0.8])
    assert losses.spo(-loss_of[:, None], mask, a, ones, negative_scale=1.0).item() == pytest.approx(1.0)
    small = torch.tensor([[-1e-9]], dtype=torch.float64, requires_grad=True)
    losses.asympo(small, mask[:1], a[:1], ones[:1], floor=1e-2).backward()
    assert small.grad.item() == pytest.approx(-100.0)


def test_distillation_advantages_and_their_bound():
    """log pi_j = (-1, -2), log pi_k = (-1.5, -1), strength .5: (.25, -.5); one policy with itself gives none."""
    own, teacher = torch.tensor([[-1.5, -1.0]]), torch.tensor([[-1.0, -2.0]])
    assert losses.distill_advantage(own, teacher, 0.5, 5.0).tolist() == [[0.25, -0.5]]
    assert losses.distill_advantage(own, own, 0.5, 5.0).tolist() == [[0.0, 0.0]]
    assert losses.distill_advantage(own, own - 40, 0.5, 5.0).tolist() == [[-2.5, -2.5]]


def whole_and_graph(name, **options):
    graph = recipes.built(name, **options)[1]
    return graph, recipes.batch(graph, recipes.ROWS * COUNT)


def stepped(name, change, options):
    """Loss and gradients of one process for a batch with something changed, and the module and that batch."""
    module, graph = recipes.built(name, **options)
    whole = recipes.batch(graph, recipes.ROWS * COUNT)
    whole |= {key: item(module, whole) if callable(item) else item for key, item in change.items()}
    engine = Engine(dags.random_plan(random.Random(1), graph, 1, COUNT), graph, recipes.state_of(module))
    loss = engine.step(whole)
    return loss, {key: item.grad for key, item in engine.named_parameters() if item.grad is not None}, module, whole


def own_log_probs(module, whole):
    """A policy's log probabilities at the places of its labels, as a teacher's stand in a batch."""
    logs = module(input_ids=whole["input_ids"], use_cache=False).logits.log_softmax(-1)[:, :-1].detach()
    found = torch.zeros(whole["labels"].shape, dtype=torch.float64)
    found[:, 1:] = logs.gather(-1, whole["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    return found


@pytest.mark.slow
def test_one_branch_or_branches_that_are_alike_are_plain_grpo():
    """CoPD: without another branch's rows (K = 1), or towards a branch with the same weights, nothing is added."""
    rows = recipes.ROWS * COUNT
    plain = stepped("grpo", {}, {})[:2]
    alone = stepped("grpo", {"foreign": torch.zeros(rows, dtype=torch.float64)}, {"distill": 0.5})
    alike = stepped("grpo", {"foreign": torch.ones(rows, dtype=torch.float64), "teacher_log_probs": own_log_probs},
                    {"distill": 0.5})
    for loss, gradients, *_ in (alone, alike):
        close(loss, gradients, plain, "copd", 1e-12)
    other = stepped("grpo", {"foreign": torch.ones(rows, dtype=torch.float64)}, {"distill": 0.5})
    assert abs(other[0] - plain[0]) > 1e-3


@pytest.mark.parametrize("name", ["asympo", pytest.param("spo", marks=pytest.mark.slow)])
def test_groups_without_a_difference_teach_nothing(name):
    loss, gradients, *_ = stepped(name, {"rewards": torch.full((6,), 0.7, dtype=torch.float64)}, {})
    assert loss == pytest.approx(0.0, abs=1e-15)
    assert all(float(item.abs().max()) < 1e-14 for item in gradients.values())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rift_without_a_wrong_or_a_right_answer_lacks_that_term(sign):
    rewards = sign * torch.arange(1.0, 7.0, dtype=torch.float64)
    loss, gradients, module, whole = stepped("rift", {"rewards": rewards}, {"means": "separate"})
    logs = [item.sum().item() for item in recipes.log_probs(module, whole)]
    terms = [-reward * (log if sign > 0 else math.exp(log))
             for reward, log in zip(rewards.tolist(), logs, strict=True)]
    assert loss == pytest.approx(sum(terms) / 6, rel=1e-12)
    assert all(bool(item.isfinite().all()) for item in gradients.values())


@pytest.mark.parametrize("change, text", [
    ({"rewards": None}, "input 'rewards' of GPT2LMHeadModel is missing, which the loss spo needs"),
    ({"labels": torch.zeros(6, 5, dtype=torch.int64)}, r"labels is torch.int64 \[2, 5\], but the graph was captured"),
    ({"rewards": torch.full((6,), float("nan"), dtype=torch.float64)}, "rewards has values that are no finite numbers"),
    ({"group_ids": torch.arange(6)}, "each of the 6 responses is a group of its own"),
    ({"scales": torch.ones(6, dtype=torch.float64)}, "'scales' is no input of GPT2LMHeadModel"),
])
def test_what_a_batch_lacks_is_one_line(change, text):
    graph, whole = whole_and_graph("spo", negative_scale=0.3, chunk=23)
    engine = Engine(dags.random_plan(random.Random(1), graph, 1, COUNT), graph,
                    recipes.state_of(recipes.built("spo", negative_scale=0.3, chunk=23)[0]))
    given = {name: item for name, item in {**whole, **change}.items() if item is not None}
    with pytest.raises(BatchError, match=text):
        engine.step(given)


@pytest.mark.parametrize("name, options, key", [
    ("grpo", {"distill": 0.5}, "teacher_log_probs"), ("fuse", {"labels": 0.7, "top": 4}, "fused_probs"), *(
        pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("grpo", {}, "old_log_probs"), ("dpo", {}, "reference_log_probs"), ("rift", {}, "rewards")))])
def test_numbers_that_are_none_are_refused_before_the_step(name, options, key):
    graph, whole = whole_and_graph(name, **options)
    whole[key] = whole[key].clone()
    whole[key].view(-1)[1] = float("nan")
    engine = Engine(dags.random_plan(random.Random(1), graph, 1, COUNT), graph,
                    recipes.state_of(recipes.built(name, **options)[0]))
    with pytest.raises(BatchError, match=f"loss {name}: {key} has values that are no finite numbers"):
        engine.step(whole)
    assert all(item.grad is None for item in engine.parameters())


@pytest.mark.parametrize("name, options", [("spo", {"mask": True}), ("rift", {"mask": True})])
def test_responses_without_a_token_teach_nothing_and_a_batch_of_them_is_refused(name, options):
    """One response's mask is empty: gradients are those of the others with the same weights; all empty: one line."""
    def masked(rows):
        def change(module, whole):
            mask = torch.ones_like(whole["response_mask"])
            mask[rows] = 0
            return mask
        return {"response_mask": change}

    _, gradients, module, whole = stepped(name, masked([1]), options)
    wanted = expected(name, options, module, whole)
    close(0.0, gradients, wanted, name, 1e-12, loss_is_value=False)
    with pytest.raises(BatchError, match="the batch has no valid label; every label is ignored"):
        stepped(name, masked(list(range(6))), options)


def split_group(plan, graph, state, whole):
    engine = Engine(plan, graph, state)
    try:
        engine.step(whole)
    except BatchError as error:
        return str(error)
    return None


def test_a_group_over_two_copies_is_refused_on_all_ranks(pool):
    graph, whole = whole_and_graph("spo", negative_scale=0.3, chunk=23)
    module = recipes.built("spo", negative_scale=0.3, chunk=23)[0]
    plan = dags.random_plan(random.Random(1), graph, 2, COUNT)
    for text in pool.run(4, __file__, "split_group", plan, graph, recipes.state_of(module), whole):
        assert "group 7 has responses on copies 0 and 1 of the plan" in text


@pytest.mark.parametrize("make, text", [
    (lambda: LossConfig("rfit"), "loss: found 'rfit', expected one of rift, asympo"),
    (lambda: LossConfig("rift", {"beta": 1}), "loss rift: has no option 'beta'; expected length_norm"),
    (lambda: LossConfig("spo", {"negative_scale": 2}), "negative_scale: found 2, expected a number from 0 to 1"),
    (lambda: LossConfig("rift", chunk=-1), "chunk is -1"),
    (lambda: RecipeConfig(LossConfig("rift"), ReferenceConfig()), "a frozen model is of use to the losses"),
    (lambda: recipes.source(recipes.recipe("distill")), "needs a teacher"),
    (lambda: recipes.source(recipes.recipe("fuse", chunk=8)).build("meta"), "loss fuse: chunk does not go with it"),
    (lambda: LossConfig("fuse", {"top": 0}), "top: found 0, expected a whole number of at least 1"),
])
def test_what_cannot_be_a_loss_is_one_line(make, text):
    with pytest.raises(InputError, match=text) as error:
        make()
    assert "\n" not in str(error.value)


def test_masks_are_inputs_and_derived_numbers_are_not():
    graph, whole = whole_and_graph("spo", mask=True)
    assert set(batch_inputs(graph)) == {"input_ids", "labels", "response_mask", "rewards", "group_ids"}
    assert {"scales", "advantages"} <= set(graph.inputs)
    assert len(split_batch(graph, whole, COUNT)) == COUNT
