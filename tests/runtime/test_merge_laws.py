"""The laws every merge method keeps, checked for each entry of the registry."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.method_table.method_spec import Base
from mipipe.graphs.merging.method_table.methods import METHODS as SPECS
from mipipe.planner.merging import steps
from mipipe.runtime.merge.methods import quantile
from mipipe.runtime.merge.methods.method import merge_tensors
from mipipe.runtime.merge.methods.registry import METHODS as REGISTRY

METHODS = tuple(method for method in REGISTRY if not (method.spec.runs_models or method.spec.factors))
"""Those of whole models alone; what runs models or adds factors has tests of its own."""
NAMES = [method.spec.name for method in METHODS]
_ALWAYS: dict = {}
_HALF = {"lambda": 0.5}


@dataclass(frozen=True, slots=True)
class Invariants:
    """Which laws hold exactly.

    ``neutral``: parameters with which T = 1 returns the model (I2); None where it does not. ``identical``: parameters
    with which equal models give that model (I3). ``order``: permuting the models changes nothing (I4).
    ``linear``: parameters with which scaling the task vectors scales the merged delta (I7).
    """

    neutral: dict | None = None
    identical: dict | None = None
    order: bool = True
    linear: dict | None = None


LAWS = {
    "linear": Invariants(_ALWAYS, _ALWAYS),
    "passthrough": Invariants(_ALWAYS),
    "slerp": Invariants(None, {"t": 0.3}, order=False),
    "nuslerp": Invariants(None, {"weight": 1.0}),
    "karcher": Invariants(_ALWAYS, _ALWAYS),
    "multislerp": Invariants(_ALWAYS, None, linear=_ALWAYS),
    "model_stock": Invariants(_ALWAYS, _ALWAYS, linear=_ALWAYS),
    "task_arithmetic": Invariants(_ALWAYS, {"normalize": True}, linear=_HALF),
    "ties": Invariants(_ALWAYS, _ALWAYS, linear={"density": 0.4}),
    "dare_linear": Invariants(_ALWAYS, {"normalize": True}, order=False, linear={"density": 0.5}),
    "dare_ties": Invariants(_ALWAYS, {"normalize": True}, order=False, linear={"density": 0.5}),
    "della_linear": Invariants({"epsilon": 0.0}, {"normalize": True, "epsilon": 0.0}, order=False,
                               linear={"density": 0.5}),
    "della": Invariants({"epsilon": 0.0}, {"epsilon": 0.0}, order=False, linear={"density": 0.5}),
    "breadcrumbs": Invariants({"gamma": 0.0}, {"gamma": 0.0, "normalize": True}, linear={"density": 0.5}),
    "breadcrumbs_ties": Invariants({"gamma": 0.0}, {"gamma": 0.0, "normalize": True}, linear={"density": 0.5}),
    "arcee_fusion": Invariants(None, None),
    "nearswap": Invariants({"t": 1e6}, None),
    "ram": Invariants({"epsilon": 0.0}, {"epsilon": 0.0}, linear={"epsilon": 0.0}),
    "ramplus_tl": Invariants({"epsilon": 0.0, "r": 0.0}, {"epsilon": 0.0}, linear={"epsilon": 0.0, "r": 0.0}),
    "sce": Invariants(_ALWAYS, _ALWAYS, linear={"select_topk": 0.5}),
    "varm": Invariants(_ALWAYS, _ALWAYS, linear=_ALWAYS),
    "frank": Invariants(_ALWAYS, _ALWAYS, linear=_ALWAYS),
    "layer_swapping": Invariants(None, {"bottom": 2, "top": 1, "transition": 1}, order=False),
    "widen": Invariants(_ALWAYS, None),
    "lore": Invariants(None, _ALWAYS),
    "tsvm": Invariants(_ALWAYS, None, linear=_HALF),
    "rtsvm": Invariants(None, None, linear=_HALF),
    "iso_c": Invariants(None, None, linear=_HALF),
    "iso_cts": Invariants(None, None, linear=_HALF),
    "optmerge": Invariants(_ALWAYS, None, linear=_HALF),
    "wudi": Invariants(None, None, linear={"lambda": 0.5, "solver": "closed_form"}),
    "doge": Invariants(),
    "twin": Invariants({"density": 1.0}, {"density": 1.0}, linear={"density": 0.5}),
    "rmm": Invariants({"num_basis": 1, "rank": 10**6}, {"num_basis": 1, "rank": 10**6}),
    "onebit": Invariants({"route": 0, "full_precision": True}, {"route": 0, "full_precision": True}, order=False,
                         linear={"route": 0}),
}
"""A new method needs a row: what it promises is part of what it is."""

REQUIRED = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.01}, "nuslerp": {"weight": [1.0, 2.0]},
            "rmm": {"num_basis": 1, "rank": 4}, "onebit": {"route": 1}, "layer_swapping": {"bottom": 1, "top": 1},
            "doge": {"steps": 30}}
SPARSE = {"ties": {"density": .3}, "dare_linear": {"density": .5}, "dare_ties": {"density": .5},
          "della": {"density": .5}, "della_linear": {"density": .5}, "breadcrumbs": {"density": .5},
          "breadcrumbs_ties": {"density": .5}, "sce": {"select_topk": .4}}
ELEMENTWISE = {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
               "breadcrumbs_ties", "sce", "varm", "frank", "slerp", "model_stock", "layer_swapping", "widen",
               "multislerp", "arcee_fusion", "nearswap", "ram", "ramplus_tl"}

by_name = pytest.mark.parametrize("method", METHODS, ids=NAMES)


def keeping(law):
    """Parametrizes over the methods that keep a law."""
    kept = [method for method in METHODS if getattr(LAWS[method.spec.name], law) not in (None, False)]
    return pytest.mark.parametrize("method", kept, ids=[method.spec.name for method in kept])


def make(method, seed, count=None, shape=(12, 8), scale=0.01, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    count = count or min(3, method.spec.max_models or 3)
    base = torch.randn(shape, generator=generator, dtype=dtype)
    return base, [base + scale * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def run(method, base, models, params=None, **options):
    given_params = {**REQUIRED.get(method.spec.name, {}), **(params or {})}
    if method.spec.base is Base.UNUSED:
        base = None
    return merge_tensors(method, base, models, given_params, layer=1, num_layers=4, **options)


def test_every_method_says_which_laws_it_keeps():
    assert list(LAWS) == [spec.name for spec in SPECS if not (spec.runs_models or spec.factors)]


@by_name
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_models_equal_to_the_base_give_the_base(method, seed):
    """I1: to the last bit for elementwise methods, to rounding for spectral ones; vectors too."""
    for shape in ((12, 8), (9,)):
        base, models = make(method, seed, shape=shape, scale=0.0, dtype=torch.float32)
        params = {"full_precision": True} if method.spec.name == "onebit" else SPARSE.get(method.spec.name)
        found = run(method, base, models, params)
        if method.spec.name in ELEMENTWISE or (len(shape) == 1 and method.spec.name != "karcher"):
            assert torch.equal(found, base)
        else:
            torch.testing.assert_close(found, base, rtol=0, atol=2e-6)


@keeping("neutral")
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_one_model_at_neutral_scale_is_returned(method, seed):
    """I2, where the method keeps it."""
    base, models = make(method, seed, count=1)
    torch.testing.assert_close(run(method, base, models, LAWS[method.spec.name].neutral), models[0], rtol=0, atol=1e-9)


@keeping("identical")
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_identical_models_give_that_model(method, seed):
    """I3, where the method keeps it."""
    base, models = make(method, seed)
    models = [models[0]] * len(models)
    found = run(method, base, models, LAWS[method.spec.name].identical)
    torch.testing.assert_close(found, models[0], rtol=0, atol=1e-9)


@keeping("order")
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_the_order_of_models_does_not_matter(method, seed):
    """I4; methods with roles or random masks per model are exceptions."""
    base, models = make(method, seed)
    params = {**SPARSE.get(method.spec.name, {}), **({"weight": 1.0} if method.spec.name == "nuslerp" else {})}
    torch.testing.assert_close(run(method, base, models[::-1], params), run(method, base, models, params),
                               rtol=0, atol=1e-8)


@keeping("linear")
@given(seed=st.integers(0, 2**31), factor=st.sampled_from([0.5, 2.0, 4.0]))
@settings(max_examples=5, deadline=None)
def test_scaling_the_task_vectors_scales_the_merged_delta(method, seed, factor):
    """I7: for powers of two, so that thresholds and masks see exactly scaled values."""
    _, taus = make(method, seed, scale=1.0)
    zero = torch.zeros_like(taus[0])
    plain = run(method, zero, taus, LAWS[method.spec.name].linear)
    scaled = run(method, zero, [factor * tau for tau in taus], LAWS[method.spec.name].linear)
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-7, atol=1e-7)


@by_name
def test_tiles_do_not_change_what_is_selected_and_runs_repeat_bit_by_bit(method, monkeypatch):
    """I6: the same tile boundaries give the same bits; other boundaries the same merge to rounding."""
    base, models = make(method, 3, shape=(40, 8), scale=0.1)
    params = SPARSE.get(method.spec.name)
    first = run(method, base, models, params)
    assert torch.equal(first, run(method, base, models, params))
    if method.spec.name.startswith(("dare", "della")):
        return  # their masks are drawn per tile
    monkeypatch.setattr(steps, "TILE_ENTRIES", 24)
    torch.testing.assert_close(run(method, base, models, params), first, rtol=0, atol=1e-7)


@by_name
@pytest.mark.parametrize("tensor_class", [TensorClass.EMBEDDING, TensorClass.HEAD, TensorClass.VECTOR])
def test_other_tensor_classes_keep_shape_and_dtype(method, tensor_class):
    """I5 for embeddings, heads and vectors in float32."""
    shape = (9,) if tensor_class is TensorClass.VECTOR else (11, 8)
    base, models = make(method, 4, shape=shape, dtype=torch.float32)
    found = run(method, base, models, tensor_class=tensor_class)
    assert found.shape == base.shape and found.dtype == base.dtype and bool(found.isfinite().all())


@given(values=st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=200), data=st.data())
@settings(max_examples=200, deadline=None)
def test_top_k_selects_exactly_k_of_the_largest(values, data):
    tensor = torch.tensor(values)
    count = data.draw(st.integers(0, len(values)))
    mask = quantile.top_k_mask(tensor, count)
    assert int(mask.sum()) == count
    if 0 < count < len(values):
        assert float(tensor.abs()[mask].min()) >= float(tensor.abs()[~mask].max())


@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_counting_passes_find_the_kth_value_of_wide_ranges(seed, share):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(500, generator=generator) * 10.0 ** torch.randint(-30, 30, (500,), generator=generator)
    count = max(1, int(share * 500))
    kept = tensor.abs()[quantile.top_k_mask(tensor, count)]
    assert torch.equal(kept.sort().values, tensor.abs().sort().values[-count:])
