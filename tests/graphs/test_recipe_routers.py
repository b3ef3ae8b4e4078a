"""Balance and z-losses by name beside any loss, frozen routers, and what has none."""

import pytest
import torch

from mipipe.graphs.capture.model import capture
from mipipe.graphs.errors import GraphError, InputError
from mipipe.graphs.models.sources import open_source
from mipipe.graphs.recipes.options import LossConfig, RecipeConfig
from mipipe.graphs.recipes.routers import RouterConfig
from mipipe.graphs.recipes.source import with_recipe
from mipipe.graphs.tracing.compose import run_step

SIZES = {"hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12, "num_hidden_layers": 1,
         "num_attention_heads": 2, "head_dim": 4, "num_key_value_heads": 1, "vocab_size": 19, "num_experts": 4,
         "num_experts_per_tok": 2}


def loss_of(recipe):
    """The loss of one batch of a graph with the recipe, the module, and the batch."""
    opened = open_source("Qwen3MoeForCausalLM", seq=6, batch=2, overrides=SIZES)
    opened = with_recipe(opened, recipe) if recipe else opened
    graph = capture("Qwen3MoeForCausalLM", seq=6, batch=2, overrides=SIZES, recipe=recipe, verify=False)
    torch.manual_seed(2)
    module = opened.build("cpu")
    ids = torch.randint(0, 19, (2, 6), generator=torch.Generator().manual_seed(1))
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = run_step(graph, state, {"input_ids": ids, "labels": ids})
    return float(found.outputs[graph.loss]), module, ids


@pytest.mark.slow
def test_losses_of_routers_add_up():
    plain, module, ids = loss_of(None)
    same = loss_of(RecipeConfig(LossConfig("cross_entropy")))[0]
    assert same == pytest.approx(plain, rel=1e-6)
    hidden = []
    part = next(item for item in module.modules() if type(item).__name__.endswith("Router"))
    part.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    output = module(input_ids=ids, output_router_logits=True, use_cache=False)
    logits = hidden[0].reshape(-1, 8) @ part.weight.detach().t()
    z = float(logits.logsumexp(-1).square().mean())
    labels = 2 * 5  # of two rows of six tokens, each but the first
    both = loss_of(RecipeConfig(None, router=RouterConfig(balance=0.1, z=0.01)))[0]
    assert both == pytest.approx(plain + labels * (0.1 * float(output.aux_loss) + 0.01 * z), rel=1e-5)


def test_frozen_routers_get_no_gradient():
    found = capture("Qwen3MoeForCausalLM", seq=6, batch=2, overrides=SIZES, verify=False,
                    recipe=RecipeConfig(router=RouterConfig(freeze=True)))
    frozen = [item.fqn for item in found.parameters if not item.trainable and not item.buffer]
    assert frozen == ["model.layers.0.mlp.gate.weight"]


def dense(**options):
    return capture("LlamaForCausalLM", seq=6, verify=False, overrides={"num_hidden_layers": 1, "vocab_size": 9},
                   **options)


@pytest.mark.parametrize("make, kind, text", [
    (lambda: RouterConfig(), InputError, "router: says nothing"),
    (lambda: RouterConfig(z=-1.0), InputError, "z: found -1.0"),
    (lambda: dense(recipe=RecipeConfig(router=RouterConfig(z=0.1))), GraphError, "^z_loss: LlamaForCausalLM has no"),
    (lambda: dense(recipe=RecipeConfig(router=RouterConfig(freeze=True))), GraphError,
     "^router.freeze: LlamaForCausalLM has no"),
    (lambda: dense(router_loss=0.1), GraphError, "^router_loss: LlamaForCausalLM has no routers with weights"),
])
def test_what_has_no_routers_is_one_line(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
