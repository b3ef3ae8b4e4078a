"""What the expert-parallel tests share: a captured Qwen3-MoE with skewed routing, maps, runs on ranks and in one
process."""

from __future__ import annotations

import functools
from typing import Any

import runtime_cases as cases
import runtime_equal as equal
import runtime_models as models
import torch
from torch import nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.models.loss import sum_over
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.operators.layers import NAME, exchange_experts, register
from mipipe.planner.experts.balance.maps import ExpertMap
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan as solve
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.train.clip import gradient_norm

EXPERTS, LAYERS, VOCAB, COUNT = 8, 2, 64, 2


BALANCE = 0.3
"""The coefficient of the load-balancing loss where there is one."""


def balanced_losses(output: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of next-token losses over valid labels, and as often of the load-balancing loss over all tokens."""
    return models.token_losses(output, inputs) + BALANCE * output.aux_loss * (inputs["labels"][:, 1:] != -100).sum()


def skewed_moe(dtype: torch.dtype = torch.float64, balanced: bool = False) -> nn.Module:
    """transformers' Qwen3-MoE, 2 layers of 8 experts, 2 active. Embeddings have one large entry that the routers weigh:
    experts 0 and 1 are chosen most, 5 hardly ever, 6 and 7 never. ``balanced``: with its load-balancing loss."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    config = Qwen3MoeConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, moe_intermediate_size=8,
                            num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                            num_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=64, use_cache=False,
                            tie_word_embeddings=False, output_router_logits=balanced)
    torch.manual_seed(17)
    module = Qwen3MoeForCausalLM(config).to(dtype)
    with torch.no_grad():
        module.model.embed_tokens.weight[:, 0] = 0.1
        for layer in module.model.layers:
            layer.mlp.gate.weight.mul_(10)
            layer.mlp.gate.weight[:, 0] = torch.tensor([0.8, 0.6, 0.2, 0.0, 0.0, -0.3, -9.0, -9.0], dtype=dtype)
    return module


@functools.cache
def captured(parallel: bool = True, dtype: torch.dtype = torch.float64,
             balanced: bool = False) -> tuple[nn.Module, OperatorGraph]:
    """The model and its graph, for expert parallelism or whole."""
    register()
    module = skewed_moe(dtype, balanced)
    if parallel:
        for part in module.modules():
            if getattr(part, "config", None) is not None:
                part.config._experts_implementation = NAME
        exchange_experts(module)
    graph = capture_module(module, models.token_batch(equal.ROWS, equal.LENGTH, VOCAB),
                           loss=balanced_losses if balanced else models.token_losses,
                           loss_info=sum_over("labels", shift=True))
    return module, graph


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    state = {name: item.detach().clone() for name, item in module.named_parameters()}
    return state | {name: item.clone() for name, item in module.named_buffers()}


