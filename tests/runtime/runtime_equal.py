"""What the equality tests share: captured models, problems, plans, the run on a rank and the comparison."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import runtime_cases as cases
import runtime_models as models
import torch
from torch import nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.cluster import shipped_kinds
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.costs.roofline import roofline
from mipipe.graphs.models.loss import sum_over
from mipipe.graphs.models.tasks import TaskLoss
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes.adapters import AdapterConfig, adapt
from mipipe.graphs.topology import Topology
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.from_graph import build_problem
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions

ROWS, LENGTH = 2, 12


@dataclass(frozen=True)
class Case:
    """A captured model with what its reference needs."""

    module: nn.Module
    graph: OperatorGraph
    shift: bool
    loss_of: Any

    def batch(self, num_microbatches: int) -> dict[str, torch.Tensor]:
        dtype = next(self.module.parameters()).dtype
        if "pixel_values" in self.graph.inputs:
            return models.image_batch(ROWS * num_microbatches, dtype)
        vocab = 64 if self.shift else 11
        return models.token_batch(ROWS * num_microbatches, LENGTH, vocab)

    def state(self) -> dict[str, torch.Tensor]:
        found = {name: item.detach() for name, item in self.module.named_parameters(remove_duplicate=False)}
        found.update({name: item.detach() for name, item in self.module.named_buffers(remove_duplicate=False)})
        return found


@functools.cache
def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """With the loss of its task, or (``..-cut``) as the reference has it, with a row of logits cut off: ``moe``,
    ``deepseek`` (with experts, routed in float32), ``deepseek-dense``, ``llama`` (tied), ``llama-dora`` (adapters of a
    recipe), ``llama-frozen`` (tables and two layers), ``phi3`` (fused projections), ``vlm``, ``vlm-frozen`` (vision
    tower), ``vlm-lora`` (language model), ``skip``."""
    if name == "skip":
        module, shift, loss_of = models.skip_module(dtype), False, None
    elif name == "deepseek-dense":
        module, shift, loss_of = models.tiny_deepseek(dtype, 3), True, models.token_losses
    elif name in ("moe", "deepseek", "llama", "llama-cut", "llama-dora", "llama-frozen", "phi3"):
        module, shift, loss_of = getattr(models, f"tiny_{name.partition('-')[0]}")(dtype), True, models.token_losses
        if name == "llama-frozen":
            for part in (module.model.embed_tokens, *module.model.layers[:2]):
                part.requires_grad_(False)
        if name == "llama-dora":
            torch.manual_seed(13)
            adapt(module, AdapterConfig(("q_proj", "o_proj", "down_proj"), "dora", 4))
            with torch.no_grad():
                for key, item in module.named_parameters():
                    if item.requires_grad and "magnitude" not in key:
                        item.normal_(0.0, 0.1)
    else:
        module, shift, loss_of = models.tiny_vlm(dtype), True, models.token_losses
        if name == "vlm-frozen":
            module.model.vision_tower.requires_grad_(False)
        elif name == "vlm-lora":
            torch.manual_seed(13)
            models.add_lora(module.model.language_model, ("q_proj", "v_proj"))
            module.model.vision_tower.requires_grad_(False)
            module.model.multi_modal_projector.requires_grad_(False)
            module.lm_head.requires_grad_(False)
    batch = models.image_batch(ROWS, dtype) if name.startswith("vlm") else \
        models.token_batch(ROWS, LENGTH, 64 if shift else 11)
    loss = loss_of if loss_of is None or name.endswith("-cut") else TaskLoss("language", shift=True)
    graph = capture_module(module, batch, loss=loss, granularity="module" if name == "skip" else "block",
                           loss_info=sum_over("labels", shift=shift))
    return Case(module, graph, shift, loss_of)


def problem(graph: OperatorGraph, ranks: int, num_microbatches: int, num_groups: int = 8) -> PlanningProblem:
    """The problem of a captured model on equal devices: coarsened, costs from a roofline."""
    coarse = coarsen(graph, num_groups=num_groups)
    costs = roofline(coarse, graph, {"cpu": dataclasses.replace(shipped_kinds()["h100"], name="cpu")})
    return build_problem(coarse, costs, Topology.uniform(ranks, latency_ns=1000, bytes_per_s=10**10, kind="cpu"),
                         num_microbatches=num_microbatches)


def valid_labels(shift: bool, microbatches: Any) -> float:
    return float(sum(int((piece["labels"][:, int(shift):] != -100).sum()) for piece in microbatches))


def run_case(plans: list[Plan], graph: OperatorGraph, state: Any, batch: Any,
             options: EngineOptions | None = None) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """What a rank does: one step of each plan, from the same weights."""
    answers = []
    for plan in plans:
        engine = Engine(plan, graph, state, options=options)
        loss = engine.step(batch)
        gradients = {name: item.grad for name, item in engine.named_parameters() if item.grad is not None}
        answers.append((loss, gradients))
    return answers


def compare(pool: Any, made: Case, plans: list[Plan], tolerance: float = 1e-12,
            options: EngineOptions | None = None) -> None:
    """Run plans of one size on the pool; losses on all ranks and gradients on all holders equal the model's own.

    Every gradient that eager autograd makes must be there; a gradient that is zero may be absent.
    """
    count, ranks = plans[0].problem.num_microbatches, plans[0].problem.num_ranks
    batch = made.batch(count)
    answers = pool.run(ranks, __file__, "run_case", plans, made.graph, made.state(), batch, options, timeout=120.0)
    pieces = models.chunked(batch, count)
    loss, gradients = models.eager(made.module, pieces, valid_labels(made.shift, pieces), made.loss_of)
    for number, plan in enumerate(plans):
        found = set()
        for rank, (own, mine) in enumerate(answer[number] for answer in answers):
            where = f"{plan.name}, rank {rank}"
            assert abs(own - loss) <= tolerance * abs(loss), f"{where}: loss {own}, expected {loss}"
            for name, gradient in mine.items():
                wanted = gradients[name]
                difference, size = torch.linalg.vector_norm(gradient - wanted), torch.linalg.vector_norm(wanted)
                assert difference <= tolerance * size + 1e-30, f"{where}: {name} is off by {difference / size:.1e}"
                found.add(name)
        missing = {name for name, gradient in gradients.items() if gradient.any()} - found
        assert not missing, f"{plan.name}: no gradient for {sorted(missing)}"


__all__ = ["Case", "Plan", "case", "cases", "compare", "problem"]
