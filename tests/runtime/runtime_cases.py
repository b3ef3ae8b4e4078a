"""Small graphs and plans for the runtime tests, and what a rank does with them."""

from __future__ import annotations

from typing import Any

import torch

from mipipe.graphs.operator_graph import (
    Operator,
    OperatorGraph,
    ParameterSpec,
    Phase,
    Segment,
    SegmentTrace,
    TensorSpec,
    Value,
)
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Action
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import PhaseTimes, PlanningProblem
from mipipe.planner.problems.from_graph import problem_of_groups
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions

ROWS, WIDTH = 3, 4


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


def linear_trace() -> SegmentTrace:
    """y = x w, with its gradients written by hand."""
    x, w = TensorSpec((ROWS, WIDTH), "float64"), TensorSpec((WIDTH, WIDTH), "float64")
    operators = (
        Operator("y", "aten.mm.default", Phase.F, [ref("x"), ref("w")], {}, (x,)),
        Operator("wt", "aten.t.default", Phase.I, [ref("w")], {}, (w,)),
        Operator("gx", "aten.mm.default", Phase.I, [ref("gy"), ref("wt")], {}, (x,)),
        Operator("xt", "aten.t.default", Phase.W, [ref("x")], {}, (TensorSpec((WIDTH, ROWS), "float64"),)),
        Operator("gw", "aten.mm.default", Phase.W, [ref("xt"), ref("gy")], {}, (w,)),
    )
    return SegmentTrace("linear", ("x",), ("w",), (), ("gy",), {"x": x, "w": w, "gy": x}, operators, ("y",), {},
                        ("gx",), ("gw",), ())


def loss_trace() -> SegmentTrace:
    """loss = sum(x * t)."""
    x, scalar = TensorSpec((ROWS, WIDTH), "float64"), TensorSpec((), "float64")
    operators = (
        Operator("p", "aten.mul.Tensor", Phase.F, [ref("x"), ref("t")], {}, (x,)),
        Operator("loss", "aten.sum.default", Phase.F, [ref("p")], {}, (scalar,)),
        Operator("gx", "aten.mul.Tensor", Phase.I, [ref("t"), ref("gl")], {}, (x,)),
    )
    return SegmentTrace("loss", ("x", "t"), (), (), ("gl",), {"x": x, "t": x, "gl": scalar}, operators, ("loss",), {},
                        ("gx", None), (), ())


def chain_graph(layers: int = 2) -> OperatorGraph:
    """x -> linear -> ... -> linear -> sum(. * t)."""
    x = TensorSpec((ROWS, WIDTH), "float64")
    segments = [Segment(f"layer{i}", f"layer{i}", "linear", (f"h{i}" if i else "x",), (f"h{i + 1}",), (f"layer{i}.w",))
                for i in range(layers)]
    segments.append(Segment("loss", "", "loss", (f"h{layers}", "t"), ("loss",)))
    values = [Value("x", x, None, False), Value("t", x, None, False)]
    values += [Value(f"h{i + 1}", x, f"layer{i}", True) for i in range(layers)]
    values.append(Value("loss", TensorSpec((), "float64"), "loss", True))
    parameters = tuple(ParameterSpec(f"layer{i}.w", TensorSpec((WIDTH, WIDTH), "float64")) for i in range(layers))
    return OperatorGraph("chain", ("x", "t"), ("loss",), "loss", tuple(segments), tuple(values), parameters,
                         (linear_trace(), loss_trace()))


def problem_of(graph: OperatorGraph, num_microbatches: int, ranks: int, groups: list[list[str]] | None = None,
               times: PhaseTimes | None = None) -> PlanningProblem:
    """A problem with one group for each list of segments and unit durations."""
    unit = times or PhaseTimes(1000, 1000, 1000)
    given = {Phase.F: unit.f_ns, Phase.I: unit.i_ns, Phase.W: unit.w_ns}
    return problem_of_groups(graph, groups or [[segment.name] for segment in graph.segments], Topology.uniform(ranks),
                             num_microbatches, lambda group: given)


def plan_of(problem: PlanningProblem, stages: list[tuple[list[int], list[int]]], routes: list[list[int]],
            orders: list[str], recompute: bool = False) -> Plan:
    """A plan from (groups, ranks) per stage, routes and one order string per rank."""
    return Plan("by hand", problem, Placement(tuple(Stage(tuple(g), tuple(r), recompute) for g, r in stages),
                                              tuple(map(tuple, routes))),
                Schedule(tuple(RankOrder(tuple(map(Action.parse, text.split()))) for text in orders)))


def chain_state(layers: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layer{i}.w": torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator) for i in range(layers)}


def chain_batch(num_microbatches: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(ROWS * num_microbatches, WIDTH, dtype=torch.float64, generator=generator)
            for name in ("x", "t")}


def chain_reference(layers: int, num_microbatches: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by torch's autograd."""
    state = {name: tensor.requires_grad_() for name, tensor in chain_state(layers).items()}
    batch = chain_batch(num_microbatches)
    h = batch["x"]
    for tensor in state.values():
        h = h @ tensor
    loss = (h * batch["t"]).sum() / num_microbatches
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in state.items()}


def run_plan(plan: Plan, graph: OperatorGraph, state: Any, batches: Any,
             options: EngineOptions | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What a rank does: one step for each batch, gradients accumulated; losses and gradients."""
    engine = Engine(plan, graph, state, options=options)
    losses = [engine.step(batch) for batch in batches]
    return losses, {name: item.grad for name, item in engine.named_parameters() if item.grad is not None}


def run_chain(plan: Plan, layers: int, num_microbatches: int, steps: int = 1,
              options: EngineOptions | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    return run_plan(plan, chain_graph(layers), chain_state(layers), [chain_batch(num_microbatches)] * steps, options)
