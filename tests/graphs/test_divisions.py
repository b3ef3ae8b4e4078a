"""No division can give a wrong result: small functions under random divisions of all they take and give."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from local_team import largest_error

from mipipe.graphs.operator_graph import TensorSpec
from mipipe.graphs.operators import kernels  # noqa: F401  (registers mipipe's operators)
from mipipe.graphs.sharding.assign import Layouts, assign, no_scatter
from mipipe.graphs.sharding.member import build_member
from mipipe.graphs.sharding.parts import divided, fits
from mipipe.graphs.sharding.refine import refine
from mipipe.graphs.tracing.partition import trace_segment

ops = torch.ops.mipipe


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def windowed(q, k, v):
    return ops.attention(q, k, v, None, None, True, 3, 0.5, 0.0)[0]


def with_sinks(q, k, v, sinks):
    return ops.attention(q, k, v, None, sinks, True, 0, 0.5, 0.0)[0]


def experts(x, index, bank):
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    offsets = torch.cumsum(ops.histogram(chosen, 4, 0, 3), 0, dtype=torch.int32)
    rows = torch.relu(ops.grouped_mm(x[order], bank, offsets))
    return ops.grouped_mm(rows, bank.transpose(1, 2), offsets)[torch.argsort(order)]


def routed(x, gate):
    weights, index = torch.topk((x @ gate).softmax(-1), 2)
    return torch.zeros_like(x @ gate).scatter(1, index, weights)


def fused(x, weight):
    q, k, v = (x @ weight).chunk(3, -1)
    return torch.tanh(q) * k + v


def interleaved(x):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * 0.5 + turned * torch.arange(x.shape[-2])[:, None].to(x.dtype)


def rotated(x):
    half = x.shape[-1] // 2
    return x * 0.5 + torch.cat((-x[..., half:], x[..., :half]), -1) * torch.arange(x.shape[-2])[:, None].to(x.dtype)


CASES = {
    "mlp": (lambda x, a, b: F.gelu(x @ a) @ b, {"x": (4, 4, 8), "a": (8, 16), "b": (16, 8)}),
    "biased": (lambda x, w, b, v, c: x + F.linear(F.silu(F.linear(x, w, b)), v, c),
               {"x": (4, 4, 8), "w": (16, 8), "b": (16,), "v": (8, 16), "c": (8,)}),
    "unnormed": (lambda x, a, b, v: x + (F.silu(x @ a) * (x @ b)) @ v,
                 {"x": (4, 4, 8), "a": (8, 16), "b": (8, 16), "v": (16, 8)}),
    "fused": (fused, {"x": (4, 8), "w": (8, 24)}),
    "squares": (lambda x, a: (x @ a) * (x @ a) + (x @ a).sum(0), {"x": (4, 8), "a": (8, 4)}),
    "norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), {"x": (4, 4, 8), "w": (8,), "b": (8,)}),
    "rms": (lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1) * w, {"x": (4, 4, 8), "w": (8,)}),
    "heads": (lambda x, w: (x @ w).view(4, 4, 4, 4).transpose(1, 2).softmax(-1).sum((0, 2)), {"x": (4, 4, 8),
                                                                                             "w": (8, 16)}),
    "batched": (lambda a, b: torch.bmm(a, b).mean((0, 2)), {"a": (4, 4, 8), "b": (4, 8, 4)}),
    "rotated": (rotated, {"x": (4, 4, 4, 8)}),
    "interleaved": (interleaved, {"x": (4, 4, 4, 8)}),
    "moved": (lambda x: torch.stack(x.permute(2, 0, 1).unbind(1)).unsqueeze(1).expand(4, 3, 8, 4).flip(0)[:, 1:],
              {"x": (4, 4, 8)}),
    "pieces": (lambda x: torch.cat([piece * (i + 1) for i, piece in enumerate(x.split(2, 1))], 1)[:, :-1].cumsum(0),
               {"x": (4, 8)}),
    "attention": (functools.partial(attend, is_causal=True), {"q": (4, 4, 4, 8), "k": (4, 4, 4, 8), "v": (4, 4, 4, 8)}),
    "cross": (attend, {"q": (4, 4, 4, 8), "k": (4, 4, 8, 8), "v": (4, 4, 8, 8)}),
    "masked": (lambda q, k, v, m: attend(q, k, v, attn_mask=m > 0), {"q": (4, 4, 4, 8), "k": (4, 4, 4, 8),
                                                                    "v": (4, 4, 4, 8), "m": (4, 1, 4, 4)}),
    "windowed": (windowed, {"q": (4, 4, 8, 8), "k": (4, 2, 8, 8), "v": (4, 2, 8, 8)}),
    "one key": (windowed, {"q": (4, 4, 8, 8), "k": (4, 1, 8, 8), "v": (4, 1, 8, 8)}),
    "sinks": (with_sinks, {"q": (4, 4, 4, 8), "k": (4, 4, 4, 8), "v": (4, 4, 4, 8), "s": (4,)}),
    "table": (lambda w, i: F.embedding(i, w, padding_idx=1), {"w": (8, 4), "i": (4, 4)}),
    "entropy": (lambda x, i: F.cross_entropy(x, i, ignore_index=2), {"x": (8, 8), "i": (8,)}),
    "entropies": (lambda x, i: F.cross_entropy(x, i, reduction="sum"), {"x": (8, 8), "i": (8,)}),
    "each": (lambda x, i: F.cross_entropy(x, i, reduction="none"), {"x": (8, 8), "i": (8,)}),
    "picked": (lambda x, i: x[i] * 2 + x.index_select(0, i), {"x": (8, 4), "i": (8,)}),
    "routed": (routed, {"x": (8, 4), "g": (4, 8)}),
    "experts": (experts, {"x": (8, 4), "i": (8,), "bank": (4, 4, 8)}),
    "convolved": (lambda x, w, b: F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2).flatten(1),
                  {"x": (4, 2, 4, 4), "w": (4, 2, 3, 3), "b": (4,)}),
}
"""Functions of tensors, with the shapes of these; ``i`` are integers below 4."""
STATES = ("w", "b", "a", "v", "c", "s", "g", "bank")


@functools.cache
def traced(name):
    function, shapes = CASES[name]
    first = [key for key in shapes if key not in STATES or (key in "ab" and name == "batched") or name == "masked"
             or (key == "v" and "q" in shapes)]
    if name == "table":
        function = (lambda inner: lambda i, w: inner(w, i))(function)
    order = [*first, *(key for key in shapes if key not in first)]
    if name == "experts":
        function = (lambda inner: lambda x, i, bank: inner(x, i, bank))(function)
    specs = {key: TensorSpec(shapes[key], "int64" if key == "i" else "float64") for key in order}
    wants = [key not in ("i", "m") for key in first]
    return trace_segment(lambda *given: [function(*given)], {key: specs[key] for key in first},
                         {key: specs[key] for key in order if key not in first}, differentiable=wants)


@pytest.mark.parametrize("name", ["biased", "unnormed", "windowed", "entropy", "experts"])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_some_divisions_are_right(name, data):
    """F, I and W of a team equal those of one process, however arguments and results lie."""
    compare(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_division_is_right(name, data):
    compare(name, data)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_what_is_kept_of_other_divisions_changes_none(name, data):
    """Layouts that share what is known of operators divide as each does that knows nothing."""
    trace = traced(name)
    size, scatter = data.draw(st.sampled_from([2, 4])), data.draw(st.sampled_from([no_scatter, in_front]))
    shared = Layouts(size, {}, scatter=scatter)
    for _ in range(4):
        given, wanted, _ = drawn(trace, size, data)
        deferred = frozenset(data.draw(st.sets(st.sampled_from([item.name for item in trace.operators]), max_size=3)))
        early = frozenset(grad for grad in trace.output_grads if grad in given and data.draw(st.booleans()))
        made = replace(shared, given=given, wanted=wanted, deferred=deferred, early=early)
        assert assign(trace, made) == assign(trace, replace(made, known={}))


def in_front(shape):
    return divided(0) if shape and shape[0] % 4 == 0 else None


def drawn(trace, size, data):
    """Divisions of what a trace is given, and of its results, with the names of all that it is given."""
    def part(shape):
        choices = [divided(dim, sections) for dim in range(len(shape)) for sections in (1, 2)
                   if fits(shape, divided(dim, sections), size)]
        return data.draw(st.sampled_from([None, *choices]))

    names = [*trace.inputs, *trace.parameters, *(grad for grad in trace.output_grads if grad is not None)]
    chosen = {key: part(trace.specs[key].shape) for key in names}
    results = [key for key in (*trace.outputs, *trace.input_grads) if key is not None]
    asked = {key: part(trace.specs[key].shape) for key in results}
    return ({key: found for key, found in chosen.items() if found is not None},
            {key: found for key, found in asked.items() if found is not None}, names)


def compare(name, data):
    """Draw a division and run it."""
    trace, size = traced(name), data.draw(st.sampled_from([2, 4]))

    given, wanted, names = drawn(trace, size, data)
    scatters = data.draw(st.booleans())
    layouts = Layouts(size, given, wanted,
                      lambda shape: divided(0) if shape and shape[0] % size == 0 and scatters else None)
    layouts, assignment = refine(trace, layouts)
    program = build_member(trace, layouts, "team", assignment)

    generator = torch.Generator().manual_seed(3)
    arguments = {key: torch.randint(0, 4, trace.specs[key].shape, generator=generator)
                 if trace.specs[key].dtype == "int64" else
                 torch.randn(trace.specs[key].shape, generator=generator, dtype=torch.float64) for key in names}
    assert largest_error(trace, program, layouts.given, assignment.ends, arguments, size) <= 1e-12
