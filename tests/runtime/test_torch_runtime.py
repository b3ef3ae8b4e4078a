"""The same plan in torch's own schedule runtime, by way of the exported CSV: equal losses and gradients."""

import functools

import pytest
import runtime_cases as cases
import runtime_models as models
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from mipipe.graphs.capture.model import capture_module
from mipipe.planner.execution.export import torch_csv
from mipipe.planner.options import PlanOptions
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan as solve
from mipipe.runtime.engine.engine import Engine

pytestmark = pytest.mark.distributed

ROWS, WIDTH, COUNT, BLOCKS = 2, 6, 6, 4


class Chain(nn.Module):
    """Blocks one after another, and a squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(models.Block(WIDTH, 0.0) for _ in range(BLOCKS))

    def forward(self, x, target):
        for layer in self.layers:
            x = layer(x)
        return {"loss": squared_error(x, target)}


def squared_error(output, target):
    return (output - target).square().sum()


def chain():
    torch.manual_seed(5)
    return Chain().double()


@functools.cache
def graph_and_problem():
    """The captured chain, and a problem with one group for each block; the loss is in the last one."""
    x = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    graph = capture_module(chain(), {"x": x, "target": x.clone()}, granularity="module")
    groups = [[item.name for item in graph.segments if item.name.startswith(f"layers.{index}")]
              for index in range(BLOCKS)]
    named = {name for members in groups for name in members}
    groups[-1] += [item.name for item in graph.segments if item.name not in named]
    return graph, cases.problem_of(graph, COUNT, 2, groups)


def run_both(plan, graph, text, folder):
    """What a rank does: a step of the engine, then one of torch's runtime with the CSV; the differences it finds."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(6)
    batch = {name: torch.randn(ROWS * COUNT, WIDTH, dtype=torch.float64, generator=generator)
             for name in ("x", "target")}
    engine = Engine(plan, graph, chain().state_dict())
    loss = engine.step(batch)
    path = f"{folder}/order{rank}.csv"
    with open(path, "w") as stream:
        stream.write(text)
    modules = [nn.Sequential(*(chain().layers[index] for index in stage.groups)) for stage in plan.placement.stages]
    mine = {index: modules[index] for index, stage in enumerate(plan.placement.stages) if stage.ranks == (rank,)}
    example = batch["x"][:ROWS]
    stages = [PipelineStage(module, index, len(modules), torch.device("cpu"),
                            input_args=(example.clone().requires_grad_(index > 0),),
                            output_args=(example.clone().requires_grad_(),)) for index, module in mine.items()]
    runtime = _PipelineScheduleRuntime(stages, COUNT, loss_fn=squared_error, scale_grads=False)
    runtime._load_csv(path)
    arguments = (batch["x"],) if 0 in mine else ()
    losses = []
    runtime.step(*arguments, **({"target": batch["target"], "losses": losses} if len(modules) - 1 in mine else {}))
    ours = dict(engine.named_parameters())
    compared = 0
    for index, module in mine.items():
        for place, group in enumerate(plan.placement.stages[index].groups):
            for name, parameter in module[place].named_parameters():
                gradient = ours[f"layers.{group}.{name}"].grad * COUNT  # torch's sum, our mean over microbatches
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)
                compared += 1
    return compared, loss, float(sum(losses)) / COUNT if losses else None


def made_plans():
    """Published schedules with whole and split backwards, and what the planner makes of a V."""
    _, problem = graph_and_problem()
    for name in ("1F1B", "ZB-V"):
        yield next(item for item in BASELINES if item.name == name).plan(problem)
    result = solve(problem, PlanOptions(time_limit_s=1, placement="v", use_milp=False, threads=1))
    assert result.plan is not None
    yield result.plan


def test_the_exported_order_runs_in_torchs_runtime(pool, tmp_path):
    """`_PipelineScheduleRuntime` loads the CSV and comes to the engine's loss and gradients."""
    graph, _ = graph_and_problem()
    for plan in made_plans():
        answers = pool.run(2, __file__, "run_both", plan, graph, torch_csv(plan), str(tmp_path))
        assert sum(compared for compared, _, _ in answers) == len(list(chain().parameters()))
        (theirs,) = [their for _, _, their in answers if their is not None]
        assert [loss for _, loss, _ in answers] == pytest.approx([theirs] * 2, rel=1e-12)
