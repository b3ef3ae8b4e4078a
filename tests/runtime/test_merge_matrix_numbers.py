"""The numeric checks of methods that work on whole matrices."""

import itertools
import math

import pytest
import torch
from merge_numbers import close, deltas, lore_objective, merged, optmerge_loss, tensor

from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.runtime.merge.methods import disentangle, low_rank, one_bit, projective, spectral
from mipipe.runtime.merge.methods.method import merge_tensors
from mipipe.runtime.merge.methods.registry import BY_METHOD


def test_widen_matrix_and_vector():
    base = torch.eye(2, dtype=torch.float64)
    models = [tensor([2, 0], [0, 1]), tensor([1, .5], [0, 1])]
    moves = [disentangle.column_moves(base, model) for model in models]
    close(disentangle.ranks(torch.stack([move[0] for move in moves])), [[.5, 0], [0, .5]])
    close(disentangle.ranks(torch.stack([move[1] for move in moves])), [[0, .5], [0, .5]])
    close(merged("widen", base, models), [[1.75, .5], [0, 1]])
    # Entry 2: |tau| = (1, 1/4). The first model is above its mean of 1/2 (score 1); the second, below its mean of 3/8,
    # keeps softmax(1, 1/4) = 1 / (1 + e^0.75), so the entry is 1 + 1 + 1 / (4 (1 + e^0.75)) = 2.0802053252062, by hand
    # in 30-digit decimal arithmetic.
    close(merged("widen", tensor([1, 1]), [tensor([1, 2]), tensor([1.5, 1.25])]), [1.5, 2.0802053252062], 1e-12)
    # Equal models: every column is added between once and T times (I3 fails at s = 1, holds at s = 1/T).
    torch.manual_seed(3)
    model = base + torch.randn(2, 2).double()
    shares = (merged("widen", base, [model] * 3) - base) / (model - base)
    assert bool((shares >= 1 - 1e-9).all()) and bool((shares <= 3 + 1e-9).all())
    close(merged("widen", base, [model] * 3, calibrated_score=1 / 3), model, 1e-12)


def test_widen_column_weights():
    """w of the worked example: the scores of magnitudes and directions, averaged."""
    base = torch.eye(2, dtype=torch.float64)
    moves = [disentangle.column_moves(base, model)
             for model in (tensor([2, 0], [0, 1]), tensor([1, .5], [0, 1]))]
    parts = [disentangle.ranks(torch.stack([move[part] for move in moves])) for part in (0, 1)]
    close(sum(disentangle.scores(part, 1.0, 1.0) for part in parts) / 2, [[.75, .688770], [.438770, 1]])


def test_widen_tolerates_zero_columns():
    base, model = tensor([0, 1], [0, 1]), tensor([1, 1], [0, 2])
    assert merged("widen", base, [model, base]).isfinite().all()


def test_lore_threshold_objective_and_two_models():
    close(low_rank.soft_threshold(torch.diag(tensor([3, .05, 1])), .1), torch.diag(tensor([2.9, 0, .9])))
    torch.manual_seed(0)
    models = [torch.randn(8, 6, dtype=torch.float64) for _ in range(3)]
    values = []
    for iterations in range(1, 8):
        base, found = low_rank.lore_estimate(models, .3, iterations)
        values.append(lore_objective(models, base, found, .3))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    average = (models[0] + models[1]) / 2
    close(merged("lore", None, models[:2], mu=.2, lambda_=.7), average, 1e-12)
    assert not torch.allclose(merged("lore", None, models[:2], mu=.2, combine="ties"), average)
    close(merged("lore", None, models, mu=0.0), sum(models) / 3, 1e-12)


def test_one_bit_quantiser_and_packing():
    tau = tensor([1, -2], [3, -4])
    close(one_bit.scale_of(tau), 2.5)
    close(one_bit.quantised(tau, 2.5), [[2.5, -2.5], [2.5, -2.5]])
    assert float((tau - one_bit.quantised(tau, 2.5)).square().sum()) == 5.0
    assert float(tau.square().sum()) - 4 * 2.5**2 == 5.0
    rough = torch.randn(6, 5).double()
    error = rough - one_bit.quantised(rough, float(one_bit.scale_of(rough)))
    assert float(error.norm()) <= float(rough.norm())
    close(deltas("onebit", tau, torch.ones_like(tau), route=0), [[2.5, -2.5], [2.5, -2.5]])
    signs = torch.randn(5, 7)
    assert torch.equal(one_bit.unpack_signs(one_bit.pack_signs(signs), (5, 7)), signs.sign())
    close(one_bit.unpack_signs(one_bit.pack_signs(torch.zeros(3)), (3,)), [1, 1, 1])


