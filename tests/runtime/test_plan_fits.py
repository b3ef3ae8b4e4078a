"""A plan runs for the graph it was made for, and its problem must be that of the graph, whatever its digest says."""

import dataclasses

import pytest
import runtime_cases as cases
import torch

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.costs.collectives import Fabric, Level
from mipipe.graphs.errors import PlanError
from mipipe.graphs.serialize import save
from mipipe.graphs.topology import Link
from mipipe.planner.actions import Stream
from mipipe.planner.check.graph import check_graph
from mipipe.planner.check.plan import check_plan
from mipipe.planner.plan import Plan, RankOrder, Schedule
from mipipe.planner.teams.again import TeamTask, with_task
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.machine import Machine
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.launching.prepare import held_otherwise
from mipipe.runtime.weights.weights import load_weights


def made():
    """The chain in three groups on one rank, split backward."""
    problem = cases.problem_of(cases.chain_graph(), 2, 1)
    return cases.plan_of(problem, [([0], [0]), ([1], [0]), ([2], [0])], [[0, 0]] * 3,
                         ["0F0 1F0 2F0 2I0 1I0 0I0 0W0 1W0 0F1 1F1 2F1 2I1 1I1 0I1 0W1 1W1"])


def group(number, **changes):
    def change(problem):
        groups = list(problem.groups)
        groups[number] = dataclasses.replace(groups[number], **changes)
        return problem.replace(groups=tuple(groups))
    return change


def times(number, **changes):
    found = made().problem.groups[number].times["device"]
    return group(number, times={"device": dataclasses.replace(found, **changes)})


def edge(number, **changes):
    def change(problem):
        edges = list(problem.edges)
        edges[number] = dataclasses.replace(edges[number], **changes)
        return problem.replace(edges=tuple(edges))
    return change


