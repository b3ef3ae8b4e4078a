"""The roofline against numbers worked out by hand."""

import dataclasses

import pytest

from mipipe.graphs.cluster import DeviceKind, shipped_kinds
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.costs.roofline import operator_seconds, roofline
from mipipe.graphs.errors import GraphError, InputError, ProblemError
from mipipe.graphs.operator_graph import Operator, Phase, TensorSpec

SLOW_MATH = DeviceKind("slow_math", {"float32": 10**6}, 10**12, None, 0, "test")
SLOW_MEMORY = DeviceKind("slow_memory", {"float32": 10**15}, 10**6, None, 0, "test")


def times(table, group, kind):
    return table.find(group, kind).times_ns


def test_groups_take_the_slower_of_flops_and_bytes(transformer):
    graph = transformer(2)
    coarse = coarsen(graph, granularity="layer")
    table = roofline(coarse, graph, {"slow_math": SLOW_MATH, "slow_memory": SLOW_MEMORY})
    # A layer has four products of 2*4*8*8 flops in each phase; norm2 also adds two tensors of 128 bytes.
    assert times(table, "layers.0", "slow_math") == dict.fromkeys(Phase, 4 * 512 * 1000) | {Phase.F: 4 * 512_000}
    product = (2 * 128 + 256) * 1000
    assert times(table, "layers.0", "slow_memory") == {Phase.F: 4 * product + 3 * 128_000, Phase.I: 4 * product,
                                                       Phase.W: 4 * product}
    assert times(table, "embed", "slow_math").keys() == {Phase.F, Phase.W}
    assert {entry.origin for entry in table.entries} == {"roofline"} and table.graph_digest == coarse.graph_digest
    assert "test" in table.notes["roofline.slow_math"]


def test_the_launch_overhead_is_a_floor_for_each_operator_that_does_something(transformer):
    graph = transformer(1)
    coarse = coarsen(graph, granularity="layer")
    kind = DeviceKind("k", {"float32": 10**15}, 10**15, None, 5_000, "test")
    table = roofline(coarse, graph, {"k": kind})
    assert times(table, "layers.0", "k") == {Phase.F: 5 * 5_000, Phase.I: 4 * 5_000 + 0, Phase.W: 4 * 5_000}


def matmul(dtype, n=4096):
    spec = TensorSpec((n, n), dtype)
    return Operator("y", "aten.mm.default", Phase.F, [], {}, (spec,), 2 * n**3, 2 * spec.num_bytes, spec.num_bytes)


def test_each_dtype_has_its_own_peak():
    h100 = shipped_kinds()["h100"]
    assert operator_seconds(matmul("bfloat16"), h100) == pytest.approx(2 * 4096**3 / 989e12)
    assert operator_seconds(matmul("float32"), h100) == pytest.approx(2 * 4096**3 / 67e12)
    assert operator_seconds(matmul("float32"), h100, "bfloat16") == pytest.approx(2 * 4096**3 / 989e12)
    with pytest.raises(InputError, match="device kind a100: no peak for float8_e4m3fn"):
        operator_seconds(matmul("float8_e4m3fn"), shipped_kinds()["a100"])


def test_causal_attention_computes_half_and_never_reads_the_scores():
    batch, heads, queries, size = 1, 32, 8192, 128
    spec = TensorSpec((batch, heads, queries, size), "bfloat16")
    flops = 4 * batch * heads * queries * queries * size
    args = [{"ref": "q"}, {"ref": "k"}, {"ref": "v"}, None, None, True, 0, 0.1, 0.0]
    causal = Operator("o", "mipipe.attention.default", Phase.F, args, {}, (spec,), flops, 3 * spec.num_bytes,
                      spec.num_bytes)
    full = Operator("o", "mipipe.attention.default", Phase.F, [*args[:5], False, *args[6:]], {}, (spec,), flops,
                    3 * spec.num_bytes, spec.num_bytes)
    h100 = shipped_kinds()["h100"]
    assert operator_seconds(full, h100) == pytest.approx(flops / 989e12)
    assert operator_seconds(causal, h100) == pytest.approx(flops / 2 / 989e12)
    capped = dataclasses.replace(causal, args=[*args[:8], 30.0])  # by its formulas, on whole scores in float32
    assert operator_seconds(capped, h100) == pytest.approx(flops / 67e12)


def test_cpu_and_foreign_graphs_are_refused(transformer):
    graph = transformer(1)
    coarse = coarsen(graph, granularity="layer")
    with pytest.raises(ProblemError, match=r"device kind cpu has no peaks.*profile"):
        roofline(coarse, graph, {"cpu": shipped_kinds()["cpu"]})
    with pytest.raises(GraphError, match=r"segment 'layers\.1.*not in the operator graph.*coarsen this graph again"):
        roofline(coarsen(transformer(2), granularity="layer"), graph, {"slow_math": SLOW_MATH})
