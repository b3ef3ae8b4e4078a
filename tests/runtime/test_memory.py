"""Memory as planned: what is saved between F and the gradients, and the peak of a step, against the simulation."""

import dataclasses

import pytest
import runtime_equal as equal

from mipipe.planner.lower import lower
from mipipe.planner.schedules import BASELINES
from mipipe.planner.simulate import simulate
from mipipe.planner.stages import view
from mipipe.runtime.engine import Engine, EngineOptions

COUNT = 3

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", ["skip", "moe", "vlm", "vlm-frozen"])
def test_saved_memory_is_as_planned(name):
    """After the k-th F, k times the planned saved bytes are held: exactly in a chain, less where tensors are shared.

    Batch tensors are not counted here: they are there anyway.
    """
    case = equal.case(name)
    problem = equal.problem(case.graph, 1, COUNT, 6)
    everything = list(range(len(problem.groups)))
    order = " ".join([*(f"0F{m}" for m in range(COUNT)), *(f"0I{m} 0W{m}" for m in range(COUNT))])
    made = equal.cases.plan_of(problem, [(everything, [0])], [[0] * COUNT], [order])
    engine = Engine(made, case.graph, case.state(), options=EngineOptions(track_memory=True))
    engine.step(case.batch(COUNT))
    planned = sum(group.saved_fi_bytes + group.saved_fw_bytes for group in problem.groups)
    sizes = [size for _, size in engine.memory][1::2]  # behind every action; before it the same within the action
    assert sizes[:COUNT] == [sizes[0] * (k + 1) for k in range(COUNT)]
    assert sizes[-1] == 0
    if name == "moe":
        assert sizes[0] == planned - case.batch(1)["input_ids"].nbytes
    else:
        assert 0.85 * planned < sizes[0] <= planned  # in skip, block and gate save the same hidden states


def peak_of(plan, graph, state, batch):
    """What a rank does: the most it holds during one step, weights and batch not counted."""
    engine = Engine(plan, graph, state, options=EngineOptions(track_memory=True))
    engine.step(batch)
    return max(size for _, size in engine.memory)


@pytest.mark.parametrize("name, ranks", [("moe", 2), ("vlm", 2)])
def test_the_peak_is_the_simulated_one(pool, name, ranks):
    """On every rank: never above it, and below it by no more than one action frees while it runs.

    The simulation holds what I frees to the end of I and what I makes from its start; the run frees one group after the
    other. Inputs of the model, which the simulation counts as saved, are the batch's memory.
    """
    case = equal.case(name)
    problem = equal.problem(case.graph, ranks, 4, 8)
    groups = tuple(dataclasses.replace(group, workspace_bytes=0) for group in problem.groups)
    problem = problem.replace(groups=groups)
    inputs = sum(tensor.nbytes for tensor in case.batch(4).values())
    for schedule in ("GPipe", "1F1B", "ZB-V", "DualPipe"):
        plan = next(item for item in BASELINES if item.name == schedule).plan(problem)
        stages, timeline = view(plan.problem, plan.placement), simulate(plan, lower(plan))
        measured = pool.run(ranks, __file__, "peak_of", plan, case.graph, case.state(), case.batch(4))
        edges = sum(edge.num_bytes[0] + (edge.grad_bytes[0] if edge.grad_bytes else 0) for edge in stages.edges)
        for rank in range(ranks):
            simulated = timeline.peak_bytes(rank) - stages.resident_bytes[rank]
            freed = max(min(stages.saved_fi[index][0], stages.saved_iw[index][0])
                        for index, stage in enumerate(plan.placement.stages) if rank in stage.ranks)
            assert simulated - freed - edges - inputs <= measured[rank] <= simulated, (schedule, rank)