def test_one_bit_without_quantisation_returns_the_routed_expert():
    base, models = torch.randn(4, 4).double(), [torch.randn(4, 4).double() for _ in range(3)]
    close(merged("onebit", base, models, route=2, full_precision=True), models[2], 1e-12)


def test_optmerge_closed_form_and_descent():
    taus = torch.diag(tensor([3, 1])), tensor([0, 2], [0, 1])
    for centred in (True, False):
        targets, maps = projective.optmerge_targets(taus, 1, centred)
        solved = projective.optmerge_closed_form(sum(taus), targets, maps)
        close(solved, [[3, 2], [0, 1]])
        assert optmerge_loss(solved, targets, maps) < 1e-20
    targets, maps = projective.optmerge_targets(taus, 1, False)
    assert optmerge_loss(sum(taus), targets, maps) == pytest.approx(1.0)
    assert optmerge_loss(sum(taus) / 2, targets, maps) == pytest.approx(3.025)
    descended = projective.optmerge_descent(sum(taus), targets, maps, "adam", 1e-2, 3000)
    close(descended, [[3, 2], [0, 1]], 1e-3)


def test_optmerge_identical_experts_give_the_best_low_rank_part():
    tau = torch.randn(6, 5).double()
    found = deltas("optmerge", tau, tau, start="mean", centred=False, solver="closed_form")
    left, values, right = spectral.svd(tau)
    row_space = right[:2].T @ right[:2]
    close(found @ row_space, (left[:, :2] * values[:2]) @ right[:2], 1e-9)


def test_optmerge_sums_experts_with_orthogonal_row_spaces():
    torch.manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(8, 8).double())[0] for _ in range(2))
    taus = [left[:, 3 * i:3 * i + 2] @ right[:, 3 * i:3 * i + 2].T for i in range(2)]
    close(deltas("optmerge", *taus, centred=False), sum(taus), 1e-9)
    targets, maps = projective.optmerge_targets(taus, 4, False)
    assert optmerge_loss(sum(taus), targets, maps) < 1e-20


def test_rmm_compression():
    vectors = tensor([1, 2, 3], [3, 2, 1])
    mean, basis, coefficients = low_rank.rmm_compress(vectors, 1)
    close(mean, [2, 2, 2])
    close(basis.abs(), [[.707107, 0, .707107]])
    close(coefficients.abs(), [[1.414214], [1.414214]])
    close(low_rank.rmm_reconstruct(mean, basis, coefficients), vectors, 1e-12)
    eye = torch.eye(3, dtype=torch.float64)
    for num_basis, error in ((1, 1.0), (2, 0.0)):
        found = low_rank.rmm_reconstruct(*low_rank.rmm_compress(eye, num_basis))
        close((found - eye).norm(), error, 1e-9)


def test_rmm_returns_each_adapter_when_nothing_is_dropped():
    taus = [torch.randn(6, 2).double() @ torch.randn(2, 5).double() for _ in range(3)]
    for index, tau in enumerate(taus):
        close(deltas("rmm", *taus, num_basis=2, rank=2, route=[float(index == at) for at in range(3)]), tau, 1e-9)


def test_twin_one_hot_full_density_and_truncation():
    torch.manual_seed(1)
    base, models = torch.randn(4, 4).double(), [torch.randn(4, 4).double() for _ in range(2)]
    close(merged("twin", base, models, density=1.0, route=[0, 1]), models[1], 1e-12)
    close(merged("twin", base, models, density=1.0), (models[0] + models[1]) / 2, 1e-12)
    shared = base + .29 * (models[0] - base + models[1] - base)
    values = spectral.svd(models[0] - shared)[1]
    for rank in (1, 2):
        error = (merged("twin", base, models, density=rank / 4, route=[1, 0]) - models[0]).norm()
        close(error, values[rank:].square().sum().sqrt(), 1e-9)


