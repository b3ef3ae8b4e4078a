"""Coarsening: convex, deterministic, totals kept, protected boundaries, equal layers alike, saved storages once."""

import math
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.contract import contract, traffic_bytes
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.coarse.intervals import SLACK, cut_intervals
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import Phase, Role

X_BYTES = 4 * 8 * 4
W_BYTES = 8 * 8 * 4


def check_partition(graph, coarse):
    """Each segment is in one group, groups are convex (no path leaves and returns), totals are kept."""
    names = [name for group in coarse.groups for name in group.segments]
    assert sorted(names) == sorted(segment.name for segment in graph.segments)
    index = index_graph(graph)
    group_of = {name: number for number, group in enumerate(coarse.groups) for name in group.segments}
    for value in graph.values:
        source = index.source[value.name]
        if source >= 0:
            home = group_of[graph.segments[source].name]
            assert all(group_of[graph.segments[reader].name] >= home for reader in index.readers[value.name])
    for phase in Phase:
        assert sum(group.flops.get(phase, 0) for group in coarse.groups) == sum(t.flops(phase) for t in index.traces)
        assert (sum(group.bytes_moved.get(phase, 0) for group in coarse.groups)
                == sum(traffic_bytes(t, phase) for t in index.traces))
    assert len({group.name for group in coarse.groups}) == len(coarse.groups)


def test_granularities_follow_roles_and_layers(transformer):
    graph = transformer(3)
    assert len(coarsen(graph, granularity="operator").groups) == 14
    blocks = coarsen(graph, granularity="block")
    assert [len(group.segments) for group in blocks.groups] == [1, 2, 2, 2, 2, 2, 2, 1]
    assert blocks.groups[1].segments == ("layers.0.norm1", "layers.0.attn")
    layers = coarsen(graph, granularity="layer")
    assert [group.name for group in layers.groups] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    assert [group.tags.layer for group in layers.groups] == [None, 0, 1, 2, None]
    for coarse in (blocks, layers):
        check_partition(graph, coarse)


def test_equal_layers_coarsen_equally_and_share_a_structure(transformer):
    layers = coarsen(transformer(6), granularity="layer")
    assert len({group.structure for group in layers.groups[1:-1]}) == 1
    for count in range(8, 26):
        coarse = coarsen(transformer(6), num_groups=count)
        assert len(coarse.groups) <= count
        shapes = {}
        for group in coarse.groups:
            if group.tags.layer is not None:
                shapes.setdefault(group.tags.layer, []).append(group.structure)
        assert len({tuple(shape) for shape in shapes.values()}) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_between_layers_the_number_is_met_and_groups_are_even(transformer, count):
    graph = transformer(10)
    coarse = coarsen(graph, num_groups=count)
    check_partition(graph, coarse)
    assert len(coarse.groups) == count
    flops = [sum(group.flops.values()) for group in coarse.groups]
    layer = 12 * 2 * 4 * 8 * 8
    assert max(flops) <= math.ceil(10 / count) * layer + layer * 5 / 12


def test_expert_groups_are_never_merged_with_anything_else(transformer):
    graph = transformer(3, experts=4)
    coarse = coarsen(graph, num_groups=20)
    check_partition(graph, coarse)
    experts = [group for group in coarse.groups if group.tags.role is Role.EXPERTS]
    assert len(experts) == 12 and all(len(group.segments) == 1 for group in experts)
    # embed + layer 0's front | 4 experts | combine + front | 4 | combine + front | 4 | combine + head
    assert len(coarsen(graph, num_groups=16).groups) == 16
    with pytest.raises(GraphError, match=r"15 groups asked for, but protected boundaries .* leave 16 at least"):
        coarsen(graph, num_groups=15)


