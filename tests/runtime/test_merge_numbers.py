"""The numeric checks of methods that work entry by entry, in the papers' notation."""

import math

import pytest
import torch
from merge_numbers import close, deltas, merged, tensor

from mipipe.runtime.merge.methods import arithmetic, consensus, method, spherical
from mipipe.runtime.merge.methods.method import TensorPiece, merge_piece, merge_tensors
from mipipe.runtime.merge.methods.registry import BY_METHOD


def test_task_arithmetic():
    close(merged("task_arithmetic", tensor([1, 2, 3]), [tensor([2, 2, 1]), tensor([1, 4, 3])], lambda_=0.5),
          [1.5, 3, 2])


def test_one_task_vector_average_is_task_arithmetic_bit_for_bit():
    base, model = torch.randn(64, 16), torch.randn(64, 16)
    half = merged("task_arithmetic", base, [model], weight=0.5)
    assert torch.equal(half, merged("task_arithmetic", base, [model, base.clone()], weight=1.0, normalize=True))


TIES = tensor([4, -3, 1, 0.5]), tensor([-2, -5, 3, 0.1])


def test_ties_mean_sum_and_weights():
    close(deltas("ties", *TIES, density=0.5), [4, -4, 3, 0])
    close(deltas("ties", *TIES, density=0.5, normalize=False), [4, -8, 3, 0])
    close(deltas("ties", *TIES, density=0.5, weight=[1, 3]), [4, -4.5, 3, 0])
    close(deltas("ties", *TIES, density=0.5, combine="max"), [4, -5, 3, 0])
    same = tensor([4, -3, 1, 0.5])
    close(deltas("ties", same, same, same, normalize=False), 3 * same)  # I3 fails for the sum: T tau


def test_ties_scope_tensor_against_model():
    ties = BY_METHOD["ties"]
    pieces = [TensorPiece(torch.zeros(3), [tensor(values).float()]) for values in ([10, 9, 8], [.1, .2, .3])]
    for scope, kept in (("tensor", [[10, 0, 0], [0, 0, .3]]), ("model", [[10, 9, 8], [0, 0, .3]])):
        params = method.fill(ties, {"density": 0.5, "scope": scope}, 1)
        stats = None
        if scope == "model":
            for step in ties.rounds(**params):
                total = sum(method.measure_piece(step, piece, stats, params) for piece in pieces)
                stats = step.finish(total, stats, **params)
        for piece, expected in zip(pieces, kept, strict=True):
            close(torch.cat(list(merge_piece(ties, piece, params, stats))), expected)


def test_ties_keeps_exactly_k_entries_when_magnitudes_are_equal():
    tau = torch.ones(10)
    assert int(deltas("ties", tau, density=0.35).count_nonzero()) == 3


def test_ties_majority_sign_where_the_sum_is_zero():
    first, second = tensor([-1, -1, 1]), tensor([-1, -1, -1])
    close(deltas("ties", first, second)[2], 1.0)
    close(deltas("ties", first, second, zero_sum="majority")[2], -1.0)


def test_dare_rescaling(monkeypatch):
    tau = tensor([1, 2, 3, 4])
    monkeypatch.setattr(method.Tile, "random", lambda self, model: tensor([.1, .9, .1, .9]))
    close(deltas("dare_linear", tau, density=0.5), [2, 0, 6, 0])
    close(deltas("dare_linear", tau, density=0.5, rescale_norm="l1"), [2.5, 0, 7.5, 0])
    close(deltas("dare_linear", tau, density=0.5, rescale=False), [1, 0, 3, 0])


def test_dare_keeps_the_expectation():
    tau = torch.full((40000,), 2.0)
    found = deltas("dare_linear", tau, density=0.1)
    assert abs(float(found.mean()) - 2.0) < 0.1
    assert abs(float(found.var()) - 36.0) < 1.5


def test_della_keeps_large_entries_more_often():
    tau = torch.linspace(0.1, 1.0, 100).repeat(500, 1)
    stays = (deltas("della_linear", tau, density=0.5, epsilon=0.3) != 0).double().mean(0)
    assert abs(float(stays.mean()) - 0.5) < 0.02
    assert abs(float(stays[:10].mean()) - 0.23) < 0.04 and abs(float(stays[-10:].mean()) - 0.77) < 0.04