CHANGES = [
    (times(0, w_ns=None), "on device, a W False, the graph gives True"),
    (times(1, i_ns=None), "on device, an I False, the graph gives True"),
    (times(2, w_ns=5), "on device, a W True, the graph gives False"),
    (group(0, stream=Stream.COLLECTIVE), "stream collective, the graph gives compute"),
    (group(0, saved_fi_bytes=1), "saved_fi_bytes 1, the graph gives 0"),
    (group(0, saved_fw_bytes=7), "saved_fw_bytes 7, the graph gives"),
    (group(0, saved_iw_bytes=7), "saved_iw_bytes 7, the graph gives"),
    (group(1, workspace_bytes=3), "workspace_bytes 3, the graph gives"),
    (group(1, forward_workspace_bytes=3), "forward_workspace_bytes 3, the graph gives"),
    (group(1, recompute_bytes=3), r"recompute_bytes 3, the graph gives 96 \(or none\)"),
    (group(1, gradient_bytes=0), "gradient_bytes 0 for 128 trainable bytes; other groups have another ratio"),
    (group(2, gradient_bytes=8), "gradient_bytes 8, the graph has 0 trainable bytes there"),
    (group(1, resident_bytes=100), "the optimizer's part of resident_bytes -156"),
    (group(1, resident_bytes=256), "the optimizer's part of resident_bytes 0 for 128 trainable bytes; other groups"),
    (group(1, single=True), "single True, the graph gives False"),
    (group(1, segments=()), "group layer1 has no segments"),
    (group(1, segments=("layer0",)), "segment layer0 is in group layer0 and again in layer1"),
    (group(1, segments=("layer7",)), "segment 'layer7', which the graph does not have"),
    (edge(0, num_bytes=1), r"value h1: \(source, targets, bytes, gradient bytes\) are \(0, \(1,\), 1, 96\)"),
    (edge(0, grad_bytes=None), r"are \(0, \(1,\), 96, None\), the graph gives \(0, \(1,\), 96, 96\)"),
    (edge(0, targets=(1, 2)), r"are \(0, \(1, 2\), 96, 96\)"),
    (edge(1, value="h1"), "value 'h1' has two edges"),
    (edge(0, value="x"), "an edge for value 'x', which passes between no groups"),
    (lambda problem: problem.replace(edges=problem.edges[:1]), "value h2, which passes from group layer1, has no edge"),
    (lambda problem: problem.replace(graph_digest=""), "made for graph no graph at all"),
    (lambda problem: problem.replace(graph_digest="f" * 16), "made for graph ffffffffffffffff"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=[message[:40] for _, message in CHANGES])
def test_a_problem_that_is_not_its_graphs_is_refused(change, message):
    """One line that names the group or value and both figures; the problem as it was made passes."""
    plan, graph = made(), cases.chain_graph()
    check_graph(plan, graph)
    changed = dataclasses.replace(plan, problem=change(plan.problem))
    with pytest.raises(PlanError, match=message) as caught:
        check_graph(changed, graph)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("plan this graph again")


def test_what_the_graph_does_not_say_is_free():
    """Durations, relative sizes, names, an offer of recomputation, and the room of the optimizer's state."""
    plan, graph = made(), cases.chain_graph()
    problem = plan.problem
    for change in (times(0, f_ns=77), group(0, loads=(1.0, 2.0)), group(0, name="first"), group(1, recompute_bytes=96),
                   lambda p: cases.problem_of_groups(graph, [[item.name] for item in graph.segments], p.topology, 2,
                                                     lambda _: dict.fromkeys(cases.Phase, 5), optimizer=0.37,
                                                     gradient_bytes_per_parameter_byte=2.0)):
        check_graph(dataclasses.replace(plan, problem=change(problem)), graph)


def without_updates():
    """A plan whose second layer lost its W, consistently: problem and order."""
    plan = made()
    problem = times(1, w_ns=None)(plan.problem)
    kept = tuple(action for action in plan.schedule.ranks[0].compute if str(action)[:2] != "1W")
    return Plan(plan.name, problem, plan.placement, Schedule((RankOrder(kept),)))


def test_a_stage_that_would_never_be_updated(mipipe_check, tmp_path):
    """It breaks no rule of plans, so only the graph can tell: neither the engine nor ``check --graph`` takes it."""
    plan, graph = without_updates(), cases.chain_graph()
    check_plan(plan)
    with pytest.raises(PlanError, match="group layer1: on device, a W False, the graph gives True"):
        Engine(plan, graph, cases.chain_state())
    save(plan, tmp_path / "plan.json")
    save(graph, tmp_path / "graph.json")
    code, error = mipipe_check(tmp_path / "plan.json", "--graph", tmp_path / "graph.json")
    assert code == PlanError.exit_code and "group layer1: on device, a W False" in error
    assert mipipe_check(tmp_path / "plan.json")[0] == 0


@pytest.mark.parametrize("own, kept, counted", [
    ("float32", None, None), ("float32", "float32", None), ("float32", "float64", 16), ("float32", "bfloat16", 16),
    ("float64", None, None), ("bfloat16", "float32", None), ("bfloat16", None, 18), ("bfloat16", "float64", 18)])
def test_a_dtype_that_the_plan_does_not_count_is_told(own, kept, counted):
    """The line's bytes are those of what the run makes for AdamW: weights, gradients, two moments."""
    graph = cases.chain_graph()
    graph = dataclasses.replace(graph, parameters=tuple(dataclasses.replace(item, spec=dataclasses.replace(
        item.spec, dtype=own)) for item in graph.parameters))
    machine = Machine(DeviceKind("d", {own: 1}, 1, 1, 0, ""), Fabric((Level("host", 8, Link(0, 1)),)), 1, own)
    plan = with_task(made(), TeamTask(machine, TeamOptions()))
    weights = load_weights(graph, [item.fqn for item in graph.parameters], cases.chain_state(), torch.device("cpu"),
                           getattr(torch, kept) if kept else None)
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in (*weights.parameters.values(), *weights.compute.values())}
    trained = sum(3 * item.nbytes for item in weights.parameters.values())  # gradients and moments, in the master's
    held = (sum(sizes.values()) + trained) // sum(item.numel() for item in weights.parameters.values())
    line = held_otherwise(plan, TrainConfig(steps=1, dtype=kept))
    if counted is None:
        assert line is None
        return
    assert f"counts {counted} bytes" in line and f"in {kept or own} it is {held}, so ranks hold" in line
    assert ("hold more than" in line) == (held > counted)
    assert held_otherwise(made(), TrainConfig(steps=1, dtype=kept)) is None  # a plan that was made for nothing known


@pytest.fixture
def mipipe_check():
    """``mipipe check`` in this process: exit code and stderr."""
    from typer.testing import CliRunner

    from mipipe.cli.main import app

    def run(*arguments):
        done = CliRunner().invoke(app, ["check", *map(str, arguments)])
        return done.exit_code, done.stderr
    return run
