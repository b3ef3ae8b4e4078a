"""Expert parallelism by all-to-all: equal to one process under any map, before and after experts move."""

import functools
from dataclasses import replace

import pytest
import runtime_equal as equal
import runtime_experts as ex
import runtime_models as models
import torch

from mipipe.graphs.errors import InputError, PlanError, RunError
from mipipe.graphs.operator_graph import Role
from mipipe.graphs.tracing.compose import run_step
from mipipe.planner.experts.balance.maps import ExpertMap
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.exchange import SlotTable, contiguous_map
from mipipe.runtime.experts.layers import expert_layers, routed_layers
from mipipe.runtime.experts.moves import RowPlan, placement_moves, replica_moves
from mipipe.runtime.ranks.options import EngineOptions

pytestmark = pytest.mark.distributed

STEPS = 3
reference = functools.cache(ex.alone)


def test_captured_operators_equal_the_model_on_one_process():
    """The graph with its two all-to-alls, run alone: loss and gradients of the model's own eager experts."""
    module, graph = ex.captured()
    batch = models.token_batch(equal.ROWS, equal.LENGTH, ex.VOCAB)
    made = run_step(graph, ex.state_of(module), batch)
    loss, gradients = models.eager(ex.skewed_moe(), [batch], 1.0, models.token_losses)
    assert abs(float(made.outputs[graph.loss]) - loss) <= 1e-12 * abs(loss)
    for name, wanted in gradients.items():
        off = torch.linalg.vector_norm(made.gradients[name] - wanted)
        assert off <= 1e-12 * torch.linalg.vector_norm(wanted) + 1e-30, name
    roles = [segment.tags.role for segment in graph.segments if segment.tags.layer == 1]
    assert roles[1:5] == [Role.ROUTER, Role.DISPATCH, Role.EXPERTS, Role.COMBINE]
    assert len(graph.traces) == 8, "layers share their traces"


@pytest.mark.parametrize(("ranks", "planned"), [
    (2, False), *(pytest.param(ranks, True, marks=pytest.mark.slow) for ranks in (1, 2))])
def test_equal_to_one_process_under_every_map(pool, ranks, planned):
    """4 processes with skewed routing (experts without a token): equal blocks, uneven maps with replicas, and both in
    one run, moving between steps. Losses, norms and gradients; what the map is changes no bit of the losses."""
    module, graph = ex.captured()
    copies = 4 // ranks
    plan = ex.solved_plan(graph, ranks) if planned else ex.plan_for(graph, ranks)
    state, uneven = ex.state_of(module), ex.replicated_map(copies)
    blocks = contiguous_map(expert_layers(graph), copies)
    losses = []
    for maps in ([None], [uneven], [None, uneven, blocks]):
        answers = pool.run(4, ex.__file__, "run_steps", plan, graph, state, maps, STEPS)
        ex.check_equal(answers, reference(STEPS, copies))
        losses.append([answer["losses"] for answer in answers])
        assert all(len(answer["moved"]) == len(maps) - 1 for answer in answers)
        assert all(answer["aside"] == (planned and answer["exchanges"]) for answer in answers)
        assert any(answer["aside"] for answer in answers) == planned
    if planned:  # all-to-alls beside computing change no bit either
        plain = pool.run(4, ex.__file__, "run_steps", plan, graph, state, [None], STEPS, EngineOptions(overlap=False))
        assert [answer["losses"] for answer in plain] == losses[0]
    assert losses[0] == losses[1] == losses[2]
    counts = sum(counter for answer in answers for counter in answer["counts"].values())
    assert counts.sum() == ex.LAYERS * 2 * copies * ex.COUNT * equal.ROWS * equal.LENGTH
    assert (counts[6:] == 0).all() and counts.max() > 3 * counts.double().mean()
    moves = [move for answer in answers for move in answer["moved"]]
    assert sum(move.experts for move in moves) > 0 and sum(move.num_bytes for move in moves) > 0


def test_groups_of_copies_hold_the_same_experts(pool):
    """Four copies of a plan whose graph was captured for two: two groups of neighbours, which move to a map with
    replicas, each expert's gradients alike to the last bit wherever it is held."""
    module, graph = ex.captured()
    graph = replace(graph, source={**graph.source, "expert_parallel": 2})
    answers = pool.run(4, ex.__file__, "run_steps", ex.plan_for(graph, 1), graph, ex.state_of(module),
                       [None, ex.replicated_map(2)], STEPS)
    ex.check_equal(answers, reference(STEPS, 4))
    held = [{name for name in answer["gradients"] if "[" in name} for answer in answers]
    assert held[0] == held[2] != held[1] == held[3]


def test_a_rank_without_a_single_row(pool):
    """Rank 3 holds only the experts that nobody chooses: it computes on nothing, and its gradients are zero."""
    module, graph = ex.captured()
    idle = ExpertMap(ex.EXPERTS, 4, ((0, 1, 2, 3, 4, 5, 6, 7),) * ex.LAYERS)
    answers = pool.run(4, ex.__file__, "run_steps", ex.plan_for(graph, 1), graph, ex.state_of(module), [idle], 1)
    ex.check_equal(answers, reference(1, 4))
    name = "model.layers.0.mlp.experts.down_proj[6:7]"
    assert not answers[3]["gradients"][name][0].any()


