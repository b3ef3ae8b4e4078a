"""Routing counted in training, written as loads, planned into a map, and the map followed in the next run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import runtime_equal as equal
import runtime_experts as ex
import runtime_models as models
import torch

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import save
from mipipe.graphs.topology import Topology
from mipipe.planner.experts.balance.maps import ExpertLoads
from mipipe.planner.experts.files import read_loads
from mipipe.planner.experts.plan import ExpertOptions, plan_experts
from mipipe.planner.team import Team, TeamMode
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.train.config import CheckpointConfig, ExpertsConfig, OptimizerConfig, ReplanConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.expert_run import read_maps, replan_map
from mipipe.runtime.train.training import Trainer

pytestmark = pytest.mark.distributed

STEPS = 4


def batches(copy, copies):
    """One copy's batches, step by step."""
    step = 0
    while True:
        yield ex.batch_of(step, copy, copies)
        step += 1


def train(plan, graph, state, config, copies, resume=False):
    """What a rank does: the losses and the metrics' path is in the config."""
    maps = read_maps(config, graph, copies)
    engine = Engine(plan, graph, state, options=EngineOptions(expert_map=maps.get(0)))
    trainer = Trainer(engine, config, Batches(batches(engine.mesh.copy, copies)), maps=maps)
    return trainer.run(trainer.resume() if resume else 0)


def train_sharded(plan, graph, state):
    """What a run with sharded optimizer state says whose engine divides no parameters."""
    try:
        Trainer(Engine(plan, graph, state), TrainConfig(1, optimizer=OptimizerConfig(shard=True)), Batches(iter(())))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_resume_under_another_map(pool, tmp_path):
    """A checkpoint of equal blocks, resumed under a map with two replicas on one rank: the losses of one long run."""
    module, graph = ex.captured()
    plan, state = ex.plan_for(graph, 1), ex.state_of(module)
    save(ex.replicated_map(4), tmp_path / "map.json")

    def config(steps, experts, folder):
        return TrainConfig(steps, optimizer=OptimizerConfig("adam", 1e-2, {"foreach": False}), experts=experts,
                           checkpoint=CheckpointConfig(str(tmp_path / folder), asynchronous=False))

    whole = pool.run(4, __file__, "train", plan, graph, state, config(STEPS, None, "whole"), 4)
    pool.run(4, __file__, "train", plan, graph, state, config(2, None, "parts"), 4)
    mapped = ExpertsConfig(map=str(tmp_path / "map.json"))
    rest = pool.run(4, __file__, "train", plan, graph, state, config(STEPS, mapped, "parts"), 4, True)
    assert [losses[2:] for losses in whole] == rest
    refused = pool.run(2, __file__, "train_sharded", plan, graph, state)[0]
    assert "copies that share its state update some whole parameters each, but experts live on some" in refused


def config_for(folder, name, **experts):
    """A run of a few Adam steps that records its loads."""
    return TrainConfig(STEPS, optimizer=OptimizerConfig("adam", 1e-2, {"foreach": False}),
                       metrics=str(folder / f"{name}.jsonl"),
                       experts=ExpertsConfig(loads=str(folder / f"{name}.loads.json"),
                                             history=str(folder / f"{name}.counts.jsonl"), window=2, **experts))


