"""A problem built from a coarse graph: every number can be traced to its source, and mismatches are refused."""

import dataclasses

import pytest

from mipipe.graphs.coarse.graph import CoarseGraph, GroupValue, OpGroup
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import ProblemError
from mipipe.graphs.operator_graph import Phase, Tags
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Stream
from mipipe.planner.problem import Limits, PhaseTimes
from mipipe.planner.problems.from_graph import build_problem

F, I, W = Phase  # noqa: E741


@pytest.fixture
def coarse():
    groups = (
        OpGroup("vision", ("v0", "v1"), {F: 5}, {F: 1}, parameter_bytes=100, workspace_bytes={F: 7},
                tags=Tags(branch="vision")),
        OpGroup("dispatch", ("d",), {F: 0, I: 0}, {F: 1, I: 1}, collective=True, input_bytes=30),
        OpGroup("text", ("t",), {F: 9, I: 9, W: 9}, {F: 1, I: 1, W: 1}, parameter_bytes=1000, trainable_bytes=400,
                saved_fi_bytes=3, saved_fw_bytes=4, saved_iw_bytes=5, input_bytes=6,
                workspace_bytes={F: 8, I: 11, W: 9}, tags=Tags(branch="text")),
    )
    values = (GroupValue("a", 0, (1, 2), 64, None), GroupValue("b", 1, (2,), 32, 16))
    return CoarseGraph("toy", "d1", groups, values)


@pytest.fixture
def costs():
    entries = (GroupCost("vision", "device", {F: 50}, "given"), GroupCost("dispatch", "device", {F: 1, I: 2}, "given"),
               GroupCost("text", "device", {F: 10, I: 20, W: 30}, "profiled"))
    return CostTable("d1", entries)


def test_every_number_arrives(coarse, costs):
    problem = build_problem(coarse, costs, Topology.uniform(2), num_microbatches=3, optimizer="adamw",
                            limits=Limits(activation_bytes=99))
    vision, dispatch, text = problem.groups
    assert vision.times == {"device": PhaseTimes(50, None, None)} and vision.resident_bytes == 100
    assert dispatch.stream is Stream.COLLECTIVE and vision.stream is text.stream is Stream.COMPUTE
    assert dispatch.times["device"] == PhaseTimes(1, 2, None)
    assert text.times["device"] == PhaseTimes(10, 20, 30)
    assert text.resident_bytes == 1000 + 400 + 2 * 400 and text.gradient_bytes == 400
    assert (text.saved_fi_bytes, text.saved_fw_bytes, text.saved_iw_bytes) == (3, 4, 5)
    assert (text.workspace_bytes, text.forward_workspace_bytes) == (11, 8)
    assert (vision.workspace_bytes, vision.forward_workspace_bytes) == (0, 7)  # it has no backward
    assert text.segments == ("t",) and text.recompute_bytes is None
    assert [(edge.source, edge.targets, edge.num_bytes, edge.grad_bytes, edge.value) for edge in problem.edges] == [
        (0, (1, 2), 64, None, "a"), (1, (2,), 32, 16, "b")]
    assert problem.graph_digest == "d1" and problem.name == "toy" and problem.limits.activation_bytes == 99


@pytest.mark.parametrize(("optimizer", "state"), [("sgd", 0), ("momentum", 400), ("adamw_mixed", 2400), (1.5, 600)])
def test_optimizer_state_is_counted_for_what_trains(coarse, costs, optimizer, state):
    problem = build_problem(coarse, costs, Topology.uniform(1), num_microbatches=1, optimizer=optimizer,
                            gradient_bytes_per_parameter_byte=2)
    assert problem.groups[2].resident_bytes == 1000 + 800 + state
    assert problem.groups[0].resident_bytes == 100


def test_recomputation_keeps_inputs_and_is_not_offered_without_a_backward(coarse, costs):
    problem = build_problem(coarse, costs, Topology.uniform(1), num_microbatches=1, recompute=True)
    assert [group.recompute_bytes for group in problem.groups] == [None, 30, 6]


def test_loads_follow_branches_and_names(coarse, costs):
    loads = {"vision": [1.0, 0.0], "dispatch": [1, 2]}
    problem = build_problem(coarse, costs, Topology.uniform(1), num_microbatches=2, loads=loads)
    assert [group.loads for group in problem.groups] == [(1.0, 0.0), (1.0, 2.0), ()]


def test_colocation_goes_by_name(coarse, costs):
    problem = build_problem(coarse, costs, Topology.uniform(2), num_microbatches=1, colocate=(("vision", "text"),))
    assert problem.colocate == ((0, 2),)


def without(costs, group):
    return dataclasses.replace(costs, entries=tuple(entry for entry in costs.entries if entry.group != group))


@pytest.mark.parametrize(("change", "options", "message"), [
    (lambda costs: dataclasses.replace(costs, graph_digest="d2"), {}, "made for graph d2, but toy is graph d1"),
    (lambda costs: without(costs, "text"), {}, "no entry for group 'text' on device kind 'device'"),
    (lambda costs: dataclasses.replace(
        costs, entries=(*costs.entries[:2], GroupCost("text", "device", {F: 1}, "given"))), {},
     "group 'text' on 'device' has phases F, but the graph has F, I, W"),
    (None, {"optimizer": "adamax"}, "optimizer 'adamax': unknown; expected one of none, sgd"),
    (None, {"optimizer": -1.0}, "expected 0 or more"),
    (None, {"loads": {"audio": [1.0]}}, "'audio' is neither a group nor a branch; branches are text, vision"),
    (None, {"loads": {"text": [-1.0]}}, "found -1.0, expected sizes of 0 or more"),
    (None, {"loads": {"text": [1.0, 1.0]}}, "2 loads for 1 microbatches"),
    (None, {"colocate": [("text", "nobody")]}, "unknown group 'nobody'"),
    (None, {"num_microbatches": 0}, "0 microbatches; expected at least 1"),
])
def test_mismatches_are_refused_in_one_line(coarse, costs, change, options, message):
    table = change(costs) if change else costs
    with pytest.raises(ProblemError, match=message):
        build_problem(coarse, table, Topology.uniform(1), **{"num_microbatches": 1, **options})