@pytest.mark.slow
def test_float32(pool):
    """The same in float32, to 1e-5."""
    module, graph = ex.captured(dtype=torch.float32)
    answers = pool.run(4, ex.__file__, "run_steps", ex.plan_for(graph, 1), graph, ex.state_of(module),
                       [ex.replicated_map(4)], 1)
    ex.check_equal(answers, reference(1, 4, torch.float32), tolerance=1e-5)


def run_capped(plan, graph, state, factor):
    """A step with a cap on rows; the error's text, if any."""
    engine = Engine(plan, graph, state, options=EngineOptions(load_factor=factor, timeout_s=20))
    try:
        engine.step(ex.batch_of(0, engine.mesh.copy, engine.mesh.num_copies))
    except RunError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_more_rows_than_the_load_factor(pool):
    """Refused before the allocation, by name; a factor that suffices changes nothing."""
    module, graph = ex.captured()
    plan, state = ex.plan_for(graph, 1), ex.state_of(module)
    assert pool.run(2, __file__, "run_capped", plan, graph, state, 2.0) == [None, None]
    first, _ = pool.run(2, __file__, "run_capped", plan, graph, state, 1.2)
    assert "model.layers.0.mlp: 9" in first and "above the load factor of 1.2 times 48" in first


def test_rows_split_evenly_between_replicas():
    """Every source gives each replica its share, remainders start at another replica for each source."""
    table = SlotTable.build(ExpertMap(2, 3, ((0, 1, 0),)), 0, torch.device("cpu"))
    chosen = torch.tensor([0, 1, 0, 0, 1])
    assert table.choose(chosen, 0).tolist() == [0, 1, 2, 0, 1]
    assert table.choose(chosen, 1).tolist() == [2, 1, 0, 2, 1]


def test_moves_are_as_few_as_possible():
    """A rank that has an expert keeps it; replicas share the sending; sums go to the first slot."""
    before = torch.tensor([[0, 1], [0, 2]]).numpy()
    after = torch.tensor([[2, 0], [1, 0]]).numpy()
    moves = placement_moves(before, after)
    assert [(move.source, move.target) for move in moves] == [(1, 0), (0, 0), (0, 1), (1, 1)]
    sums = replica_moves(before)
    assert [(move.source, move.source_slot, move.target, move.target_slot) for move in sums] == [(1, 0, 0, 0)]
    plan = RowPlan.of(moves, 0, 2)
    assert plan.leaving() == [1, 1] and plan.arriving() == [1, 1]


def make_engine(plan, graph, state, **options):
    """The text of what an engine with these options raises."""
    try:
        Engine(plan, graph, state, options=EngineOptions(**options))
    except (InputError, PlanError) as error:
        return str(error)
    return None


def test_wrong_maps_and_plans_are_one_line(pool):
    """A map for another model or number of copies, experts that do not divide, layers torn apart, another graph."""
    module, graph = ex.captured()
    plan, state = ex.plan_for(graph, 1), ex.state_of(module)
    wrong = ExpertMap(ex.EXPERTS, 4, (tuple(range(8)),))
    message, _ = pool.run(2, __file__, "make_mapped", plan, graph, state, wrong)
    assert message == ("expert map: has 1 layers of 8 experts on 4 devices, but this run has 2 layers of 8 experts on 2"
                       " devices (those that share experts); make a map for this model and these devices (mipipe"
                       " experts)")
    with pytest.raises(InputError, match="8 experts do not divide over the 3 devices that share them; give a"):
        contiguous_map(expert_layers(graph), 3)
    dense = equal.cases.chain_graph()
    problem = equal.cases.problem_of(dense, 1, 1, [[segment.name for segment in dense.segments]])
    plain = next(item for item in ex.BASELINES if item.name == "GPipe").plan(problem)
    assert "has no expert-parallel layers; capture the model with --expert-parallel" in str(
        make_engine(plain, dense, equal.cases.chain_state(), expert_map=wrong))


def make_mapped(plan, graph, state, expert_map):
    """`make_engine` with a map (a task's arguments are positional)."""
    return make_engine(plan, graph, state, expert_map=expert_map)


def make_torn(plan, graph, state):
    """`make_engine` in a world of two copies."""
    return make_engine(plan, graph, state)


def test_layers_torn_apart_are_refused(pool):
    """Dispatch on one plan rank and experts on another: their transfer would have no fixed size."""
    module, graph = ex.captured()
    plan = ex.plan_for(graph, 2, cut=".experts")
    message, *_ = pool.run(4, __file__, "make_torn", plan, graph, ex.state_of(module))
    assert "model.layers.0.mlp.experts: on rank 1, but model.layers.0.mlp.dispatch is on rank 0" in message


@pytest.mark.slow
def test_routing_is_found_in_every_form():
    """The same layers and counts of experts from a whole graph and from an expert-parallel one."""
    graphs = [ex.captured(parallel)[1] for parallel in (True, False)]
    found = [[(layer.name, layer.num_experts, layer.expert_bytes, layer.token_bytes) for layer in routed_layers(graph)]
             for graph in graphs]
    assert found[0] == found[1] == [(f"model.layers.{i}.mlp", 8, 3 * 16 * 8 * 8, 128) for i in range(2)]
    assert not expert_layers(graphs[1])
