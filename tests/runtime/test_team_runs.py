"""Training runs on teams: clipping, sharded optimizer state, checkpoints and saved folders whatever the degrees."""

import functools
import shutil
from dataclasses import replace

import pytest
import runtime_equal as equal
import torch
from runtime_runs import MICROBATCHES, RUNS, STEPS, alone, check, close, config_of, plan_of
from safetensors.torch import load_file

from mipipe.cli.printing.html import Panel, page
from mipipe.graphs.errors import TimelineError
from mipipe.graphs.recipes.adapters import is_adapter
from mipipe.graphs.serialize import load, save
from mipipe.planner.actions import Stream
from mipipe.planner.team import Team, TeamMode
from mipipe.planner.timeline import Timeline
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.adapter_files import adapter_tensors
from mipipe.runtime.train.config import ExpertsConfig
from mipipe.runtime.train.trace import measured_timeline

pytestmark = pytest.mark.distributed

TEAMS = Team({"tensor": 2})
OTHERS = Team({"context": 2, "tensor": 2}, modes=(TeamMode("tensor", "sequence"),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_run_goes_on_under_other_degrees_and_without(pool, tmp_path, name):
    """Two teams of two save after two steps; a team of two axes goes on, and a single process does; the folder that the
    team saves has the weights of one process, and each member reads its part of them."""
    made = equal.case(name)
    run = functools.partial(pool.run, timeout=180.0)
    first = run(4, RUNS, "train", name, plan_of(made.graph, 2, TEAMS), made.graph, made.state(),
                config_of(tmp_path / "kept", 2))
    check(name, first, 0, 2)
    shutil.copytree(tmp_path / "kept", tmp_path / "single")
    team = run(4, RUNS, "train", name, plan_of(made.graph, 1, OTHERS), made.graph, made.state(),
               config_of(tmp_path / "kept", STEPS), tmp_path / "saved")
    check(name, team, 2, STEPS)
    single = run(1, RUNS, "train", name, plan_of(made.graph, 1, None), made.graph, made.state(),
                 config_of(tmp_path / "single", STEPS))
    check(name, single, 2, STEPS)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for key, item in alone(name)[1][-1].items():
        close(key, saved[key], item)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, team", [(1, replace(TEAMS, copies=2)), (2, Team({}, 2))])
def test_copies_hold_parts_of_parameters(pool, tmp_path, ranks, team):
    """Copies of a team, or of a pipeline of single devices: losses, weights, clipping and the saved folder are those of
    one process, each process has half of what it would have of every matrix, and a single process goes on."""
    made = equal.case("llama")
    first = pool.run(4, RUNS, "train", "llama", plan_of(made.graph, ranks, team), made.graph, made.state(),
                     config_of(tmp_path / "kept", 2, "parameters"), tmp_path / "saved", timeout=240.0)
    check("llama", first, 0, 2)
    whole = {key: item.numel() for key, item in alone("llama")[1][0].items()}
    for _, weights, _ in first:
        assert all(piece is not None and item.numel() <= whole[key] // 2 for key, (item, piece) in weights.items())
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for key, item in alone("llama")[1][1].items():
        close(key, saved[key], item)
    single = pool.run(1, RUNS, "train", "llama", plan_of(made.graph, 1, None), made.graph, made.state(),
                      config_of(tmp_path / "kept", STEPS), timeout=180.0)
    check("llama", single, 2, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "moe", "vlm", "vlm-frozen", "vlm-lora"])
@pytest.mark.parametrize("shard", [False, True, "gradients", "parameters"])
def test_copies_of_teams_share_optimizer_state(pool, tmp_path, name, shard):
    """Two copies of a team of two, with all state in both of them or parts in each; then one copy of other degrees goes
    on."""
    made = equal.case(name)
    first = pool.run(4, RUNS, "train", name, plan_of(made.graph, 1, replace(TEAMS, copies=2)), made.graph,
                     made.state(), config_of(tmp_path, 2, shard), timeout=240.0)
    check(name, first, 0, 2)
    kept = [answer[2] for answer in first]
    for member in range(2):
        assert (kept[member] == kept[member + 2]) == (not shard)
    again = pool.run(4, RUNS, "train", name, plan_of(made.graph, 2, Team({"tensor": 2}, modes=(
        TeamMode("tensor", "sequence"),))), made.graph, made.state(), config_of(tmp_path, STEPS), timeout=240.0)
    check(name, again, 2, STEPS)


def measured(plan, graph, state, batch):
    """What a process does: a step, and its timeline."""
    engine = Engine(plan, graph, state)
    engine.step(batch)
    return measured_timeline(engine)


@pytest.mark.slow
def test_a_timeline_has_a_lane_for_each_axis(pool, tmp_path):
    """Waits for collectives lie within the actions of their rank; the HTML page draws a lane for each axis."""
    made = equal.case("llama")
    for ranks, team in ((1, OTHERS), (2, TEAMS)):
        timeline, *others = pool.run(4, __file__, "measured", plan_of(made.graph, ranks, team), made.graph,
                                     made.state(), made.batch(MICROBATCHES), timeout=240.0)
        assert others == [None] * 3
        assert {(item.rank, item.axis) for item in timeline.axes} == {
            (rank, axis) for rank in range(ranks) for axis in team.axes}
        for item in timeline.axes:
            assert any(span.rank == item.rank and span.stream is Stream.COMPUTE and span.start_ns <= item.start_ns
                       and item.end_ns <= span.end_ns for span in timeline.spans), item
        save(timeline, tmp_path / "timeline.json")
        assert load(tmp_path / "timeline.json", Timeline).axes == timeline.axes
        text = page("measured", [Panel("measured", timeline)])
        assert all(f'"along {axis}"' in text for axis in team.axes)
        with pytest.raises(TimelineError, match="there are 1 ranks"):
            replace(timeline, num_ranks=1, spans=(), memory=(), axes=(replace(timeline.axes[0], rank=1),))


@pytest.mark.slow
def test_routing_is_counted_once(pool, tmp_path):
    """Members that see all tokens, members that see parts of them, and copies: the counts of one process."""
    made = equal.case("moe")
    found = []
    for ranks, team in ((1, None), (2, TEAMS), (1, Team({"tensor": 2}, 2, (TeamMode("tensor", "batch"),))),
                        (1, Team({"context": 2, "tensor": 2}))):
        history = tmp_path / f"counts{len(found)}"
        config = replace(config_of(tmp_path / f"kept{len(found)}", 2), experts=ExpertsConfig(history=str(history)))
        world = 1 if team is None else ranks * team.members * team.copies
        pool.run(world, RUNS, "train", "moe", plan_of(made.graph, ranks, team), made.graph, made.state(), config,
                 timeout=240.0)
        found.append(history.read_text())
    assert len(found[0].splitlines()) == 2 and all(text == found[0] for text in found[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name, optimizer", [("llama", "muon"), ("llama", "reg")])
def test_optimizers_of_matrices_see_whole_ones(pool, tmp_path, name, optimizer):
    """Norms of rows and columns are summed over the members that hold parts, a matrix is put together where it must be:
    two teams of two, then two copies of one that share the state, are one process."""
    made = equal.case(name)
    first = pool.run(4, RUNS, "train", name, plan_of(made.graph, 2, TEAMS), made.graph, made.state(),
                     config_of(tmp_path, 2, name=optimizer), timeout=240.0)
    check(name, first, 0, 2, optimizer)
    again = pool.run(4, RUNS, "train", name, plan_of(made.graph, 1, replace(TEAMS, copies=2)), made.graph,
                     made.state(), config_of(tmp_path, STEPS, True, optimizer), timeout=240.0)
    check(name, again, 2, STEPS, optimizer)


def adapters_of(plan, graph, state):
    """What a process does: all adapters of an engine as they are saved."""
    return adapter_tensors(Engine(plan, graph, state))


@pytest.mark.slow
def test_adapters_of_a_recipe_train_on_teams(pool, tmp_path):
    """DoRA, whose norms are those of whole rows: two teams of two are one process, and what is saved is whole."""
    made = equal.case("llama-dora")
    state = made.state()
    plan = plan_of(made.graph, 2, TEAMS)
    check("llama-dora", pool.run(4, RUNS, "train", "llama-dora", plan, made.graph, state, config_of(tmp_path, 2),
                                 timeout=240.0), 0, 2)
    for found in pool.run(4, __file__, "adapters_of", plan, made.graph, state, timeout=120.0):
        assert found and set(found) == {key for key in state if is_adapter(key)}
        assert all(torch.equal(item, state[key]) for key, item in found.items())
