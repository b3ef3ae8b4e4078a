"""Worker side of the tests of teams, and the comparison of what members have with one process."""

from __future__ import annotations

from typing import Any

import runtime_equal as equal
import runtime_models as models
import torch

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.plan import Plan
from mipipe.runtime.engine.compiling.team import member_pieces
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.weights.pieces import Piece


def run_team(plans: list[Plan], graph: OperatorGraph, state: Any, batches: list[Any],
             options: EngineOptions | None = None) -> list[tuple[float, dict[str, tuple[torch.Tensor, Piece | None]]]]:
    """What a process does: one step of each plan, from the same weights, with the batch of its copy."""
    answers = []
    for plan in plans:
        engine = Engine(plan, graph, state, options=options)
        loss = engine.step(batches[engine.mesh.copy])
        pieces = member_pieces(engine.compiled, graph, engine.mesh)
        answers.append((loss, {name: (item.grad, pieces.get(name)) for name, item in engine.named_parameters()
                               if item.grad is not None}))
    return answers


def compare(pool: Any, made: equal.Case, plans: list[Plan], tolerance: float = 1e-12) -> None:
    """Run team plans of one size; losses and every piece of every gradient equal the model's own."""
    team, problem = plans[0].team, plans[0].problem
    assert team is not None
    count, copies = problem.num_microbatches, team.copies
    batch = made.batch(count * copies)
    batches = [{name: tensor.chunk(copies)[copy] for name, tensor in batch.items()} for copy in range(copies)]
    world = problem.num_ranks * team.members * copies
    answers = pool.run(world, __file__, "run_team", plans, made.graph, made.state(), batches, timeout=240.0)
    pieces = models.chunked(batch, count * copies)
    loss, gradients = models.eager(made.module, pieces, equal.valid_labels(made.shift, pieces), made.loss_of)
    least = 1e-3 * max(torch.linalg.vector_norm(gradient) for gradient in gradients.values())
    for number, plan in enumerate(plans):
        found: dict[str, int] = {}
        for process, (own, mine) in enumerate(answer[number] for answer in answers):
            where = f"{plan.name} {plan.team}, process {process}"
            assert abs(own - loss) <= tolerance * abs(loss), f"{where}: loss {own}, expected {loss}"
            for name, (gradient, piece) in mine.items():
                wanted = gradients[name] if piece is None else piece.cut(gradients[name])
                size = max(torch.linalg.vector_norm(gradients[name]), least)  # a key's bias has none but for rounding
                difference = torch.linalg.vector_norm(gradient - wanted)
                assert difference <= tolerance * size + 1e-30, f"{where}: {name} is off by {difference / size:.1e}"
                found[name] = found.get(name, 0) + gradient.numel()
        missing = {name for name, gradient in gradients.items() if gradient.any()
                   and found.get(name, 0) < gradient.numel() * copies}
        assert not missing, f"{plan.name}: no gradient for {sorted(missing)}"
