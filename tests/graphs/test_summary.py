"""Summaries add up, and the drawing shows every group and edge without overlaps."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.drawing import HEIGHT, WIDTH
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.costs.summary import coarse_svg, graph_summary, summary_rows
from mipipe.graphs.operator_graph import Phase

SVG = "{http://www.w3.org/2000/svg}"


def test_equal_layers_are_one_row_and_the_total_adds_up(transformer):
    graph = transformer(4)
    rows = summary_rows(graph)
    assert [row["part"] for row in rows] == ["embedding", "layers 0-3", "head", "total"]
    layer, total = rows[1], rows[-1]
    assert (layer["count"], layer["segments"], layer["operators"]) == (4, 4, 4 + 1 + 8 + 8)
    assert layer["parameters"] == 4 * 64
    assert layer["F_gflop"] == pytest.approx(4 * 512e-9)
    assert total["F_gflop"] == pytest.approx(sum(trace_flops(graph, Phase.F)) / 1e9)
    assert total["parameters"] == 18 * 64
    summary = graph_summary(graph)
    assert summary["parameters"] == summary["trainable_parameters"] == 18 * 64
    assert summary["segments"] == 18 and summary["distinct_segments"] == 3
    assert summary["flops"]["W"] == 18 * 512 and summary["rows"] == rows


def trace_flops(graph, phase):
    return [graph.trace(segment).flops(phase) for segment in graph.segments]


def test_layers_that_differ_are_rows_of_their_own(builder):
    x = builder.source("ids")
    for layer in range(4):
        x = builder.linear(f"l{layer}", x, layer=layer, branch="text", trainable=layer != 2, wants_input_grad=layer > 0)
    rows = summary_rows(builder.graph())
    assert [row["part"] for row in rows] == ["text layer 0", "text layers 1, 3", "text layer 2", "total"]


def test_an_encoder_and_a_decoder_are_told_apart(builder):
    x = builder.linear("encoder.layers.0.attn", builder.source("audio"), layer=0)
    x = builder.linear("decoder.layers.0.attn", x, layer=0)
    graph = builder.graph()
    assert [row["part"] for row in summary_rows(graph)] == ["encoder layer 0", "decoder layer 0", "total"]
    assert len(coarsen(graph, granularity="layer").groups) == 2


def test_a_coarse_graph_is_summed_up_by_structure_with_its_times(transformer):
    graph = transformer(3)
    coarse = coarsen(graph, granularity="layer")
    table = roofline(coarse, graph, {"slow": DeviceKind("slow", {"float32": 10**6}, 10**12, None, 0, "test")})
    rows = summary_rows(coarse, table)
    assert [row["part"] for row in rows] == ["embed", "layers.0 and 2 more", "head", "total"]
    assert rows[1]["I_us"] == 4 * 512 and rows[0]["I_us"] is None
    assert rows[-1]["F_us"] == pytest.approx((3 * 4 + 2) * 512)
    summary = graph_summary(coarse)
    assert summary["groups"] == 5 and summary["distinct_groups"] == 3
    assert summary["flops"]["F"] == 14 * 512


def boxes(svg):
    found = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        found.append((group.find(f"{SVG}title").text.splitlines()[0], float(rect.get("x")), float(rect.get("y"))))
    return found


@pytest.mark.parametrize("experts", [0, 5])
def test_the_drawing_has_every_group_and_edge_and_no_overlap(transformer, experts):
    graph = transformer(3, experts=experts)
    coarse = coarsen(graph, granularity="block")
    svg = coarse_svg(coarse)
    placed = boxes(svg)
    assert [name for name, _, _ in placed] == [group.name for group in coarse.groups]
    for number, (_, x, y) in enumerate(placed):
        for _, other_x, other_y in placed[:number]:
            assert abs(x - other_x) >= WIDTH or abs(y - other_y) >= HEIGHT
    edges = {(value.source, target) for value in coarse.values for target in value.targets}
    assert len(re.findall("<path", svg)) == len(edges)
    top = {name: y for name, _, y in placed}
    for source, target in edges:
        assert top[coarse.groups[source].name] < top[coarse.groups[target].name]


def test_branches_stand_side_by_side(builder):
    v = builder.source("pixels")
    t = builder.source("ids")
    for layer in range(3):
        v = builder.linear(f"v{layer}", v, layer=layer, branch="vision")
        t = builder.linear(f"t{layer}", t, layer=layer, branch="text")
    builder.linear("joined", t, v, branch="text")
    svg = coarse_svg(coarsen(builder.graph(), granularity="layer"))
    place = {name: (x, y) for name, x, y in boxes(svg)}
    for layer in range(3):
        assert place[f"v{layer}"][1] == place[f"t{layer}"][1] and place[f"v{layer}"][0] != place[f"t{layer}"][0]
    assert {place[f"v{layer}"][0] < place[f"t{layer}"][0] for layer in range(3)} in ({True}, {False})
    assert ">vision</text>" in svg and ">text</text>" in svg


def test_an_operator_graph_is_coarsened_for_the_drawing(transformer):
    assert len(boxes(coarse_svg(transformer(40)))) <= 64


def test_names_are_escaped(builder):
    builder.linear("a<b>&c", builder.source("x"))
    assert "a&lt;b&gt;&amp;c" in coarse_svg(coarsen(builder.graph(), granularity="operator"))
