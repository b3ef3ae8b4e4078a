"""What a plan promises: tokens per second and utilisation by hand, memory by use, and the reserve."""

from __future__ import annotations

import dataclasses

import pytest

from mipipe.graphs.cluster import Cluster, DeviceKind
from mipipe.graphs.coarse.graph import CoarseGraph, OpGroup
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import (
    OperatorGraph,
    ParameterSpec,
    Phase,
    Segment,
    SegmentTrace,
    Tags,
    TensorSpec,
    Value,
)
from mipipe.graphs.serialize import to_data
from mipipe.graphs.topology import Topology
from mipipe.planner.execution.estimate import RankMemory, estimate, memory_by_use
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problems.on_cluster import default_optimizer, model_problem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import plan

KIND = DeviceKind("gpu", {"bfloat16": 500, "float32": 50}, 100, 1000, 0, "test", count=2, efficiency=0.5)
CLUSTER = Cluster(Topology.uniform(2, kind="gpu", memory_bytes=1000), {"gpu": KIND})


def graph_of(*dtypes: str) -> OperatorGraph:
    """One segment that reads 3 sequences of 5 tokens, with a parameter of 8 values for each dtype."""
    parameters = tuple(ParameterSpec(f"p{number}", TensorSpec((8,), dtype)) for number, dtype in enumerate(dtypes))
    trace = SegmentTrace("t", ("x",), (), (), (None,), {"x": TensorSpec((3, 5), "int64")}, (), ("y",), {}, (None,), (),
                         ())
    return OperatorGraph("model", ("input_ids",), ("loss",), "loss",
                         (Segment("s", "s", "t", ("input_ids",), ("loss",), tags=Tags()),),
                         (Value("input_ids", TensorSpec((3, 5), "int64"), None, False),
                          Value("loss", TensorSpec((), "float32"), "s", True)), parameters, (trace,))


def planned(**options) -> Plan:
    """Two groups on two devices: 10 ns forward, 20 and 10 backward; 16 bytes of bfloat16 parameters each."""
    groups = tuple(OpGroup(f"g{number}", (f"s{number}",), {Phase.F: 600, Phase.I: 700, Phase.W: 700},
                           dict.fromkeys(Phase, 0), parameter_bytes=20, trainable_bytes=16, saved_fw_bytes=30)
                   for number in range(2))
    coarse = CoarseGraph("model", "digest", groups, ())
    costs = CostTable("digest", tuple(GroupCost(group.name, "gpu", {Phase.F: 10, Phase.I: 20, Phase.W: 10}, "profiled")
                                      for group in groups))
    problem, facts = model_problem(coarse, CLUSTER, 4, costs=costs, optimizer="adamw_mixed", **options)
    facts = dataclasses.replace(facts, dtype="bfloat16", tokens=60.0, peak_flops=4000.0)  # as an operator graph says
    found = plan(problem, PlanOptions(time_limit_s=2, placement="chain", use_search=False)).plan
    assert found is not None
    return dataclasses.replace(found, provenance={**found.provenance, "model": to_data(facts)})


def test_rates_and_utilisation_by_hand() -> None:
    """A chain of two: 4 x 40 ns of work behind a start of 10 ns and an end; 16,000 products of a step."""
    found = planned()
    timeline = simulate(found, lower(found))
    told = estimate(found, timeline)
    assert told is not None
    seconds = timeline.makespan_ns / 1e9
    assert told.devices == 4 and told.tokens_per_s == pytest.approx(60 / seconds)
    assert told.tokens_per_s_per_device == pytest.approx(15 / seconds)
    assert told.utilisation == pytest.approx(16_000 / (4000 * seconds))
    assert told.costs == {"profiled": 2} and told.measured


def test_memory_by_use_adds_up() -> None:
    """16 trainable bytes of bfloat16: as many of gradients, 6 times that of state (4 + 4 + 4 for each 2)."""
    found = planned()
    timeline = simulate(found, lower(found))
    for rank, part in enumerate(memory_by_use(found, timeline)):
        assert (part.weights, part.gradients, part.optimizer) == (20, 16, 96)
        assert part.resident == 132 and part.activations >= 30
        assert part.capacity == 935  # 1,000 / 1.07: the rest is the allocator's
        assert part.peak == timeline.peak_bytes(rank)


@pytest.mark.parametrize(("peak", "tight"), [(94, False), (95, True), (100, True)])
def test_five_percent_are_a_reserve(peak: int, tight: bool) -> None:
    assert RankMemory(50, peak - 50, 100).tight is tight
    assert not RankMemory(50, peak - 50, None).tight


def test_a_bare_problem_promises_nothing() -> None:
    found = plan(uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1), PlanOptions(time_limit_s=1)).plan
    assert found is not None and estimate(found, simulate(found, lower(found))) is None


@pytest.mark.parametrize(("dtypes", "optimizer"), [
    (("bfloat16",), "adamw_mixed"), (("float16", "float16", "float32"), "adamw"), (("float32",), "adamw"),
    (("bfloat16", "bfloat16", "bfloat16", "float32"), "adamw_mixed"), ((), "adamw")])
def test_the_optimizer_follows_the_dtype(dtypes: tuple[str, ...], optimizer: str) -> None:
    """By bytes: two parameters in float16 weigh as much as one in float32, which then counts."""
    assert default_optimizer(graph_of(*dtypes)) == optimizer


def test_a_coarse_graph_needs_costs() -> None:
    with pytest.raises(InputError, match="needs costs"):
        model_problem(CoarseGraph("model", "digest", (OpGroup("g", ("s",), {Phase.F: 1}, {Phase.F: 1}),), ()), CLUSTER,
                      2)
