"""Expert parallelism in the graph: all-to-alls on the communication stream, with their bytes, times and memory."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from mipipe.graphs.capture.model import capture
from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.errors import InputError, ProblemError
from mipipe.graphs.exchange import check_exchange, expert_shares, moved_bytes, share_of, slowest_link
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role
from mipipe.graphs.topology import Link, Topology
from mipipe.planner.actions import Stream
from mipipe.planner.check import check_plan
from mipipe.planner.options import PlanOptions
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.solve import plan

RANKS, TOKENS, TOP, HIDDEN = 4, 16, 2, 16
BYTES = TOKENS * TOP * HIDDEN * 4
SENT = BYTES + TOKENS * TOP * 4  # rows go with their routing weights, and come back weighted
FREE = DeviceKind("free", {"float32": 10**18}, 10**18, None, 0, "test")
SLOW = Link(1000, 10**6)


@pytest.fixture(scope="module")
def graph() -> OperatorGraph:
    """One MoE layer of 8 experts, two for each of 2 x 8 tokens, shared by four ranks."""
    small: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 32, "moe_intermediate_size": 8, "head_dim": 8,
                             "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 8, "vocab_size": 32,
                             "num_experts_per_tok": TOP, "num_hidden_layers": 1}
    return capture("qwen3_moe", overrides=small, seq=8, batch=2, expert_parallel=RANKS)


def test_all_to_alls_are_collective_segments_that_move_every_row(graph: OperatorGraph) -> None:
    index = index_graph(graph)
    coarse = coarsen(graph, granularity="operator")
    assert [group.name.rpartition(".")[2] for group in coarse.groups if group.collective] == ["dispatch", "combine"]
    number = {segment.tags.role: place for place, segment in enumerate(graph.segments)}
    share = expert_shares(graph)["model.layers.0.mlp.dispatch"]
    for role, size in ((Role.DISPATCH, SENT), (Role.COMBINE, BYTES)):
        trace = index.traces[number[role]]
        assert [moved_bytes(trace, phase, share) for phase in Phase] == [size * 3 // 4, size * 3 // 4, 0]
    weighted = next(trace for segment, trace in zip(graph.segments, index.traces, strict=True)
                    if segment.name.endswith(".mlp.sum"))
    assert not weighted.saved  # rows come back weighted: none is kept for the gradient of the weights
    experts = next(group for group in coarse.groups if group.tags.role is Role.EXPERTS)
    assert experts.parameter_bytes == experts.trainable_bytes == 3 * 8 * HIDDEN * 8 * 4 // RANKS


def test_their_time_is_that_of_the_slowest_link_and_of_the_busiest_rank(graph: OperatorGraph) -> None:
    coarse = coarsen(graph, granularity="operator")
    table = roofline(coarse, graph, {"free": FREE}, link=SLOW)
    sent = next(entry for entry in table.entries if entry.group.endswith("dispatch"))
    assert sent.times_ns == dict.fromkeys((Phase.F, Phase.I), SLOW.transfer_ns(SENT * 3 // 4))
    assert table.notes["all_to_all"].startswith("4 ranks, 1000 ns and 0.001 GB/s, busiest rank 1 x")
    with pytest.raises(ProblemError, match="all-to-alls, so they need a link"):
        roofline(coarse, graph, {"free": FREE})
    mixed = Topology.uniform(3, latency_ns=5, bytes_per_s=10**9)
    assert slowest_link(mixed) == Link(5, 10**9) and slowest_link(Topology.uniform(1)) is None
    assert slowest_link(Topology.uniform(1, bytes_per_s=7)) == Link(0, 7)


def test_loads_decide_by_the_busiest_rank() -> None:
    assert share_of(4, None) == share_of(4, [3.0] * 8) == share_of(4, [0.0] * 8)
    busy = share_of(2, [6, 2, 1, 1])  # rank 0 gets 0.8 of all rows: 0.8 of its peer's arrive
    assert busy.work == pytest.approx(1.6) and busy.wire == pytest.approx(0.8)


def test_the_planner_uses_both_streams_and_keeps_a_layer_on_one_rank(graph: OperatorGraph) -> None:
    coarse = coarsen(graph, granularity="operator")
    kind = DeviceKind("slow", {"float32": 10**9}, 10**9, None, 0, "test")
    topology = Topology.uniform(2, latency_ns=1000, bytes_per_s=10**9, kind="slow")
    costs = roofline(coarse, graph, {"slow": kind}, link=slowest_link(topology))
    problem = build_problem(coarse, costs, topology, num_microbatches=4)
    streams = [group.stream for group in problem.groups]
    names = [group.name for group in problem.groups]
    assert streams.count(Stream.COLLECTIVE) == 2
    layer = tuple(sorted(names.index(f"model.layers.0.mlp.{part}") for part in ("dispatch", "experts", "combine")))
    assert problem.colocate == (layer,)
    result = plan(problem, PlanOptions(time_limit_s=2, seed=0, use_milp=False, threads=1))
    assert result.plan is not None, result.reason
    check_plan(result.plan)
    assert any(order.collective for order in result.plan.schedule.ranks)
    homes = {stage.ranks for stage in result.plan.placement.stages if set(stage.groups) & set(layer)}
    assert len(homes) == 1


@pytest.mark.parametrize(("source", "found", "message"), [
    ({"expert_parallel": 4}, [], "no experts to share among 4 ranks"),
    ({"expert_parallel": 3}, [8], "found 3 ranks, expected a divisor of the 8 experts"),
    ({"expert_parallel": 2, "expert_loads": [[1] * 8] * 2}, [8], "found 2 layers of 8 experts, expected 1 of 8"),
])
def test_what_does_not_fit_the_model_is_refused(source: dict[str, Any], found: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_exchange(source, found)


def test_the_two_forms_exclude_each_other() -> None:
    with pytest.raises(InputError, match="two forms of the same layers"):
        capture("qwen3_moe", expert_groups=2, expert_parallel=2)
