"""Does a run under a planned expert map take the time the planner says? Experts that sleep for every token they get.

    python benchmarks/expert_run.py [--token-us 400] [--rounds 2]

Four gloo workers, copies of a plan of one rank, share the experts of a small Qwen3-MoE with skewed routing by
all-to-all. Every grouped product sleeps for its rows, so four workers fit on two cores. One run counts the routing
under equal blocks, plans a map from these loads, and then alternates between the maps, moving the experts each time;
the batch and the weights stay, so the routing does. Printed: the busiest rank's tokens (the planner's makespan), the
median step time, and both as a ratio to equal blocks. Losses must agree to the last bit. Exit code 1 where the planned
map is not faster than equal blocks, or its ratio is more than 10 % off the prediction.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.models.loss import sum_over
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.operators import kernels
from mipipe.graphs.operators.layers import NAME, exchange_experts, register
from mipipe.graphs.topology import Topology
from mipipe.planner.experts.balance.greedy import greedy_layer
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap, device_times
from mipipe.planner.experts.plan import ExpertOptions, plan_experts
from mipipe.planner.plan import Plan
from mipipe.planner.problems.from_graph import problem_of_groups
from mipipe.planner.schedules import BASELINES
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.exchange import Exchange, contiguous_map
from mipipe.runtime.experts.layers import expert_layers

RANKS, EXPERTS, LAYERS, TOP, ROWS, LENGTH, VOCAB, COUNT = 4, 16, 2, 2, 2, 64, 128, 2
REPLICAS = 4


def model_and_graph() -> tuple[dict[str, torch.Tensor], OperatorGraph]:
    """Weights and expert-parallel graph of a Qwen3-MoE whose routers prefer the first experts (a Zipf-like bias)."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    register()
    config = Qwen3MoeConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
                            num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                            num_experts=EXPERTS, num_experts_per_tok=TOP, max_position_embeddings=256, use_cache=False,
                            tie_word_embeddings=False)
    config._experts_implementation = NAME
    torch.manual_seed(5)
    module = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        module.model.embed_tokens.weight[:, 0] = 0.1
        for layer in module.model.layers:
            layer.mlp.gate.weight.mul_(10)
            layer.mlp.gate.weight[:, 0] = 0.9 * torch.arange(1, EXPERTS + 1) ** -0.8
    state = {name: item.detach() for name, item in module.named_parameters()} | dict(module.named_buffers())
    tokens = torch.randint(VOCAB, (ROWS, LENGTH))

    def loss(output: Any, inputs: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output["logits"][:, :-1].flatten(0, 1),
                                                 inputs["labels"][:, 1:].flatten(), reduction="sum")

    graph = capture_module(exchange_experts(module), {"input_ids": tokens, "labels": tokens.clone()}, loss=loss,
                           loss_info=sum_over("labels", shift=True))
    return state, graph


def plan_of(graph: OperatorGraph) -> Plan:
    """One rank does everything; durations do not matter."""
    problem = problem_of_groups(graph, [[item.name for item in graph.segments]], Topology.uniform(1), COUNT,
                                lambda group: dict.fromkeys(Phase, 1))
    return next(item for item in BASELINES if item.name == "GPipe").plan(problem)


