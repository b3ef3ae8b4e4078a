"""Random models as directed acyclic graphs, with random placements, routes and orders, and their autograd reference."""

from __future__ import annotations

import functools
import random

import runtime_cases as cases
import torch

from mipipe.graphs.operator_graph import OperatorGraph, ParameterSpec, Phase, Segment, SegmentTrace, TensorSpec, Value
from mipipe.graphs.tracing.partition import trace_segment
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage

ROWS, WIDTH = 2, 3
SPEC = TensorSpec((ROWS, WIDTH), "float64")
SQUARE = TensorSpec((WIDTH, WIDTH), "float64")


def linear(x, w):
    return (torch.tanh(x @ w),)


def join(x, y, w):
    return (torch.sin(x * y) @ w,)


def split(x, w):
    return x @ w, torch.cos(x)


def plain(x):
    return (x * torch.sigmoid(x),)


def loss(x, y, t):
    return (((x - t) * y).sum(),)


FUNCTIONS = {"linear": (linear, 1, 1), "join": (join, 2, 1), "split": (split, 1, 1), "plain": (plain, 1, 0),
             "loss": (loss, 3, 0)}
"""name -> (function, inputs, parameters)"""


@functools.cache
def trace_of(kind: str, differentiable: tuple[bool, ...], trainable: bool, wanted: tuple[bool, ...]) -> SegmentTrace:
    """The trace of one segment kind with these gradients asked for."""
    function, num_inputs, num_parameters = FUNCTIONS[kind]
    inputs = dict.fromkeys(("x", "y", "t")[:num_inputs], SPEC)
    return trace_segment(function, inputs, {"w": SQUARE} if num_parameters else {}, differentiable=differentiable,
                         trainable=[trainable] * num_parameters, wanted=wanted)


def random_graph(rng: random.Random, num_segments: int) -> OperatorGraph:
    """A random model: each segment reads earlier values, some parameters are frozen, some are tied."""
    values: list[tuple[str, str | None, bool]] = [("x", None, False), ("t", None, False)]
    drawn: list[tuple[str, str, tuple[str, ...], tuple[str, ...], str | None, bool]] = []
    parameters: list[tuple[str, bool, str | None]] = []
    for number in range(num_segments):
        kind = rng.choice(["linear", "linear", "join", "split", "plain"])
        _, num_inputs, num_parameters = FUNCTIONS[kind]
        pool = [name for name, _, _ in values if name != "t"]
        inputs = tuple(rng.choice(pool[-4:]) for _ in range(num_inputs))
        outputs = tuple(f"v{number}_{k}" for k in range(2 if kind == "split" else 1))
        fqn, trains = None, rng.random() < 0.7
        if num_parameters:
            fqn = f"p{number}"
            tied = rng.choice(parameters)[0] if parameters and rng.random() < 0.2 else None
            first = next((root or name for name, _, root in parameters if name == tied), None)
            if first is not None:
                trains = next(train for name, train, _ in parameters if name == first)
            parameters.append((fqn, trains, first))
        depends = any(grad for name, _, grad in values if name in inputs) or (fqn is not None and trains)
        passing = any(grad for name, _, grad in values if name in inputs)
        values += [(name, f"s{number}", depends if kind != "split" or k == 0 else passing)
                   for k, name in enumerate(outputs)]
        drawn.append((f"s{number}", kind, inputs, outputs, fqn, trains))
    unread = [name for name, source, _ in values if source and not any(name in item[2] for item in drawn)]
    ends = (unread + unread)[:2] if unread else ["x", "x"]
    drawn.append(("end", "loss", (ends[0], ends[-1], "t"), ("loss",), None, False))
    values.append(("loss", "end", any(grad for name, _, grad in values if name in ends)))
    return _bind(drawn, values, parameters)


def _bind(drawn, values, parameters) -> OperatorGraph:
    """Trace the segments, asking for exactly the gradients that something upstream needs."""
    needs = {name: grad for name, _, grad in values}
    wanted = {"loss"} if needs["loss"] else set()
    chosen: dict[str, SegmentTrace] = {}
    for name, kind, inputs, outputs, _, trains in reversed(drawn):
        asked = tuple(value in wanted for value in outputs)
        if any(asked):
            trace = trace_of(kind, tuple(needs[value] for value in inputs), trains, asked)
            wanted |= {value for value, grad in zip(inputs, trace.input_grads, strict=True) if grad is not None}
        else:
            trace = trace_of(kind, (False,) * len(inputs), False, asked)
        chosen[name] = trace
    segments = tuple(Segment(name, name, chosen[name].digest, inputs, outputs, (fqn,) if fqn else ())
                     for name, _, inputs, outputs, fqn, _ in drawn)
    scalar = TensorSpec((), "float64")
    made = tuple(Value(name, scalar if name == "loss" else SPEC, source, needs[name]) for name, source, _ in values)
    return OperatorGraph("random", ("x", "t"), ("loss",), "loss", segments, made,
                         tuple(ParameterSpec(name, SQUARE, trains, root) for name, trains, root in parameters),
                         tuple({trace.digest: trace for trace in chosen.values()}.values()))


