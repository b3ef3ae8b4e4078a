"""What does it save to exchange rows beside computing? One plan with two streams, run with and without the overlap.

    python benchmarks/overlap.py [--token-us 50] [--repetitions 10]

Two gloo workers, copies of a plan of one rank, share the experts of a small Qwen3-MoE by all-to-all. Its routers send
the tokens of even microbatches to the first worker's experts and those of odd ones to the second's, so the busy worker
changes from microbatch to microbatch, as it does with real text. Experts sleep for every row, so two workers need no
core of their own. The plan has the all-to-alls on the collective stream. In the program's order on one thread
(``EngineOptions(overlap=False)``) whoever reaches an all-to-all first waits there for the other; on a stream of their
own the rank goes on with the next microbatch. Both alternate in one process group; losses must agree to the last bit.
Exit code 1 where the overlap saves nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from expert_run import EXPERTS, LENGTH, ROWS, VOCAB, model_and_graph, sleep_for_rows

from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.operator_graph import OperatorGraph, Role
from mipipe.graphs.topology import Topology
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problems.from_graph import build_problem
from mipipe.planner.solve import plan as solve
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions

COPIES, COUNT = 2, 4
UNITS = {Role.DISPATCH: 8, Role.COMBINE: 8, Role.EXPERTS: 10}
"""Planned duration of a phase by role; all else takes 1."""


def plan_of(graph: OperatorGraph) -> Plan:
    """What the planner makes of one rank with two streams."""
    coarse = coarsen(graph, granularity="operator")
    costs = CostTable(coarse.graph_digest, tuple(
        GroupCost(group.name, "device", {phase: 1_000_000 * UNITS.get(group.tags.role, 1) for phase in group.flops},
                  "given") for group in coarse.groups))
    problem = build_problem(coarse, costs, Topology.uniform(1), num_microbatches=COUNT)
    result = solve(problem, PlanOptions(time_limit_s=5, use_milp=False, threads=1))
    if result.plan is None:
        raise RuntimeError(f"no plan: {result.reason}")
    return result.plan


def turns(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under which the lower half of the vocabulary goes to the first experts, the upper to the last."""
    changed = {name: item.clone() for name, item in state.items()}
    changed["model.embed_tokens.weight"][VOCAB // 2:, 0] *= -1
    for name, item in changed.items():
        if name.endswith("mlp.gate.weight"):
            item[:, 0] = 0.9 * torch.linspace(1, -1, EXPERTS)
    return changed


def worker(folder: Path, token_us: float, repetitions: int) -> None:
    """Measure as one rank; rank 0 leaves its figures in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state, graph, plan = pickle.loads((folder / "model.pkl").read_bytes())
    sleep_for_rows(token_us)
    engines = {name: Engine(plan, graph, state, options=EngineOptions(overlap=name == "overlap"))
               for name in ("one thread", "overlap")}
    assert engines["overlap"].compiled.exchanges_aside
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(VOCAB // 2, (COUNT, ROWS, LENGTH), generator=generator)
    tokens[1::2] += VOCAB // 2
    batch = {"input_ids": tokens.flatten(0, 1), "labels": tokens.flatten(0, 1).clone()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    losses = set()
    for _ in range(repetitions + 1):
        for name, engine in engines.items():
            dist.barrier()
            start = time.perf_counter()
            losses.add(engine.step(batch))
            dist.barrier()
            times[name].append(1e3 * (time.perf_counter() - start))
            engine.zero_grad()
    assert len(losses) == 1, losses
    if dist.get_rank() == 0:
        medians = {name: statistics.median(found[1:]) for name, found in times.items()}
        ratios = sorted(b / a for a, b in zip(times["one thread"][1:], times["overlap"][1:], strict=True))
        result = {"token_us": token_us, "repetitions": repetitions, "one_thread_ms": medians["one thread"],
                  "overlap_ms": medians["overlap"], "ratio": medians["overlap"] / medians["one thread"],
                  "lowest": ratios[0], "highest": ratios[-1]}
        (folder / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    """Print the step times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token-us", type=float, default=50.0, help="microseconds slept for each row of a product")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    if "RANK" in os.environ:
        worker(options.folder, options.token_us, options.repetitions)
        return
    with tempfile.TemporaryDirectory() as name:
        state, graph = model_and_graph()
        (Path(name) / "model.pkl").write_bytes(pickle.dumps((turns(state), graph, plan_of(graph))))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(COPIES),
                   __file__, "--folder", name, "--token-us", str(options.token_us), "--repetitions",
                   str(options.repetitions)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        text = (Path(name) / "result.json").read_text()
    result = json.loads(text)
    print(f"one thread {result['one_thread_ms']:.0f} ms, overlap {result['overlap_ms']:.0f} ms a step: ratio"
          f" {result['ratio']:.3f} (single pairs {result['lowest']:.3f} to {result['highest']:.3f})")
    if options.output:
        options.output.write_text(text + "\n")
    sys.exit(0 if result["ratio"] < 1 else 1)


if __name__ == "__main__":
    main()