def test_branches_labels_and_all_to_alls_are_boundaries(builder):
    vision = builder.linear("v", builder.source("pixels"), branch="vision")
    vision = builder.linear("v2", vision, branch="vision")
    text = builder.linear("t", builder.source("ids"), branch="text")
    joined = builder.linear("t2", text, vision, branch="text")
    sent = builder.linear("dispatch", joined, branch="text", role=Role.DISPATCH, all_to_all=True)
    builder.linear("t3", sent, branch="text")
    graph = builder.graph()
    coarse = coarsen(graph, num_groups=4)
    check_partition(graph, coarse)
    assert [group.segments for group in coarse.groups] == [("v", "v2"), ("t", "t2"), ("dispatch",), ("t3",)]
    assert [group.collective for group in coarse.groups] == [False, False, True, False]
    labelled = coarsen(graph, num_groups=5, labels={"t2": "late"})
    assert ("t",) in [group.segments for group in labelled.groups]
    with pytest.raises(GraphError, match="4 at least; ask for 4 or more"):
        coarsen(graph, num_groups=3)
    with pytest.raises(GraphError, match="label names segment 'nobody'"):
        coarsen(graph, labels={"nobody": "x"})
    with pytest.raises(GraphError, match="0 groups asked for"):
        coarsen(graph, num_groups=0)


def test_a_storage_kept_by_two_segments_of_a_group_counts_once(builder):
    x = builder.linear("a", builder.source("ids"))
    left = builder.linear("b", x)
    right = builder.linear("c", x)
    builder.linear("d", left, right)
    graph = builder.graph()
    apart = {group.name: group for group in coarsen(graph, granularity="operator").groups}
    assert (apart["b"].saved_fi_bytes, apart["b"].saved_fw_bytes, apart["b"].saved_iw_bytes) == (0, X_BYTES, X_BYTES)
    # b and c keep the same x; the gradients of left and right are two tensors, d keeps the sum of its inputs.
    together = contract(index_graph(graph), [[0], [1, 2, 3]]).groups[1]
    assert together.saved_fw_bytes == X_BYTES + X_BYTES
    assert together.saved_iw_bytes == 3 * X_BYTES
    assert together.input_bytes == X_BYTES
    assert together.parameter_bytes == together.trainable_bytes == 3 * W_BYTES
    whole = contract(index_graph(graph), [[0, 1, 2, 3]]).groups[0]
    assert whole.saved_fw_bytes == 3 * X_BYTES  # ids, x, left + right
    assert whole.flops == {Phase.F: 4 * 512, Phase.I: 3 * 512, Phase.W: 4 * 512}


def test_values_between_groups_carry_gradients_only_where_one_flows(builder):
    frozen = builder.linear("vision", builder.source("pixels"), trainable=False)
    adapted = builder.linear("projector", frozen)
    builder.linear("head", adapted, frozen)
    coarse = coarsen(builder.graph(), granularity="operator")
    values = {value.name: value for value in coarse.values}
    assert values["vision"].targets == (1, 2) and values["vision"].grad_bytes is None
    assert values["projector"].grad_bytes == X_BYTES
    assert [sorted(group.flops) for group in coarse.groups] == [["F"], ["F", "W"], ["F", "I", "W"]]
    assert coarse.groups[0].trainable_bytes == 0 and coarse.groups[0].parameter_bytes == W_BYTES


def test_what_never_reaches_the_loss_has_no_backward(builder):
    x = builder.linear("a", builder.source("ids"))
    builder.linear("metric", x)
    builder.linear("loss", x)
    coarse = coarsen(builder.graph(), granularity="operator")
    assert [sorted(group.flops) for group in coarse.groups] == [["F", "W"], ["F"], ["F", "I", "W"]]
    assert coarse.groups[1].saved_fw_bytes == 0


def test_tied_parameters_count_once_in_a_group_and_in_each_group(builder):
    x = builder.linear("embed", builder.source("ids"))
    builder.linear("head", x, tied="embed.weight")
    graph = builder.graph()
    assert contract(index_graph(graph), [[0, 1]]).groups[0].parameter_bytes == W_BYTES
    assert [group.parameter_bytes for group in contract(index_graph(graph), [[0], [1]]).groups] == [W_BYTES, W_BYTES]


