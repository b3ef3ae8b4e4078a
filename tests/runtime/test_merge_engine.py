"""The merge engine: portions, reading ahead and the reader's thread do not show; rounds are what planning counts."""

import dataclasses
import itertools

import pytest
import torch
from merge_fixtures import PARAMETERS, read, recipe_for, trio

from mipipe.graphs.merging.method_table.method_spec import Scope
from mipipe.graphs.merging.passes import is_whole, num_rounds, scope_of
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.planner.actions import ActionKind
from mipipe.planner.merging import costs as merge_costs
from mipipe.planner.merging import steps
from mipipe.planner.merging.lower import lower_merge
from mipipe.planner.merging.plan import SHARD_BYTES, plan_recipe
from mipipe.planner.merging.simulate import simulate_merge
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.execute import merge_timeline, run_rank
from mipipe.runtime.merge.methods.registry import BY_METHOD, METHODS
from mipipe.runtime.merge.survey import unit_values
from mipipe.runtime.merge.worker import begin
from mipipe.runtime.weights.writer import publish_folder

VARIANTS = {"ties": [{"density": 1.0}, {"density": [0.5, 1.0, 1.0], "zero_sum": "majority"}, {"scope": "model"},
                     {"scope": "model", "density": 0.2}, {"density": 1.0, "rescale": True},
                     {"density": 0.5, "rescale": True, "zero_sum": "majority"}],
            "breadcrumbs": [{"density": 0.5, "rescale": True}], "breadcrumbs_ties": [{"rescale": True}],
            "dare_linear": [{"density": 0.5, "rescale_norm": "l1"}, {"density": 0.5, "rescale": False},
                            {"rescale_norm": "l1"}],
            "nuslerp": [{"weight": 1.0, "nuslerp_row_wise": True}, {"weight": 1.0, "nuslerp_flatten": False}],
            "model_stock": [{"filter_wise": True}], "sce": [{"select_topk": 1.0}, {"select_topk": 0.1}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    trio(folder)
    return folder


def plan_of(data, out):
    return plan_recipe(parse_recipe(data, "recipe"), "recipe", out, {}, 1, None, SHARD_BYTES)


@pytest.mark.parametrize("name", [method.spec.name for method in METHODS
                                  if not (method.spec.runs_models or method.spec.factors)])
def test_planning_knows_how_often_and_over_what_a_method_measures(name, root, tmp_path):
    for parameters in [PARAMETERS.get(name, {}), *VARIANTS.get(name, [])]:
        plan = plan_of(recipe_for(name, root, parameters=parameters), tmp_path / "out")
        for unit in plan.graph.units:
            if unit.method == "copy":
                continue
            method, values = BY_METHOD[unit.method].handling(unit.tensor_class), unit_values(unit)
            assert num_rounds(unit) == len(method.rounds(**values)), (unit.name, parameters)
            assert scope_of(unit) is method.scope(**values)
            assert is_whole(unit) == (method.spec.whole and unit.tensor_class in method.spec.classes)


@pytest.mark.parametrize("name", ["ties", "frank", "doge", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("tsvm", "dare_ties"))])
def test_portions_and_reading_ahead_do_not_show_in_the_result(name, root, tmp_path, monkeypatch):
    """Tiles of three rows, portions of one to many tiles, none to three steps read ahead."""
    for module in (steps, merge_costs):
        monkeypatch.setattr(module, "TILE_ENTRIES", 24)
    changes = {"parameters": {"density": 0.4, "scope": "model"}} if name == "ties" else {}
    plan = plan_of(recipe_for(name, root, **changes), tmp_path / "out")
    results = set()
    for portion, ahead in ((10**6, 0), (24, 1), (48, 3)):
        chosen = dataclasses.replace(plan, portion_entries=portion, ahead=ahead)
        out = tmp_path / f"{portion}-{ahead}"
        folder = begin(chosen, out)
        _, events = run_rank(chosen, folder, MergeRanks.alone(), torch.device("cpu"))
        publish_folder(folder, out, chosen.shards)
        results.add((out / "model.safetensors").read_bytes())
        program = lower_merge(chosen)
        (instructions,) = program.ranks
        timed = [number for number, item in enumerate(instructions) if item.kind is not ActionKind.FREE]
        assert sorted(number for number, _, _ in events) == timed
        measured, simulated = merge_timeline(chosen, [events]), simulate_merge(chosen, program)
        assert ({span.label for span in measured.spans if span.kind is not ActionKind.ALL_REDUCE}
                == {span.label for span in simulated.spans})
        for before, after in itertools.pairwise(sorted(events)):
            first, second = instructions[before[0]], instructions[after[0]]
            if first.kind is not ActionKind.LOAD and second.kind is not ActionKind.LOAD:
                assert before[2] <= after[1]
    assert len(results) == 1
    if scope_of(next(unit for unit in plan.graph.units if unit.layer == 0)) is not Scope.PIECE:
        assert any(span.kind is ActionKind.ALL_REDUCE for span in measured.spans)
    assert set(read(tmp_path / "24-1")) == set(read(root / "base"))