def test_tsvm_examples():
    close(deltas("tsvm", torch.diag(tensor([3, 1])), torch.diag(tensor([0, 2]))), [[3, 0], [0, 2]])
    direction = tensor([.5, math.sqrt(3) / 2])
    found = deltas("tsvm", tensor([2, 0], [0, 0]), torch.outer(direction, direction))
    close(found, [[1.933013, -.25], [-.25, 1.066987]])
    close(torch.linalg.eigvalsh(found), [1, 2])
    tau = torch.randn(5, 4).double()
    close(deltas("tsvm", tau), tau, 1e-9)


def test_tsvm_sums_orthogonal_low_rank_tasks_and_survives_identical_ones():
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(12, 12).double())[0] for _ in range(2))
    taus = [left[:, 2 * i:2 * i + 2] @ torch.diag(tensor([3, 1.5])) @ right[:, 2 * i:2 * i + 2].T for i in range(3)]
    close(deltas("tsvm", *taus), sum(taus), 1e-9)
    tau = torch.randn(6, 4).double()
    close(deltas("tsvm", tau, tau), low_rank.truncated(tau, 2), 1e-9)


def test_rtsvm_weights_and_ranks():
    assert spectral.outlier_weights([3, 1]) == [1.5, .5]
    assert spectral.outlier_weights([0, 0]) == [1, 1]
    assert spectral.adaptive_ranks([.5, .5], 16) == [4, 4]
    assert spectral.adaptive_ranks([0, 0], 16) == [8, 8]
    shares = [spectral.sparsity(factor * torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).double() ** 5)
              for factor in (1.0, 0.5, 8.0)]
    assert shares[0] > 0 and shares[0] == shares[1] == shares[2]  # scaling a task vector leaves its sparsity
    by_sparsity = [spectral.adaptive_ranks([share, 0], 64)[0] for share in (0, .2, .5, .9, 1)]
    assert by_sparsity == sorted(by_sparsity, reverse=True) and by_sparsity[-1] == 1
    signs = torch.randn(8, 8).double().sign()  # equal magnitudes: no outliers, nothing small
    other = torch.randn(8, 8).double().sign()
    close(deltas("rtsvm", signs, other), deltas("tsvm", signs, other), 1e-9)


def test_doge_numbers():
    taus = tensor([1, 0], [0, 0]), tensor([0, 0], [0, 2])
    lambdas = projective.doge_lambdas(taus, .07)
    close(lambdas, [.07, .035])
    loss, gradient = projective.doge_loss(taus, lambdas, torch.zeros(2, 2).double())
    close(loss, 15.7645)
    close(gradient, [[-.1953, 0], [0, -1.6212]], 1e-4)
    scaled = projective.doge_lambdas([4 * tau for tau in taus], .07)
    close(torch.stack([weight * 4 * tau for weight, tau in zip(scaled, taus, strict=True)]),
          torch.stack([weight * tau for weight, tau in zip(lambdas, taus, strict=True)]))
    many = [torch.randn(12, 12).double() for _ in range(2)]
    lambdas, subspace = projective.doge_lambdas(many, .07), projective.shared_subspace(many, 6)
    assert all(weight * float(tau.norm()) == pytest.approx(.07) for weight, tau in zip(lambdas, many, strict=True))
    before = projective.doge_loss(many, lambdas, torch.zeros(12, 12).double())[0]
    for reproject in (False, True):
        shift = projective.doge_shift(many, lambdas, subspace, 1e-4, 400, reproject)
        assert projective.doge_loss(many, lambdas, shift)[0] < before
    assert float((subspace.T @ shift).abs().max()) < 1e-12


def test_doge_skips_a_zero_task_vector_and_keeps_the_base_elsewhere():
    tau = torch.randn(12, 12)
    doge = BY_METHOD["doge"]
    params = {"steps": 20}
    assert merge_tensors(doge, torch.zeros(12, 12), [tau, torch.zeros(12, 12)], params).isfinite().all()
    bias = torch.randn(4)
    assert torch.equal(merge_tensors(doge, bias, [bias + 1], params), bias)


def test_embeddings_of_widen_are_weighted_by_token():
    base = torch.randn(5, 3).double()
    models = [base + torch.randn(5, 3).double() for _ in range(2)]
    as_embedding = merge_tensors(BY_METHOD["widen"], base, models, tensor_class=TensorClass.EMBEDDING)
    as_matrix = merge_tensors(BY_METHOD["widen"], base.T.contiguous(), [model.T.contiguous() for model in models])
    close(as_embedding, as_matrix.T, 1e-12)
