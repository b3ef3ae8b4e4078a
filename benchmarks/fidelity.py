"""Does a run take the time its simulation says? Stages that sleep for their planned duration, executed by the engine.

    torchrun --nproc-per-node 8 benchmarks/fidelity.py --microbatches 20 --unit-ms 10 2

Sleeping stages need no core, so eight ranks fit on two. Each schedule's program runs with real transfers (a few hundred
bytes over gloo); printed are the simulated makespan, the median measured one (the ranks' aligned clocks, first start to
last end), their ratio, and the ratio after calibration by one run. Forward and input gradient of a layer take one unit
each, the weight gradient half.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mipipe.runtime.engine.compiling.phases as phases
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.operator_graph import (
    Operator,
    OperatorGraph,
    ParameterSpec,
    Phase,
    SavedTensor,
    Segment,
    SegmentTrace,
    TensorSpec,
    Value,
)
from mipipe.graphs.serialize import load, save
from mipipe.graphs.topology import Topology
from mipipe.graphs.tracing.trace import build_phase
from mipipe.planner.calibrate import calibrate
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.from_graph import problem_of_groups
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan as solve
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.train.trace import measured_timeline

ROWS, WIDTH = 4, 4
SPEC, SQUARE = TensorSpec((ROWS, WIDTH), "float32"), TensorSpec((WIDTH, WIDTH), "float32")
SCALAR = TensorSpec((), "float32")
STEP_NS = 20_000
"""Largest change of the learnt delay: one disturbed sleep must not spoil the next ones."""


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


def layer_trace(first: bool, last: bool) -> SegmentTrace:
    """y = x w (and loss = sum(y) in the last layer), with gradients by hand; the first layer returns none."""
    operators = [Operator("y", "aten.mm.default", Phase.F, [ref("x"), ref("w")], {}, (SPEC,))]
    grad, backward = "gy", Phase.W if first else Phase.I
    if last:
        grad = "ge"
        operators += [Operator("loss", "aten.sum.default", Phase.F, [ref("y")], {}, (SCALAR,)),
                      Operator("ge", "aten.expand.default", backward, [ref("gy"), [ROWS, WIDTH]], {}, (SPEC,))]
    if not first:
        operators += [Operator("wt", "aten.t.default", Phase.I, [ref("w")], {}, (SQUARE,)),
                      Operator("gx", "aten.mm.default", Phase.I, [ref(grad), ref("wt")], {}, (SPEC,))]
    operators += [Operator("xt", "aten.t.default", Phase.W, [ref("x")], {}, (SPEC,)),
                  Operator("gw", "aten.mm.default", Phase.W, [ref("xt"), ref(grad)], {}, (SQUARE,))]
    saved = (SavedTensor("ge", SPEC.num_bytes, Phase.I, Phase.W),) if last else ()
    name = "first" if first else "last" if last else "middle"
    return SegmentTrace(name, ("x",), ("w",), (), ("gy",), {"x": SPEC, "w": SQUARE, "gy": SCALAR if last else SPEC},
                        tuple(operators), ("loss",) if last else ("y",), {}, (None if first else "gx",), ("gw",), saved)


def build_problem(layers: int, ranks: int, count: int, unit_ns: int) -> tuple[OperatorGraph, PlanningProblem]:
    """A chain of equal layers as a graph and as a problem; what the first layer lacks in I it has in W."""
    traces = (layer_trace(True, False), layer_trace(False, False), layer_trace(False, True))
    segments, values = [], [Value("x", SPEC, None, False)]
    for index in range(layers):
        last = index == layers - 1
        output = "loss" if last else f"h{index + 1}"
        trace = traces[0 if index == 0 else 2 if last else 1]
        segments.append(Segment(f"layer{index}", f"layers.{index}", trace.digest, (f"h{index}" if index else "x",),
                                (output,), (f"layers.{index}.w",)))
        values.append(Value(output, SCALAR if last else SPEC, f"layer{index}", True))
    graph = OperatorGraph("sleep", ("x",), ("loss",), "loss", tuple(segments), tuple(values),
                          tuple(ParameterSpec(f"layers.{index}.w", SQUARE) for index in range(layers)), traces)
    times = {Phase.F: unit_ns, Phase.I: unit_ns, Phase.W: unit_ns // 2}
    first = {**times, Phase.W: unit_ns // 2 + unit_ns}
    return graph, problem_of_groups(graph, [[item.name] for item in segments],
                                    Topology.uniform(ranks, latency_ns=200_000), count,
                                    lambda group: first if group.segments == ("layer0",) else times)


def sleeping(unit_ns: int) -> Callable[..., Any]:
    """A stand-in for `build_phase` whose functions take the phase's planned duration, asleep.

    A sleep ends late by what waking up takes (0.1 ms here), a function of work would not: the usual delay is learnt and
    slept less. Nothing spins until the exact end: eight ranks share two cores, and who spins keeps another waiting.
    """
    def build(trace: SegmentTrace, phase: Phase, device: Any = "cpu", given: Any = None, handing: bool = False) -> Any:
        function = build_phase(trace, phase, device, handing=handing)
        duration = {Phase.F: unit_ns, Phase.I: unit_ns,
                    Phase.W: unit_ns // 2 + (unit_ns if trace.digest == "first" else 0)}[phase]

        late = 0

        def slow(*arguments: Any) -> Any:
            nonlocal late
            end = time.perf_counter_ns() + duration
            result = function(*arguments)
            time.sleep(max(0, end - late - time.perf_counter_ns()) / 1e9)
            late += max(-STEP_NS, min(STEP_NS, (time.perf_counter_ns() - end) // 8))
            return result

        return slow

    return build


def wake_in_time() -> None:
    """Ask the kernel (Linux) to end sleeps when they are over, not up to 50 us later to save power."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK, in nanoseconds