def sleep_for_rows(token_us: float) -> None:
    """Make every product over experts take ``token_us`` for each row it gets, beside what it takes."""
    plain = Exchange.kernels

    def slow(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def product(*arguments: torch.Tensor) -> torch.Tensor:
            time.sleep(arguments[0].shape[0] * token_us * 1e-6)
            return function(*arguments)
        return product

    products = {"mipipe.grouped_mm.default": slow(kernels.grouped_mm),
                "mipipe.grouped_mm_weight.default": slow(kernels.grouped_mm_weight)}
    Exchange.kernels = lambda self: {name: {**found, **products} for name, found in plain(self).items()}  # type: ignore


def busiest(counts: torch.Tensor, expert_map: ExpertMap) -> float:
    """The planner's makespan in tokens: the busiest rank of every layer, summed."""
    return sum(float(device_times(row.numpy(), expert_map.devices(number), torch.ones(RANKS).numpy()).max())
               for number, row in enumerate(counts.double()))


def maps_for(counts: torch.Tensor, blocks: ExpertMap) -> dict[str, ExpertMap]:
    """Equal blocks, the greedy replicate-and-pack rule, and ours."""
    loads = ExpertLoads(tuple(tuple(row) for row in counts.double().tolist()))
    placed = plan_experts(loads, Topology.uniform(RANKS), ExpertOptions(replicas=REPLICAS, time_limit_s=10)).map
    greedy = tuple(tuple(greedy_layer(row.double().numpy(), EXPERTS + REPLICAS, RANKS).ravel().tolist())
                   for row in counts)
    return {"equal blocks": blocks, "greedy rule": ExpertMap(EXPERTS, RANKS, greedy), "mipipe": placed}


def worker(folder: Path, token_us: float, rounds: int) -> None:
    """Measure as one rank; rank 0 leaves its figures in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state, graph = pickle.loads((folder / "model.pkl").read_bytes())
    sleep_for_rows(token_us)
    engine = Engine(plan_of(graph), graph, state)
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(VOCAB, (ROWS * COUNT, LENGTH), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}

    def step() -> tuple[float, float]:
        dist.barrier()
        start = time.perf_counter()
        loss = engine.step(batch)
        dist.barrier()
        engine.zero_grad()
        return time.perf_counter() - start, float(loss or 0.0)

    _, loss = step()
    counts = torch.stack([engine.routing_counts()[number] for number in range(LAYERS)])
    dist.all_reduce(counts)
    found: list[Any] = [maps_for(counts, contiguous_map(expert_layers(graph), RANKS)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    maps: dict[str, ExpertMap] = found[0]
    times: dict[str, list[float]] = {name: [] for name in maps}
    moving: dict[str, list[float]] = {name: [] for name in maps}
    for _ in range(rounds):
        for name, expert_map in maps.items():
            moving[name].append(engine.place_experts(expert_map).seconds)
            for _ in range(2):
                took, again = step()
                times[name].append(took)
                assert again == loss, f"{name}: loss {again}, expected {loss}"
    if dist.get_rank() == 0:
        (folder / "result.pkl").write_bytes(pickle.dumps((counts, maps, times, moving, loss)))
    dist.destroy_process_group()


def report(folder: Path) -> bool:
    """Print the table; whether the planned map keeps its promise."""
    from rich.console import Console
    from rich.table import Table
    counts, maps, times, moving, loss = pickle.loads((folder / "result.pkl").read_bytes())
    mean = counts.double().sum().item() / RANKS
    table = Table(title=f"{LAYERS} layers x {EXPERTS} experts (+ {REPLICAS} replicas) on {RANKS} workers, loss"
                        f" {loss:.6f}")
    for column in ("map", "busiest rank (tokens)", "max/mean", "predicted ratio", "step (ms)", "measured ratio",
                   "measured/predicted", "moving (ms)"):
        table.add_column(column, justify="right")
    base_tokens, base_ms = busiest(counts, maps["equal blocks"]), statistics.median(times["equal blocks"])
    fine = True
    for name, expert_map in maps.items():
        tokens, seconds = busiest(counts, expert_map), statistics.median(times[name])
        predicted, measured = tokens / base_tokens, seconds / base_ms
        if name == "mipipe":
            fine = measured < 1 and abs(measured / predicted - 1) <= 0.1
        table.add_row(name, f"{tokens:.0f}", f"{tokens / mean:.3f}", f"{predicted:.3f}", f"{1e3 * seconds:.0f}",
                      f"{measured:.3f}", f"{measured / predicted:.3f}", f"{1e3 * statistics.median(moving[name]):.0f}")
    Console(width=140).print(table)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--token-us", type=float, default=400.0, help="microseconds slept for each row of a product")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        worker(arguments.folder, arguments.token_us, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.pkl").write_bytes(pickle.dumps(model_and_graph()))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
                   __file__, "--folder", name, "--token-us", str(arguments.token_us), "--rounds", str(arguments.rounds)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        fine = report(folder)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