def test_workspace_holds_what_waits_between_members(builder):
    x = builder.linear("a", builder.source("ids"), trainable=False, wants_input_grad=False)
    y = builder.linear("b", x, trainable=False)
    builder.linear("c", x, y, trainable=False)
    group = contract(index_graph(builder.graph()), [[0, 1, 2]]).groups[0]
    # While b runs x and y exist, while c runs x, y and its own output.
    assert group.workspace_bytes[Phase.F] == 3 * X_BYTES


def test_a_skip_around_a_group_never_closes_a_cycle(builder):
    x = builder.linear("a", builder.source("ids"), layer=0)
    other = builder.linear("b", x, layer=1)
    builder.linear("c", x, other, layer=0)
    coarse = coarsen(builder.graph(), granularity="layer")
    assert [group.segments for group in coarse.groups] == [("a",), ("b",), ("c",)]


def test_coarsening_is_deterministic_and_names_its_graph(transformer):
    first, second = (coarsen(transformer(5, experts=2), num_groups=20) for _ in range(2))
    assert first == second and first.graph_digest == second.graph_digest != ""
    assert first.notes == {"groups": "20"}
    again = coarsen(transformer(5, experts=2), num_groups=len(first.groups))
    assert again.groups == first.groups


def test_sixty_one_layers_with_experts_take_seconds(transformer):
    graph = transformer(61, experts=8)
    begin = time.perf_counter()
    coarse = coarsen(graph, num_groups=600)
    assert time.perf_counter() - begin < 10
    assert len(coarse.groups) <= 600
    check_partition(graph, coarse)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_graphs_stay_acyclic_and_whole(builder, data):
    made = type(builder)()
    names = [made.source()]
    for number in range(data.draw(st.integers(1, 14))):
        inputs = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        layer = data.draw(st.none() | st.integers(0, 2))
        role = data.draw(st.sampled_from([Role.NORM, Role.ATTENTION, Role.MLP]))
        branch = data.draw(st.sampled_from(["text", "vision"]))
        names.append(made.linear(f"n{number}", *inputs, layer=layer, role=role, branch=branch))
    read = {name for segment in made.segments for name in segment.inputs}
    made.linear("loss", *(name for name in names if name not in read), branch="text")
    graph = made.graph()
    check_partition(graph, coarsen(graph, granularity=data.draw(st.sampled_from(["operator", "block", "layer"]))))
    try:
        count = data.draw(st.integers(1, 14))
        coarse = coarsen(graph, num_groups=count)
    except GraphError as error:
        assert "protected boundaries" in str(error)
    else:
        assert len(coarse.groups) <= count
        check_partition(graph, coarse)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_intervals_are_as_even_as_exhaustive_search_finds(costs, data):
    count = data.draw(st.integers(1, len(costs)))
    fixed = data.draw(st.sets(st.integers(1, len(costs) - 1), max_size=count - 1)) if len(costs) > 1 else set()
    ends = cut_intervals(costs, [0] * (len(costs) + 1), sorted(fixed), count)
    assert len(ends) == count and ends[-1] == len(costs) and ends == sorted(set(ends)) and fixed <= set(ends)

    def lightest(start, left):
        if left == 1:
            return sum(costs[start:]) if not any(start < cut for cut in fixed) else math.inf
        ends = [end for end in range(start + 1, len(costs) - left + 2) if not any(start < cut < end for cut in fixed)]
        return min((max(sum(costs[start:end]), lightest(end, left - 1)) for end in ends), default=math.inf)

    heaviest = max(sum(costs[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    assert heaviest <= lightest(0, count) * SLACK + 1e-6


def test_intervals_prefer_narrow_cuts_among_even_ones():
    assert cut_intervals([1, 1, 1, 1, 1, 1], [0, 9, 9, 9, 1, 9, 0], [], 2) == [3, 6]
    assert cut_intervals([2, 2, 0, 2, 2], [0, 9, 9, 1, 9, 0], [], 2) == [3, 5]
