"""Step time of mipipe's engine against torch.distributed.pipelining: same stages, microbatches, order, processes.

    torchrun --nproc-per-node 2 benchmarks/runtime_vs_torch.py --work-ms 1 5 50 --repetitions 30

alternates both in one process group and prints, for each schedule and amount of work in a stage's forward, the median
step times, their ratio with a 95 % bootstrap interval, and the time for each action: without work (``--work-ms 0``)
that is overhead. The order is torch's own (``pipeline_order``, for 1F1B the published one), turned into a plan; ``CSV``
goes the other way: our plan, exported, loaded by torch's schedule runtime. One thread for each worker. ``plan-strict``
runs our program as planned; ``plan-ahead`` keeps sent tensors to the end of the step and posts receives two actions
ahead, which is what torch does with memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from chain_model import ROWS, WIDTH, Block, build_graph, build_plan, build_problem, squared_error
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from mipipe.planner.execution.export import torch_csv
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.solve import plan as solve
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions

SCHEDULES: dict[str, tuple[Any, int]] = {
    "1F1B": (Schedule1F1B, 1), "Interleaved1F1B": (ScheduleInterleaved1F1B, 2),
    "ZBVZeroBubble": (ScheduleZBVZeroBubble, 2), "DualPipeV": (ScheduleDualPipeV, 2),
    "CSV": (_PipelineScheduleRuntime, 2)}
"""Schedule and stages for each rank. CSV: our plan for a V, which torch's schedule runtime loads from a file."""
RUNTIMES = {"plan-strict": EngineOptions(share_loss=False),
            "plan-ahead": EngineOptions(share_loss=False, hold_sends=True, prepost=2)}
V_SHAPED = ("ZBVZeroBubble", "DualPipeV", "CSV")


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


def our_order(problem: PlanningProblem) -> Plan:
    """Our plan for a V of stages. Rank 0 plans; all get the same."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        result = solve(problem, PlanOptions(time_limit_s=5, placement="v", use_milp=False, threads=1))
        made = [result.plan or result.reason]
    dist.broadcast_object_list(made)
    if not isinstance(made[0], Plan):
        raise RuntimeError(f"no plan for a V on {problem.num_ranks} ranks: {made[0]}")
    return made[0]


class Pair:
    """Both runtimes on the same blocks, data and order."""

    def __init__(self, name: str, depth: int, count: int, runtimes: list[str]) -> None:
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
        problem = build_problem(graph, ranks, count)
        if name == "CSV":
            plan = our_order(problem)
            with tempfile.NamedTemporaryFile("w", suffix=".csv") as stream:
                stream.write(torch_csv(plan))
                stream.flush()
                self.schedule._load_csv(stream.name)
        else:
            plan = build_plan(problem, self.rank_of, torch_orders(name, self.schedule, ranks, count))
        self.engines = {key: Engine(plan, graph, state, options=RUNTIMES[key]) for key in runtimes}
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
        engine = next(iter(self.engines.values()))
        engine.step(self.batch)
        arguments = (self.batch["x"],) if self.first else ()
        options: dict[str, Any] = {"target": self.batch["target"], "losses": []} if self.last else {}
        self.schedule.step(*arguments, **options)
        worst = 0.0
        ours = dict(engine.named_parameters())
        for index, block in self.blocks.items():
            for name, parameter in block.named_parameters():
                mine, theirs = ours[f"{index}.{name}"].grad, parameter.grad
                worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
            block.zero_grad()
        engine.zero_grad()
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
    """Layers whose forward takes about that long on this machine, the same on all ranks; 1 for no work.

    Measured at their own number: weights of many layers do not stay in a cache.
    """
    depth = torch.tensor(8 if milliseconds else 1)
    for _ in range(2 if milliseconds else 0):
        block, x = Block(int(depth)), torch.randn(ROWS, WIDTH)
        with torch.no_grad():
            block(x)
            samples = []
            for _ in range(20):
                start = time.perf_counter()
                block(x)
                samples.append(time.perf_counter() - start)
        depth.fill_(max(1, round(int(depth) * milliseconds / 1e3 / statistics.median(samples))))
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


def measure(name: str, work_ms: float, count: int, repetitions: int, runtimes: list[str]) -> list[dict[str, Any]]:
    """Rows of one schedule and amount of work."""
    depth = depth_for(work_ms)
    pair = Pair(name, depth, count, runtimes)
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
                     "ratio": ours / theirs, "low": low, "high": high, "actions": pair.actions, "layers": depth,
                     "us_per_action": 1e3 * ours / pair.actions, "torch_us_per_action": 1e3 * theirs / pair.actions,
                     "gradient_difference": difference, "microbatches": count, "repetitions": repetitions})
    return rows


def write(path: Path, rows: list[dict[str, Any]], world: int) -> None:
    """Add rows to a JSON file, in place of those of the same schedule, work and runtime."""
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["schedule"], row["work_ms"], row["runtime"]

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = set(map(key, rows))
    data = {"world": world, "torch": torch.__version__, "rows": [row for row in old if key(row) not in fresh] + rows}
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    """Print one line for each row; with ``--output`` also write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-ms", type=float, nargs="+", default=[0, 1, 5, 50], help="forward of one stage")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--output", type=Path, help="JSON; rows of earlier runs stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # gradients through a hundred tanh layers vanish, and denormal numbers take 100x
    dist.init_process_group("gloo")
    for name in options.schedules:
        for work_ms in options.work_ms:
            rows = measure(name, work_ms, options.microbatches, options.repetitions, options.runtimes)
            if options.output and dist.get_rank() == 0:
                write(options.output, rows, dist.get_world_size())
            for row in rows:
                if dist.get_rank() == 0:
                    print(f"{row['schedule']:16} {row['work_ms']:4g} ms  {row['runtime']:11} {row['ms']:8.2f} ms, torch"
                          f" {row['torch_ms']:8.2f} ms, ratio {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}],"
                          f" per action {row['us_per_action']:7.0f} us against {row['torch_us_per_action']:7.0f} us,"
                          f" gradients differ by {row['gradient_difference']:.0e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
