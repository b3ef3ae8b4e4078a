"""Equality where batches or dtypes are not the plain case: parts that split differently, bfloat16 on several ranks."""

import functools
import random

import pytest
import runtime_dags as dags
import runtime_equal as equal
import runtime_models as models
import torch

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.models.loss import sum_over
from mipipe.runtime.ranks.options import EngineOptions

pytestmark = pytest.mark.distributed

COUNT, IMAGES = 3, 3


def album(num_microbatches, seed=9):
    """Two rows of tokens and three images in each microbatch: two images in its first row, one in its second."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(30, (2 * num_microbatches, 11), generator=generator)
    tokens[:, 1:5] = 31
    tokens[::2, 6:10] = 31
    labels = tokens.masked_fill(tokens == 31, -100)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    images = torch.randn(IMAGES * num_microbatches, 3, 8, 8, dtype=torch.float64, generator=generator)
    return {"input_ids": tokens, "pixel_values": images, "labels": labels}


@functools.cache
def album_model():
    module = models.tiny_vlm(torch.float64)
    return module, capture_module(module, album(1), loss=models.token_losses,
                                  loss_info=sum_over("labels", shift=True))


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False])
def test_parts_that_split_differently(pool, listed):
    """Rows of tokens and numbers of images differ: as whole tensors, and as a list of microbatches."""
    module, graph = album_model()
    pieces = models.chunked(album(COUNT), COUNT)
    plan = dags.random_plan(random.Random(2), graph, 2, COUNT)
    state = {name: item.detach() for name, item in module.named_parameters(remove_duplicate=False)}
    state.update({name: item.detach() for name, item in module.named_buffers(remove_duplicate=False)})
    answers = pool.run(2, equal.__file__, "run_case", [plan], graph, state, pieces if listed else album(COUNT))
    loss, gradients = models.eager(module, pieces, equal.valid_labels(True, pieces), models.token_losses)
    found = {}
    for (own, mine), in answers:
        assert own == pytest.approx(loss, rel=1e-12)
        found.update(mine)
    for name, gradient in gradients.items():
        difference = torch.linalg.vector_norm(found.get(name, torch.zeros_like(gradient)) - gradient)
        assert difference <= 1e-12 * torch.linalg.vector_norm(gradient) + 1e-30, name


def test_bfloat16_with_float32_master_weights_on_two_ranks(pool):
    """The loss is any plan's, and gradients are added up in float32 over microbatches. A value that several stages read
    has a gradient that is summed in bfloat16 and rounded in the plan's order, which later layers carry on.
    """
    made = equal.case("skip", torch.bfloat16)
    options = EngineOptions(master_dtype=torch.float32)
    plans = [dags.random_plan(random.Random(seed), made.graph, ranks, COUNT) for seed, ranks in ((0, 1), (1, 2))]
    batch = made.batch(COUNT)
    (loss, gradients), = equal.run_case(plans[:1], made.graph, made.state(), batch, options)
    for (own, mine), in pool.run(2, equal.__file__, "run_case", plans[1:], made.graph, made.state(), batch, options):
        assert own == pytest.approx(loss, rel=1e-6)
        for name, gradient in mine.items():
            assert gradient.dtype is torch.float32
            assert torch.linalg.vector_norm(gradient - gradients[name]) <= 2**-5 * gradient.norm(), name
