"""Step time of mipipe's engine against torch.distributed.pipelining: same stages, microbatches, order, processes.

    torchrun --nproc-per-node 2 benchmarks/runtime_vs_torch.py --work-ms 1 5 50 --repetitions 30

alternates both in one process group and prints, for each schedule and amount of work in a stage's forward, the median
step times, their ratio with a 95 % bootstrap interval, and the overhead for each action (step time of stages without
work, divided by the rank's actions). The order is torch's own (``pipeline_order``, for 1F1B the published one), turned
into a plan. One thread for each worker. ``plan-strict`` runs our program as planned; ``plan-ahead`` keeps sent tensors
to the end of the step and posts receives two actions ahead, which is what torch does with memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from mipipe.graphs.operator_graph import OperatorGraph, Parameter, Segment, TensorSpec, Value
from mipipe.graphs.partition import trace_module
from mipipe.graphs.serialize import digest
from mipipe.graphs.topology import Topology
from mipipe.graphs.trace import spec_of
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.runtime.engine import Engine, EngineOptions

ROWS, WIDTH = 32, 256
SCHEDULES: dict[str, tuple[Any, int]] = {
    "1F1B": (Schedule1F1B, 1), "Interleaved1F1B": (ScheduleInterleaved1F1B, 2),
    "ZBVZeroBubble": (ScheduleZBVZeroBubble, 2), "DualPipeV": (ScheduleDualPipeV, 2)}
"""Schedule and stages for each rank."""
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


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
        parameters += [Parameter(f"{index}.{name}", spec_of(item)) for name, item in block.named_parameters()]
    return OperatorGraph("chain", ("x", "target"), ("loss",), "loss", tuple(segments), tuple(values),
                         tuple(parameters), tuple(traces.values()))


def build_plan(graph: OperatorGraph, rank_of: list[int], orders: list[list[str]], count: int) -> Plan:
    """torch's order as a plan; equal durations, as its authors assume."""
    ranks = max(rank_of) + 1
    groups = []
    for index, segment in enumerate(graph.segments):
        times = PhaseTimes(1_000_000, None if index == 0 else 1_000_000, 1_000_000)
        groups.append(Group(segment.name, {"device": times}, segments=(segment.name,)))
    size = ROWS * WIDTH * 4
    edges = tuple(GroupEdge(i, (i + 1,), size, size, f"h{i + 1}") for i in range(len(groups) - 1))
    problem = PlanningProblem("benchmark", tuple(groups), edges, Topology.uniform(ranks, latency_ns=1000), count,
                              graph_digest=digest(graph))
    placement = Placement(tuple(Stage((i,), (rank,)) for i, rank in enumerate(rank_of)),
                          tuple((rank,) * count for rank in rank_of))
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


def torch_orders(name: str, schedule: Any, ranks: int, count: int) -> list[list[str]]:
    """The compute actions of torch's schedule, rank by rank."""
    if name == "1F1B":
        orders = []
        for rank in range(ranks):
            warm = min(count, ranks - rank)
            order = [f"{rank}F{m}" for m in range(warm)]
            for m in range(count):
                order.append(f"{rank}B{m}")
                if warm + m < count:
                    order.append(f"{rank}F{warm + m}")
            orders.append(order)
        return orders
    return [[str(action) for action in schedule.pipeline_order[rank] if action is not None] for rank in range(ranks)]


