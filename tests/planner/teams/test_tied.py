"""Tied tables: a rank with both ends has one, two ranks have two and sum their gradients, bounds count one."""

from __future__ import annotations

import json

import pytest
from team_config import CONFIG
from team_machine import machine

from mipipe.graphs.capture.model import capture
from mipipe.graphs.costs.collectives import collective_ns
from mipipe.graphs.modes import CollectiveKind
from mipipe.planner.teams.bounds.of_degrees import bound_of
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer

TABLE = CONFIG["vocab_size"] * CONFIG["hidden_size"]


@pytest.fixture(scope="module")
def pricer(tmp_path_factory) -> Pricer:
    folder = tmp_path_factory.mktemp("tied")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    return Pricer(model_pieces(capture(str(folder), seq=512, dtype="bfloat16", verify=False)), machine())


@pytest.mark.parametrize("degrees, schedule, tables", [
    (Degrees(), "1f1b", 1), (Degrees(tensor=2), "1f1b", 1), (Degrees(ranks=2), "1f1b", 2),
    (Degrees(ranks=2, tensor=4), "1f1b", 2), (Degrees(ranks=2, chunks=2), "interleaved", 2),
    (Degrees(ranks=2, copies=2, zero=3), "1f1b", 2), (Degrees(ranks=2), "zb-v", 1), (Degrees(ranks=2), "dualpipe", 2)])
def test_every_rank_has_one_table(pricer, degrees, schedule, tables):
    """The V's two ends are on one; DualPipe has two of everything. A tensor axis divides matrices, but not
    norms: with it a half percent more."""
    found = evaluate_teams(pricer, degrees, 8 * degrees.copies, schedule=schedule)
    alone = pricer.model.parameters()
    numbers = 2 * alone if schedule == "dualpipe" else alone + (tables - 1) * TABLE
    for name, size, divided in (("weights", 2, degrees.zero == 3), ("gradients", 4, degrees.zero == 3),
                                ("state", 12, degrees.zero > 0)):
        total = sum(getattr(rank, name) for rank in found.memory) * (degrees.copies if divided else 1)
        assert total * degrees.tensor == pytest.approx(size * numbers, rel=0.005 if degrees.tensor > 1 else 1e-4), name
    bound = bound_of(pricer, degrees, 8 * degrees.copies, None)
    assert bound is not None and bound[1] <= found.seconds


@pytest.mark.parametrize("degrees, schedule, apart", [
    (Degrees(), "1f1b", False), (Degrees(ranks=2), "1f1b", True), (Degrees(ranks=2, tensor=2), "1f1b", True),
    (Degrees(ranks=3, chunks=2), "interleaved", True), (Degrees(ranks=2), "zb-v", False)])
def test_two_tables_gradients_are_summed_at_the_end(pricer, degrees, schedule, apart):
    """Beside nothing, by the ranks that have the first and the last stage."""
    found = evaluate_teams(pricer, degrees, 6, schedule=schedule)
    sums = collective_ns(pricer.machine.fabric, CollectiveKind.ALL_REDUCE, TABLE * 4 // degrees.tensor, 2,
                         degrees.tensor) / 1e9
    ends = [0, len(found.stages) - 1]
    assert sums > 0
    assert [stage.exposed_data for stage in found.stages] == pytest.approx(
        [sums if apart and number in ends else 0.0 for number in range(len(found.stages))], rel=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_whatever_copies_share_all_gradients_are_summed(pricer, zero):
    """The runtime sums whole gradients over both ranks and all copies, also where each keeps a part of them."""
    whole, parts = (pricer.tied(Degrees(ranks=2, copies=copies, zero=zero))[0] for copies in (1, 4))
    assert [found.together for found in (whole, parts)] == [collective_ns(
        pricer.machine.fabric, CollectiveKind.ALL_REDUCE, 4 * TABLE, 2 * copies) / 1e9 for copies in (1, 4)]
    members = pricer.tied(Degrees(ranks=2, context=2, copies=2, zero=zero))[0]  # each has all of it
    assert members.together == parts.together


def test_whether_a_model_may_fit_counts_one_table(pricer):
    """Where one table less is what makes it fit, degrees are not left out."""
    held = pricer.footprint(Degrees())
    assert held.trained_dense == 2 * pricer.model.parameters()
    assert sum(cost.weights for cost in pricer.costs(Degrees())) == held.dense