def test_breadcrumbs_drops_outliers_and_small_entries():
    tau = tensor([10, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    close(deltas("breadcrumbs", tau, density=0.5, gamma=0.2), [0, 0, 0, 0, 4, 5, 6, 7, 8, 0])


@pytest.mark.parametrize(("v0", "v1", "t", "expected"), [
    ([1, 0], [0, 1], .5, [.707107, .707107]),
    ([1, 0], [0, 1], .25, [.923880, .382683]),
    ([2, 0], [0, 1], .5, [1.414214, .707107]),
    ([2, 0], [0, 1], 0, [2, 0]),
    ([2, 0], [0, 1], 1, [0, 1]),
    ([1, 0], [-1, 0], .25, [.5, 0]),
    ([0, 0], [0, 1], .5, [0, .707107]),
])
def test_slerp(v0, v1, t, expected):
    close(merged("slerp", None, [tensor(v0), tensor(v1)], t=t), expected)


def test_nuslerp_is_slerp_at_the_position_of_its_weights():
    first, second = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    close(merged("nuslerp", None, [first, second], weight=[3, 1]), merged("slerp", None, [first, second], t=.25))
    base = torch.randn(6, 4).double()
    close(merged("nuslerp", base, [base + first, base + second], weight=[1, 1]),
          base + merged("slerp", None, [first, second], t=.5))
    by_row = merged("nuslerp", None, [first, second], weight=[1, 2], nuslerp_flatten=False)
    by_column = merged("nuslerp", None, [first, second], weight=[1, 2], nuslerp_flatten=False, nuslerp_row_wise=True)
    for index in range(4):
        close(by_row[index], merged("slerp", None, [first[index], second[index]], t=2 / 3))
        close(by_column[:, index], merged("slerp", None, [first[:, index], second[:, index]], t=2 / 3))


def test_karcher_of_two_models_is_their_slerp():
    first, second = tensor([1, 0, 0]), tensor([0, 1, 0])
    close(merged("karcher", None, [first, second], max_iter=50, tol=1e-12), [.707107, .707107, 0])
    close(merged("karcher", None, [first, second], weight=[3, 1], max_iter=50, tol=1e-12),
          merged("slerp", None, [first, second], t=.25))
    axes = torch.eye(3, dtype=torch.float64)
    close(merged("karcher", None, list(axes), max_iter=100, tol=1e-12), [3**-.5] * 3)


def test_model_stock():
    close(deltas("model_stock", tensor([1, 0]), tensor([0, 1])), [0, 0])
    close(deltas("model_stock", tensor([1, 2]), tensor([1, 2])), [1, 2])
    # cosine 1/2 between two vectors: t = 2 c / (1 + c) = 2/3, T = 2
    first, second = tensor([1, 0]), tensor([.5, math.sqrt(.75)])
    close(deltas("model_stock", first, second), 2 / 3 * (first + second) / 2)
    rows = torch.stack([first, tensor([1, 2])]), torch.stack([second, tensor([1, 2])])
    close(deltas("model_stock", *rows, filter_wise=True), torch.stack([(first + second) / 3, tensor([1, 2])]))


def test_sce_selection_weights_and_both_variants():
    taus = tensor([2, 0, 1]), tensor([0, 0, -3])
    close(deltas("sce", *taus, select_topk=.5, mask_deltas=False), [2, 0, -3])
    close(deltas("sce", *taus, select_topk=.5), [0, 0, -3])
    close(deltas("sce", *taus), [2, 0, -3])
    for share, expected in ((.5, (.1, .9)), (1.0, (.357143, .642857))):
        sce, piece = BY_METHOD["sce"], TensorPiece(torch.zeros(3).double(), taus)
        params, stats = method.fill(sce, {"select_topk": share}, 2), None
        for step in sce.rounds(**params):
            stats = step.finish(method.measure_piece(step, piece, stats, params), stats, **params)
        close(stats[1], expected)
    same = tensor([1, -2, 3])
    close(deltas("sce", same, same, select_topk=.5, mask_deltas=False), same)
    close(deltas("sce", same, same, select_topk=.5), [0, 0, 0])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_sce_variances_have_the_bits_of_torchs(count):
    """Between bfloat16 models many variances are equal, and must stay equal: rounding decides what is selected."""
    base = (0.02 * torch.randn(3000)).bfloat16()
    taus = [(base.float() + 0.002 * torch.randn(3000)).bfloat16().float() - base.float() for _ in range(count)]
    before = [tau.clone() for tau in taus]
    assert torch.equal(consensus.variance_of(taus), torch.stack(taus).var(dim=0, correction=0))
    assert all(torch.equal(tau, kept) for tau, kept in zip(taus, before, strict=True))


def test_varm():
    close(deltas("varm", tensor([2, 0]), tensor([0, 1])), [2 * .8, .2])


def test_frank_closed_form_is_the_minimum_of_the_bound():
    close(consensus.frank_lambdas([4, 1], [1, 1]), [.8, .2])
    close(consensus.frank_lambdas([4, 1], [.25, .75]), [.571429, .428571])
    close(consensus.frank_prior(math.log(2), 3, "sum"), [4 / 7, 2 / 7, 1 / 7])
    close(consensus.frank_prior(math.log(2), 3, "max"), [1, .5, .25])
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    bound = 4 * ((1 - grid)**2 * 4 + (1 - grid)**2 * 1) + 1 * ((1 - (1 - grid))**2 * 1 + grid**2 * 4)
    close(grid[bound.argmin()], .8, 1e-9)
    frank = BY_METHOD["frank"]
    base, vision, reason = torch.zeros(4), tensor([2, 0, 0, 0]).float(), tensor([0, 1, 0, 0]).float()
    close(merge_tensors(frank, base, [vision, reason], layer=0), [1.6, .2, 0, 0])
    close(merge_tensors(frank, base, [vision, reason], layer=None), vision)
    close(merge_tensors(frank, base, [vision, base], layer=0), vision)  # R = base
    close(merge_tensors(frank, base, [vision, vision], layer=0), vision)


def test_layer_swapping_weights():
    weights = [arithmetic.layer_swapping_weight(layer, 12, 3, 1, 1, .5) for layer in range(12)]
    assert weights == [0, 0, 0, .5, 1, 1, 1, 1, 1, 1, .5, 0]
    assert {arithmetic.layer_swapping_weight(layer, 12, 0, 0, 0, .5) for layer in range(12)} == {1.0}
    assert {arithmetic.layer_swapping_weight(layer, 12, 12, 0, 0, .5) for layer in range(12)} == {0.0}


def test_arc_weights_agree_with_the_scalar_form():
    found = spherical.arc_weights(tensor(4.0), tensor(1.0), tensor(.6), .3)
    close(found, spherical.slerp_coefficients(.3, .3))