class Pair:
    """Both runtimes on the same blocks, data and order."""

    def __init__(self, name: str, depth: int, count: int) -> None:
        kind, per_rank = SCHEDULES[name]
        ranks, rank = dist.get_world_size(), dist.get_rank()
        number = ranks * per_rank
        self.rank_of = [index % ranks if name not in V_SHAPED or index < ranks else 2 * ranks - 1 - index
                        for index in range(number)]
        torch.manual_seed(0)
        blocks = [Block(depth) for _ in range(number)]
        graph = build_graph(blocks)
        state = {f"{index}.{key}": item for index, block in enumerate(blocks)
                 for key, item in block.state_dict().items()}
        self.batch = {"x": torch.randn(ROWS * count, WIDTH), "target": torch.randn(ROWS * count, WIDTH)}
        example = torch.zeros(ROWS, WIDTH)
        self.blocks = {index: blocks[index] for index in range(number) if self.rank_of[index] == rank}
        stages = [PipelineStage(block, index, number, torch.device("cpu"),
                                input_args=(example.clone().requires_grad_(index > 0),),
                                output_args=(example.clone().requires_grad_(),))
                  for index, block in self.blocks.items()]
        self.schedule = kind(stages[0] if per_rank == 1 else stages, count, loss_fn=squared_error, scale_grads=True)
        self.first, self.last = 0 in self.blocks, number - 1 in self.blocks
        plan = build_plan(graph, self.rank_of, torch_orders(name, self.schedule, ranks, count), count)
        self.engines = {
            "plan-strict": Engine(plan, graph, state, options=EngineOptions(share_loss=False)),
            "plan-ahead": Engine(plan, graph, state,
                                 options=EngineOptions(share_loss=False, hold_sends=True, prepost=2))}
        self.actions = len(plan.schedule.ranks[rank].compute)

    def torch_step(self) -> None:
        arguments = (self.batch["x"],) if self.first else ()
        options: dict[str, Any] = {"target": self.batch["target"], "losses": []} if self.last else {}
        self.schedule.step(*arguments, **options)
        for block in self.blocks.values():
            block.zero_grad()

    def our_step(self, name: str) -> None:
        self.engines[name].step(self.batch)
        self.engines[name].zero_grad()

    def check(self) -> float:
        """The largest relative difference of a gradient between the two runtimes."""
        self.engines["plan-strict"].step(self.batch)
        arguments = (self.batch["x"],) if self.first else ()
        options: dict[str, Any] = {"target": self.batch["target"], "losses": []} if self.last else {}
        self.schedule.step(*arguments, **options)
        worst = 0.0
        ours = dict(self.engines["plan-strict"].named_parameters())
        for index, block in self.blocks.items():
            for name, parameter in block.named_parameters():
                mine, theirs = ours[f"{index}.{name}"].grad, parameter.grad
                worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
            block.zero_grad()
        self.engines["plan-strict"].zero_grad()
        return worst


def timed(step: Callable[[], None]) -> float:
    """Milliseconds from a common start until the slowest rank is done."""
    dist.barrier()
    start = time.perf_counter()
    step()
    taken = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken) * 1e3


def depth_for(milliseconds: float) -> int:
    """Layers whose forward takes about that long on this machine; 1 for no work."""
    if not milliseconds:
        return 1
    block, x = Block(8), torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        block(x)
        samples = []
        for _ in range(20):
            start = time.perf_counter()
            block(x)
            samples.append(time.perf_counter() - start)
    depth = torch.tensor(max(1, round(8 * milliseconds / 1e3 / statistics.median(samples))))
    dist.broadcast(depth, 0)
    return int(depth)


def interval(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the ratio of medians."""
    rng = random.Random(0)
    pairs = list(zip(ours, theirs, strict=True))
    ratios = []
    for _ in range(1000):
        drawn = rng.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn))
    ratios.sort()
    return ratios[24], ratios[974]


def measure(name: str, work_ms: float, count: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of one schedule and amount of work."""
    pair = Pair(name, depth_for(work_ms), count)
    steps: dict[str, Callable[[], None]] = {"torch": pair.torch_step}
    steps |= {key: (lambda key=key: pair.our_step(key)) for key in pair.engines}
    difference = pair.check()
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(repetitions):
        for key, step in steps.items():
            times[key].append(timed(step))
    rows = []
    for key in pair.engines:
        low, high = interval(times[key], times["torch"])
        ours, theirs = statistics.median(times[key]), statistics.median(times["torch"])
        rows.append({"schedule": name, "work_ms": work_ms, "runtime": key, "ms": ours, "torch_ms": theirs,
                     "ratio": ours / theirs, "low": low, "high": high, "actions": pair.actions,
                     "us_per_action": 1e3 * ours / pair.actions, "torch_us_per_action": 1e3 * theirs / pair.actions,
                     "gradient_difference": difference})
    return rows


def main() -> None:
    """Print one line for each row; with ``--output`` also write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-ms", type=float, nargs="+", default=[0, 1, 5, 50], help="forward of one stage")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for name in options.schedules:
        for work_ms in options.work_ms:
            for row in measure(name, work_ms, options.microbatches, options.repetitions):
                rows.append(row)
                if dist.get_rank() == 0:
                    print(f"{row['schedule']:16} {row['work_ms']:4g} ms  {row['runtime']:11} {row['ms']:8.2f} ms, torch"
                          f" {row['torch_ms']:8.2f} ms, ratio {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}],"
                          f" per action {row['us_per_action']:7.0f} us against {row['torch_us_per_action']:7.0f} us,"
                          f" gradients differ by {row['gradient_difference']:.0e}", flush=True)
    if options.output and dist.get_rank() == 0:
        options.output.write_text(json.dumps({"world": dist.get_world_size(), "rows": rows}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
