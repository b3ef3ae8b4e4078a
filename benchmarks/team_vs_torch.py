"""A tensor-parallel training step of one model: mipipe's members' programs against torch's parallelize_module.

    torchrun --nproc-per-node 2 benchmarks/team_vs_torch.py --width 512 --layers 4 --tokens 512 --repetitions 20

Both run the same Llama with the same weights and tokens in one process group (gloo, one thread for each member), taking
turns, and the gradients are compared first. Ours is the engine's own step of a plan with one rank, a team in `tensor`
mode. torch's plan is the one that transformers ships for this model (``base_model_tp_plan``; the head by columns, its
logits gathered, as ``_tp_plan`` says). Prints the median step times, their ratio, and the largest relative difference
of any gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from mipipe.graphs.capture.model import capture
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.topology import Topology
from mipipe.graphs.tracing.compose import parameter_tensors
from mipipe.planner.actions import Action
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problems.from_graph import problem_of_groups
from mipipe.planner.team import Team
from mipipe.runtime.engine.compiling.team import member_pieces
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.weights.pieces import Piece


def torch_model(config: LlamaConfig) -> nn.Module:
    """The model with transformers' plan applied by torch."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {f"model.{name}": styles[style]() for name, style in config.base_model_tp_plan.items() if style in styles}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    return model


def seconds(step: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("width", 512), ("layers", 4), ("tokens", 512), ("vocab", 4096), ("repetitions", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "vocab_size": options.vocab,
             "num_hidden_layers": options.layers, "num_attention_heads": 8, "num_key_value_heads": 4,
             "max_position_embeddings": options.tokens}
    config = LlamaConfig(**sizes, use_cache=False)
    torch.manual_seed(0)
    whole = LlamaForCausalLM(config)
    graph = capture("LlamaForCausalLM", seq=options.tokens, batch=1, overrides=sizes, verify=False)
    named = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    engine = Engine(one_team(graph, dist.get_world_size()), graph, parameter_tensors(graph, named),
                    options=EngineOptions(share_loss=False))
    theirs = torch_model(config)
    tokens = torch.randint(options.vocab, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens}

    def torch_step() -> None:
        theirs.zero_grad()
        theirs(**batch).loss.backward()

    def our_step() -> None:
        engine.zero_grad()
        engine.step(batch)

    torch_step()
    our_step()
    pieces = member_pieces(engine.compiled, graph, engine.mesh)
    worst = max(difference(pieces.get(name), engine.weights.parameters[name].grad, parameter.grad)
                for name, parameter in theirs.named_parameters())
    times: dict[str, list[float]] = {"mipipe": [], "torch": []}
    for _ in range(options.repetitions):
        times["torch"].append(seconds(torch_step))
        times["mipipe"].append(seconds(our_step))
    if dist.get_rank() == 0:
        medians = {name: statistics.median(found) for name, found in times.items()}
        print(f"{options.layers} layers of {options.width}, {options.tokens} tokens, {dist.get_world_size()} members:"
              f" mipipe {1e3 * medians['mipipe']:.1f} ms, torch {1e3 * medians['torch']:.1f} ms, ratio"
              f" {medians['mipipe'] / medians['torch']:.3f}; largest difference of a gradient {worst:.1e}")
    dist.destroy_process_group()


def one_team(graph: OperatorGraph, members: int) -> Plan:
    """A plan of one microbatch on one rank, a team in ``tensor`` mode."""
    problem = problem_of_groups(graph, [[segment.name for segment in graph.segments]], Topology.uniform(1), 1,
                                lambda group: dict.fromkeys(Phase, 1))
    order = RankOrder(tuple(map(Action.parse, ("0F0", "0B0"))))
    return Plan("one team", problem, Placement((Stage((0,), (0,)),), ((0,),)), Schedule((order,)),
                team=Team({"tensor": members}))


def difference(piece: Piece | None, mine: Tensor | None, other: Tensor | None) -> float:
    """The relative difference of this member's part of a gradient."""
    assert mine is not None and other is not None
    wanted = other.full_tensor() if isinstance(other, DTensor) else other
    part = wanted if piece is None else piece.cut(wanted)
    return float((mine - part).norm() / wanted.norm())


if __name__ == "__main__":
    main()
