"""A chain of blocks for the runtime benchmarks: modules, the operator graph with one segment each, a plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mipipe.graphs.operator_graph import OperatorGraph, ParameterSpec, Phase, Segment, TensorSpec, Value
from mipipe.graphs.topology import Topology
from mipipe.graphs.tracing.partition import trace_module
from mipipe.graphs.tracing.trace import spec_of
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.from_graph import problem_of_groups

ROWS, WIDTH = 32, 256


class Block(nn.Module):
    """``depth`` linear layers with tanh between them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class WithLoss(nn.Module):
    """The last stage and the loss."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return squared_error(self.block(x), target)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def build_graph(blocks: list[nn.Module]) -> OperatorGraph:
    """The operator graph of a chain of blocks, one segment each."""
    example = torch.zeros(ROWS, WIDTH)
    segments, values, parameters, traces = [], [], [], {}
    spec = spec_of(example)
    values += [Value("x", spec, None, False), Value("target", spec, None, False)]
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        module = WithLoss(block) if last else block
        names = ("x" if index == 0 else f"h{index}", *(("target",) if last else ()))
        arguments = {"x": example, **({"target": example} if last else {})}
        trace = trace_module(module, arguments, differentiable=[index > 0, *([False] if last else [])])
        traces[trace.digest] = trace
        output = "loss" if last else f"h{index + 1}"
        fqns = tuple(f"{index}.{name}" for name, _ in block.named_parameters())
        segments.append(Segment(f"stage{index}", str(index), trace.digest, names, (output,), fqns))
        values.append(Value(output, TensorSpec((), "float32") if last else spec, f"stage{index}", True))
        parameters += [ParameterSpec(f"{index}.{name}", spec_of(item)) for name, item in block.named_parameters()]
    return OperatorGraph("chain", ("x", "target"), ("loss",), "loss", tuple(segments), tuple(values),
                         tuple(parameters), tuple(traces.values()))


def build_problem(graph: OperatorGraph, ranks: int, count: int) -> PlanningProblem:
    """One group for each block; equal durations, as the authors of torch's schedules assume."""
    return problem_of_groups(graph, [[segment.name] for segment in graph.segments],
                             Topology.uniform(ranks, latency_ns=1000), count,
                             lambda group: dict.fromkeys(Phase, 1_000_000))


def build_plan(problem: PlanningProblem, rank_of: list[int], orders: list[list[str]]) -> Plan:
    """Torch's order as a plan."""
    placement = Placement(tuple(Stage((i,), (rank,)) for i, rank in enumerate(rank_of)),
                          tuple((rank,) * problem.num_microbatches for rank in rank_of))
    schedule = Schedule(tuple(RankOrder(tuple(action for text in order for action in translated(text)))
                              for order in orders))
    return Plan("benchmark", problem, placement, schedule)


def translated(text: str) -> list[Action]:
    """An action of torch's as ours: stage 0 has no input gradient, which torch's orders leave open."""
    action = Action.parse(text)
    if action.partner is not None and action.partner[0] == 0:
        return [Action(action.stage, ActionKind.F, action.microbatch), Action(0, ActionKind.W, action.partner[1])]
    if action.stage == 0 and action.kind is ActionKind.B:
        return [Action(0, ActionKind.W, action.microbatch)]
    return [] if action.stage == 0 and action.kind is ActionKind.I else [action]