def our_plan(problem: PlanningProblem, seconds: float, path: Path | None) -> Plan:
    """What the planner makes of the problem; the order in a file, where there is one, made before for another unit."""
    if path is not None and path.exists():
        made = load(path, Plan)
        return Plan(made.name, problem, made.placement, made.schedule)
    result = solve(problem, PlanOptions(time_limit_s=seconds, threads=2))
    if result.plan is None:
        raise RuntimeError(f"no plan: {result.reason}")
    if path is not None:
        save(result.plan, path)
    return result.plan


def plans(problem: PlanningProblem, names: list[str], seconds: float, path: Path | None) -> list[Plan]:
    """The named baselines and our plan. Rank 0 solves; all get the same."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        made = [[item.plan(problem) for item in BASELINES if item.name in names] + [our_plan(problem, seconds, path)]]
    dist.broadcast_object_list(made)
    return made[0]


def figures(plan: Plan, timelines: list[Any]) -> dict[str, float]:
    """Simulated and measured makespan. The first run is a warm-up, the second calibrates what the others are to show:
    ``calibrated`` is the ratio to the simulation with what that one run said about actions and the time between them.
    """
    kinds = {device.kind for device in plan.problem.topology.devices}
    costs = CostTable(plan.problem.graph_digest, tuple(
        GroupCost(group.name, kind, {phase: time for phase, time in zip(
            Phase, (group.times[kind].f_ns, group.times[kind].i_ns, group.times[kind].w_ns), strict=True)
            if time is not None}, "given") for group in plan.problem.groups for kind in kinds))
    _, drift = calibrate(plan, timelines[1], costs)
    simulated = simulate(plan, lower(plan)).makespan_ns
    found = statistics.median(timeline.makespan_ns for timeline in timelines[2:])
    return {"simulated_ms": simulated / 1e6, "measured_ms": found / 1e6, "ratio": found / simulated,
            "launch_us": drift.launch_ns / 1e3, "calibrated": found / drift.recalibrated_ns}


def main() -> None:
    """Print one line for each schedule and unit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=20)
    parser.add_argument("--unit-ms", type=float, nargs="+", default=[10, 2])
    parser.add_argument("--schedules", nargs="+", default=["1F1B", "ZB-V", "DualPipe"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=20, help="seconds for our plan")
    parser.add_argument("--plan", type=Path, help="our plan: read from here, or, where there is none, made and kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wake_in_time()
    dist.init_process_group("gloo")
    rows = []
    for unit_ms in options.unit_ms:
        unit_ns = int(unit_ms * 1e6)
        phases.build_phase = sleeping(unit_ns)
        ranks = dist.get_world_size()
        graph, problem = build_problem(2 * ranks, ranks, options.microbatches, unit_ns)
        state = {item.fqn: torch.eye(WIDTH) for item in graph.parameters}
        for plan in plans(problem, options.schedules, options.time_limit, options.plan):
            engine = Engine(plan, graph, state, options=EngineOptions(share_loss=False))
            timelines = []
            for _ in range(options.repetitions + 2):
                dist.barrier()
                engine.step({"x": torch.ones(ROWS * options.microbatches, WIDTH)})
                timelines.append(measured_timeline(engine))
            if dist.get_rank() == 0:
                row = {"schedule": plan.name, "unit_ms": unit_ms, **figures(plan, timelines)}
                rows.append(row)
                print(f"{plan.name:24} unit {unit_ms:4g} ms: simulated {row['simulated_ms']:9.1f} ms, measured"
                      f" {row['measured_ms']:9.1f} ms, ratio {row['ratio']:.3f}, calibrated {row['calibrated']:.3f}",
                      flush=True)
                if options.output:
                    options.output.write_text(json.dumps({"ranks": ranks, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