def plan_for(graph: OperatorGraph, ranks: int, cut: str = "") -> Plan:
    """1F1B over ``ranks`` (GPipe for one), each with a part of the layers; ``cut``: the second from this on."""
    layer = [segment.tags.layer for segment in graph.segments]
    place = [min(ranks - 1, (number if number is not None else (0 if index < 2 else LAYERS)) * ranks // LAYERS)
             for index, number in enumerate(layer)]
    if cut:
        first = next(index for index, segment in enumerate(graph.segments) if segment.name.endswith(cut))
        place = [int(index >= first) for index in range(len(graph.segments))]
    groups = [[segment.name for segment, where in zip(graph.segments, place, strict=True) if where == rank]
              for rank in range(ranks)]
    problem = cases.problem_of(graph, COUNT, ranks, groups)
    schedule = next(item for item in BASELINES if item.name == ("GPipe" if ranks == 1 else "1F1B"))
    return schedule.plan(problem, cut="balanced" if cut else "even")  # an even cut counts layers, one here


def solved_plan(graph: OperatorGraph, ranks: int) -> Plan:
    """What the planner chooses when all-to-alls have groups of their own, on the communication stream."""
    result = solve(equal.problem(graph, ranks, COUNT, 12), PlanOptions(time_limit_s=1, use_milp=False, threads=1))
    assert result.plan is not None, result.reason
    assert any(order.collective for order in result.plan.schedule.ranks)
    return result.plan


def replicated_map(copies: int) -> ExpertMap:
    """An uneven map: every copy has 3 slots (5 for two copies); busy experts have replicas, two of them on one copy."""
    if copies == 4:
        return ExpertMap(EXPERTS, 4, ((0, 6, 2, 0, 7, 3, 1, 1, 4, 1, 0, 5), (7, 6, 5, 4, 3, 2, 1, 0, 0, 1, 0, 3)))
    return ExpertMap(EXPERTS, 2, ((0, 1, 2, 6, 0, 0, 3, 4, 5, 7), (7, 6, 5, 4, 3, 2, 1, 0, 1, 0)))


def batch_of(step: int, copy: int, copies: int) -> dict[str, torch.Tensor]:
    """One copy's part of a step's batch; copies have different numbers of valid labels."""
    batch = models.token_batch(equal.ROWS * COUNT * copies, equal.LENGTH, VOCAB, seed=50 + step)
    return {name: tensor.chunk(copies)[copy] for name, tensor in batch.items()}


def run_steps(plan: Plan, graph: OperatorGraph, state: Any, maps: list[ExpertMap | None], steps: int,
              options: EngineOptions | None = None) -> dict[str, Any]:
    """What a rank does: Adam steps under ``maps[0]``, moving to the next map after each step. Everything a test needs.

    The last step leaves its gradients; they are returned by expert: ``name[3:4]`` -> list of what each slot holds.
    """
    engine = Engine(plan, graph, state, options=EngineOptions(expert_map=maps[0]) if options is None else options)
    copies = engine.mesh.num_copies
    optimizer = torch.optim.Adam(engine.parameters(), lr=1e-2, foreach=False)
    losses, moved, norms, counts = [], [], [], {}
    for step in range(steps):
        losses.append(engine.step(batch_of(step, engine.mesh.copy, copies)))
        norms.append(gradient_norm(engine))
        counts = {number: counter.clone() for number, counter in engine.routing_counts().items()}
        if step < steps - 1:
            optimizer.step()
            optimizer.zero_grad()
        if step + 1 < len(maps):
            moved.append(engine.place_experts(maps[step + 1], optimizer))
    gradients = {}
    exchange = engine.compiled.experts
    rows = {} if exchange is None else exchange.rows()
    for name, item in engine.named_parameters():
        for slot, expert in enumerate(rows.get(name, [])):
            gradients.setdefault(f"{name}[{expert}:{expert + 1}]", []).append(item.grad[slot])
        if name not in rows and item.grad is not None:
            gradients[name] = [item.grad]
    return {"losses": losses, "gradients": gradients, "norms": norms, "counts": counts, "moved": moved,
            "aside": engine.compiled.exchanges_aside,
            "exchanges": bool(plan.schedule.ranks[engine.mesh.rank].collective)}


def alone(steps: int, copies: int, dtype: torch.dtype = torch.float64, balanced: bool = False) -> dict[str, Any]:
    """The same in one process with the model's own forward, torch's autograd and Adam."""
    module = skewed_moe(dtype, balanced)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, foreach=False)
    losses, norms = [], []
    for step in range(steps):
        pieces = [piece for copy in range(copies) for piece in models.chunked(batch_of(step, copy, copies), COUNT)]
        loss, gradients = models.eager(module, pieces, equal.valid_labels(True, pieces),
                                       balanced_losses if balanced else models.token_losses)
        losses.append(loss)
        norms.append(float(sum(item.square().sum() for item in gradients.values())) ** 0.5)
        if step < steps - 1:
            optimizer.step()
    return {"losses": losses, "gradients": gradients, "norms": norms}


def check_equal(answers: list[dict[str, Any]], reference: dict[str, Any], tolerance: float = 1e-12) -> None:
    """Losses, norms and gradients of all ranks equal the reference; replicas of an expert agree to the last bit."""
    found: dict[str, torch.Tensor] = {}
    for rank, answer in enumerate(answers):
        for step, (own, loss) in enumerate(zip(answer["losses"], reference["losses"], strict=True)):
            assert abs(own - loss) <= tolerance * abs(loss), f"rank {rank}, step {step}: loss {own}, expected {loss}"
        for own, norm in zip(answer["norms"], reference["norms"], strict=True):
            assert abs(own - norm) <= 10 * tolerance * norm, f"rank {rank}: norm {own}, expected {norm}"
        for name, items in answer["gradients"].items():
            for item in items:
                assert torch.equal(found.setdefault(name, item), item), f"rank {rank}: {name} differs between holders"
    whole: dict[str, torch.Tensor] = {}
    for name, item in found.items():
        base, _, rest = name.partition("[")
        if rest:
            whole.setdefault(base, torch.full_like(reference["gradients"][base], float("nan")))
            whole[base][int(rest.split(":")[0])] = item
        else:
            whole[base] = item
    for name, wanted in reference["gradients"].items():
        difference, size = torch.linalg.vector_norm(whole[name] - wanted), torch.linalg.vector_norm(wanted)
        assert difference <= tolerance * size + 1e-30, f"{name}: off by {difference / size:.1e}"