def test_loads_become_a_map_that_a_run_moves_to(pool, tmp_path):
    """Train on equal blocks, plan from the recorded loads, train again moving to the map: the same losses to the last
    bit, and the busiest rank has less to do."""
    module, graph = ex.captured()
    plan, state = ex.plan_for(graph, 1), ex.state_of(module)
    first = config_for(tmp_path, "first")
    before = pool.run(4, __file__, "train", plan, graph, state, first, 4)
    lines = [json.loads(line) for line in Path(first.experts.history).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    counts = torch.tensor([line["counts"] for line in lines], dtype=torch.float64)
    assert (counts.sum(dim=2) == 2 * 4 * ex.COUNT * equal.ROWS * equal.LENGTH).all()
    loads = read_loads(Path(first.experts.loads))
    assert torch.equal(torch.tensor(loads.loads, dtype=torch.float64), counts[-2:].mean(dim=0))
    assert loads.expert_bytes == 3 * 3 * 16 * 8 * 8 and loads.token_bytes == 128
    placed = plan_experts(loads, Topology.uniform(4), ExpertOptions(replicas=4, time_limit_s=5))
    save(placed.map, tmp_path / "map.json")
    second = config_for(tmp_path, "second", moves={2: str(tmp_path / "map.json")})
    after = pool.run(4, __file__, "train", plan, graph, state, second, 4)
    assert before == after and len(set(map(tuple, before))) == 1
    records = [json.loads(line) for line in Path(second.metrics).read_text().splitlines()]
    assert records[1]["experts/moved"] > 0 and "experts/moved" not in records[2]
    assert records[3]["experts/rank_max_over_mean"] < 0.7 * records[1]["experts/rank_max_over_mean"]
    assert records[0]["experts/max_over_mean"] > 2


@pytest.mark.parametrize("sharing, team", [
    (4, None), pytest.param(2, None, marks=pytest.mark.slow),
    pytest.param(2, Team({"context": 2}, 2, expert=2), marks=pytest.mark.slow),
    pytest.param(4, Team({"tensor": 2}, 2, expert=4), marks=pytest.mark.slow),
    pytest.param(4, Team({"tensor": 2}, 2, (TeamMode("tensor", "sequence"),), expert=4), marks=pytest.mark.slow)])
def test_a_run_places_its_experts_again(pool, tmp_path, sharing, team):
    """After every second step, by its own loads, with replicas: the losses of a run that never moves; also where two
    groups of devices move alike, by the mean of their loads; tokens count once, however many members see them."""
    module, graph = ex.captured()
    graph = replace(graph, source={**graph.source, "expert_parallel": sharing})
    plan, state = replace(ex.plan_for(graph, 1), team=team), ex.state_of(module)
    copies = 4 if team is None else team.copies
    config = config_for(tmp_path, "replan", replan=ReplanConfig(2, 4))
    after = pool.run(4, __file__, "train", plan, graph, state, config, copies)
    before = pool.run(4, __file__, "train", plan, graph, state, TrainConfig(STEPS, optimizer=config.optimizer), copies)
    for losses in after:
        assert losses == (before[0] if sharing == 4 else pytest.approx(before[0], rel=1e-12))
    loads, lines = read_loads(Path(config.experts.loads)), Path(config.experts.history).read_text().splitlines()
    counts = torch.tensor([json.loads(line)["counts"] for line in lines[-2:]], dtype=torch.float64)
    assert (counts.sum(dim=2) == 2 * copies * ex.COUNT * equal.ROWS * equal.LENGTH).all()
    assert torch.equal(torch.tensor(loads.loads, dtype=torch.float64), counts.mean(dim=0) * sharing / 4)
    records = [json.loads(line) for line in Path(config.metrics).read_text().splitlines()]
    assert ["experts/moved" in record for record in records] == [False, True, False, False]
    assert records[3]["experts/rank_max_over_mean"] < 0.7 * records[1]["experts/rank_max_over_mean"]


def test_planning_again_names_a_wrong_cluster():
    """One device for each copy is expected."""
    cluster = Path(__file__).parents[2] / "examples/cluster_4cpu.yaml"
    with pytest.raises(InputError, match="has 4 devices, but 2 devices of the run share the experts"):
        replan_map(ExpertLoads(((1.0,) * 8,)), ex.replicated_map(2), ReplanConfig(1, cluster=str(cluster)))


def test_ordinary_runs_count_what_the_model_chooses(tmp_path):
    """A whole bank in a planned run of one rank: the counts are those of the model's own routers, evaluation aside."""
    made = equal.case("moe")
    plan = equal.cases.problem_of(made.graph, 2, 1, [[segment.name for segment in made.graph.segments]])
    plan = next(item for item in ex.BASELINES if item.name == "GPipe").plan(plan)
    engine = Engine(plan, made.graph, made.state())
    batch = made.batch(2)
    engine.step(batch)
    found = torch.stack([engine.routing_counts()[number].clone() for number in range(8)])
    made.module.set_experts_implementation("eager")  # transformers' grouped kernel has no float64 on CPU
    chosen = torch.zeros(8, 4, dtype=torch.int64)

    def count(number):
        def hook(_, inputs):
            chosen[number] += torch.bincount(inputs[1].flatten(), minlength=4)
        return hook

    hooks = [layer.mlp.experts.register_forward_pre_hook(count(number))
             for number, layer in enumerate(made.module.model.layers)]
    for piece in models.chunked(batch, 2):
        made.module(input_ids=piece["input_ids"])
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, chosen)
    engine.step(batch)
    assert torch.equal(engine.routing_counts()[3], chosen[3]), "counts are of one step"


@pytest.mark.parametrize("change, message", [
    ({"window": 0}, "window 0"),
    ({"moves": {0: "map.json"}}, r"moves after steps \[0\]"),
    ({"load_factor": 0.5}, "load_factor 0.5"),
])
def test_wrong_settings_are_one_line(change, message):
    """Named with what was expected."""
    with pytest.raises(InputError, match=message):
        ExpertsConfig(**change)
    with pytest.raises(InputError, match="every 0 steps"):
        ReplanConfig(0)


def test_wrong_maps_are_refused_before_the_first_step(tmp_path):
    """A map where there is nothing to map; one for other copies."""
    _, graph = ex.captured()
    save(ex.replicated_map(4), tmp_path / "map.json")
    experts = ExpertsConfig(map=str(tmp_path / "map.json"))
    with pytest.raises(InputError, match="has 2 layers of 8 experts on 4 devices, but this run has 2 layers of 8"):
        read_maps(TrainConfig(1, experts=experts), graph, 2)
    with pytest.raises(InputError, match="need a graph with expert-parallel layers"):
        read_maps(TrainConfig(1, experts=experts), equal.cases.chain_graph(), 4)
    with pytest.raises(InputError, match=r"nowhere\.json"):
        read_maps(TrainConfig(1, experts=ExpertsConfig(map="nowhere.json")), graph, 4)
