"""What a pricer keeps between calls changes no price: a new one for every call says the same."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from team_brute import variants
from team_config import CONFIG
from team_machine import machine

from mipipe.graphs.capture.model import capture
from mipipe.graphs.errors import GraphError
from mipipe.graphs.sharding.modes import with_modes
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.space import DegreeSpace, all_degrees, roughly_fits

EXPERTS = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "head_dim": 32,
           "num_experts_per_tok": 2, "moe_intermediate_size": 344, "num_hidden_layers": 2, "mlp_only_layers": [0]}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A layer without experts, and one with."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "config.json").write_text(json.dumps(CONFIG | EXPERTS))
    return capture(str(folder), seq=512, dtype="bfloat16", verify=False)


def said(pricer, degrees):
    try:
        return pricer.costs(degrees), pricer.footprint(degrees), pricer.collectives(degrees)
    except GraphError as error:
        return str(error)


@pytest.mark.parametrize("name", [
    "experts", pytest.param("traced", marks=pytest.mark.slow), "latent", "llava"])
def test_prices_are_those_of_a_new_pricer(name, request):
    """Of degrees in any order, with experts divided and not, in every mode of recomputation and way to share state."""
    graph = request.getfixturevalue("experts" if name == "traced" else name)
    model = model_pieces(with_modes(graph, ("tensor",), (2,)) if name == "traced" else graph)
    kept, draw = Pricer(model, machine()), random.Random(3)
    every = [replace(each, recompute=way) for base in all_degrees(model, 8, 32, {})
             for line in variants(base, 32, {}) for each in line for way in model.recompute]
    assert {each.expert for each in every} == ({1, 2, 4, 8} if name in ("experts", "traced") else {1})
    for drawn in draw.sample(every, 2):
        said(kept, drawn)
        for other in ({"zero": (drawn.zero + 1) % 4}, {"microbatch": 3 - min(drawn.microbatch, 2)},
                      {"copies": 2 * drawn.copies}, {"recompute": draw.choice(model.recompute)}):
            each = replace(drawn, **other)  # whose prices are those of what was drawn where too little is told apart
            assert said(kept, each) == said(Pricer(model, machine()), each), each


@pytest.mark.parametrize("wanted", [lambda degrees: True, lambda degrees: degrees.microbatch != 2])
def test_all_combinations_that_may_fit_are_points_or_unpriced(experts, wanted):
    """They are counted one by one, and none is lost that `roughly_fits`."""
    model = model_pieces(experts)
    pricer = Pricer(model, machine(memory=2 * 10**7))
    space = DegreeSpace(pricer, 4, 16, {}, None, None, wanted)
    every = [each for base in all_degrees(model, 4, 16, {}) for line in variants(base, 16, {}, None, wanted)
             for each in line]
    assert space.combinations == len(every)
    fitting = {each for each in every if roughly_fits(pricer, each)}
    assert 0 < len(fitting) < len(every)
    assert {point.degrees for point in space.all()} <= fitting
    assert {replace(way, microbatch=size) for lines in DegreeSpace(
        pricer, 4, 16, {}, None, None, wanted)._lines.values() for way, sizes in lines.items()
        for size in sizes} == fitting
    assert Degrees(copies=4) in {replace(each, microbatch=1, zero=1) for each in every}