def random_plan(rng: random.Random, graph: OperatorGraph, ranks: int, num_microbatches: int) -> Plan:
    """Consecutive segments as stages, on random ranks with replicas and routes, in a random order that can run."""
    names = [segment.name for segment in graph.segments]
    cuts = sorted(rng.sample(range(1, len(names)), k=rng.randint(0, min(5, len(names) - 1))))
    groups = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    problem = cases.problem_of(graph, num_microbatches, ranks, groups)
    stages, routes = [], []
    for index in range(len(groups)):
        members = sorted(rng.sample(range(ranks), k=rng.choice([1, 1, 1, min(2, ranks)])))
        stages.append(Stage((index,), tuple(members), rng.random() < 0.2))
        routes.append(tuple(rng.choice(members) for _ in range(num_microbatches)))
    return Plan("random", problem, Placement(tuple(stages), tuple(routes)),
                Schedule(random_order(rng, problem, stages, routes)))


def random_order(rng, problem, stages, routes) -> tuple[RankOrder, ...]:
    """A random sequence of all actions that respects precedence, dealt out to the ranks."""
    from mipipe.planner.actions import Action, ActionKind
    times = [next(iter(group.times.values())) for group in problem.groups]
    consumers = {s: {t for e in problem.edges if e.source == s for t in e.targets} for s in range(len(stages))}
    returns = {(e.source, t) for e in problem.edges if e.grad_bytes is not None for t in e.targets
               if times[t].i_ns is not None}
    todo: dict[Action, list[tuple[str, int, int]]] = {}
    for m in range(problem.num_microbatches):
        for s, stage in enumerate(stages):
            before = [("F", p, m) for p in consumers if s in consumers[p]]
            todo[Action(s, ActionKind.F, m)] = before
            has_i, has_w = times[s].i_ns is not None, times[s].w_ns is not None
            if not (has_i or has_w):
                continue
            gate = [("F", s, m)] + [("I", t, m) for t in consumers[s] if (s, t) in returns]
            if stage.recompute:
                todo[Action(s, ActionKind.RECOMPUTE, m)] = [("F", s, m)]
                gate.append(("RECOMPUTE", s, m))
            if has_i and has_w and rng.random() < 0.4:
                todo[Action(s, ActionKind.B, m)] = gate
                continue
            if has_i:
                todo[Action(s, ActionKind.I, m)] = gate
            if has_w:
                todo[Action(s, ActionKind.W, m)] = [("I", s, m)] if has_i else gate
    done: set[tuple[str, int, int]] = set()
    orders: list[list[Action]] = [[] for _ in range(problem.num_ranks)]
    while todo:
        ready = [action for action, before in todo.items() if all(item in done for item in before)]
        action = rng.choice(ready)
        del todo[action]
        done |= {(kind.value, stage, m) for kind, stage, m in action.parts()}
        orders[routes[action.stage][action.microbatch]].append(action)
    return tuple(RankOrder(tuple(order)) for order in orders)


def state_of(graph: OperatorGraph) -> dict[str, torch.Tensor]:
    """Random weights; tied names share one tensor."""
    generator = torch.Generator().manual_seed(5)
    state = {item.fqn: torch.randn(item.spec.shape, dtype=torch.float64, generator=generator)
             for item in graph.parameters}
    return {item.fqn: state[item.tied_to or item.fqn] for item in graph.parameters}


def batch_of(num_microbatches: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {name: torch.randn(ROWS * num_microbatches, WIDTH, dtype=torch.float64, generator=generator)
            for name in ("x", "t")}


def reference(graph: OperatorGraph, kinds: dict[str, str], num_microbatches: int):
    """Loss and gradients by torch's autograd on the segments' own functions."""
    state = state_of(graph)
    leaves = {item.fqn: state[item.fqn].clone().requires_grad_(item.trainable)
              for item in graph.parameters if item.tied_to is None}
    batch = batch_of(num_microbatches)
    total = torch.zeros((), dtype=torch.float64)
    tied = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    for m in range(num_microbatches):
        values = {name: tensor.chunk(num_microbatches)[m] for name, tensor in batch.items()}
        for segment in graph.segments:
            arguments = [values[name] for name in segment.inputs] + [leaves[tied[fqn]] for fqn in segment.parameters]
            values.update(zip(segment.outputs, FUNCTIONS[kinds[segment.name]][0](*arguments), strict=True))
        total = total + values["loss"]
    total = total / num_microbatches
    if total.requires_grad:
        total.backward()
    return total.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def kinds_of(graph: OperatorGraph) -> dict[str, str]:
    """The function of each segment, recognised by its number of inputs, outputs and parameters."""
    found = {}
    for segment in graph.segments:
        key = (len(segment.inputs), len(segment.outputs), len(segment.parameters))
        found[segment.name] = {(1, 1, 1): "linear", (2, 1, 1): "join", (1, 2, 1): "split", (1, 1, 0): "plain",
                               (3, 1, 0): "loss"}[key]
    return found


def run_random(plan: Plan, graph: OperatorGraph):
    """What a rank does."""
    return cases.run_plan(plan, graph, state_of(graph), [batch_of(plan.problem.num_microbatches)])


__all__ = ["Phase", "batch_of", "kinds_of", "random_graph", "random_plan", "reference", "run_random", "state_of"]
