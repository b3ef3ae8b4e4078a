"""Planning problems from measured times of layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipipe.graphs.errors import InputError
from mipipe.graphs.topology import UNLIMITED_BYTES, Device, Link, Topology
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.problems.from_layers import LayerTimes, read_layer_times
from mipipe.planner.problems.held_transfers import hold_transfers
from mipipe.planner.schedules import BASELINES

TABLE = {"Tiny": {"GH-96": {"4": {"1": {"0": [0.001, 0.002, 0.0005], "1": [0.003, 0.006, 0.0],
                                        "2": [0.002, 0.004, 0.001]}}}}}


def test_a_step_of_1f1b_by_hand(tmp_path: Path) -> None:
    """Two stages of 4 and 2 ms of F and twice as much B, 3 microbatches; updates last."""
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(TABLE))
    layers = read_layer_times(path, "Tiny", "GH-96", 4, 1)
    assert layers[1] == LayerTimes(0.003, 0.006, 0.0)
    groups = tuple(Group(f"stage {stage}", {"measured": PhaseTimes(
        round(1e9 * sum(layer.forward for layer in own)), round(1e9 * sum(layer.backward for layer in own)), None)},
        update_ns=round(1e9 * sum(0.01 / len(own) + (layer.update or 0.0) for layer in own)))
        for stage, own in enumerate((layers[:2], layers[2:])))
    devices = tuple(Device(f"rank{number}", "measured", UNLIMITED_BYTES, f"host{number}") for number in range(2))
    link = Link(10**6, 10**9)
    problem = PlanningProblem("layers", groups, (GroupEdge(0, (1,), 10**6, 10**6, "stage 0.out"),),
                              Topology(devices, link, link), 3)
    one_f_one_b = next(baseline for baseline in BASELINES if baseline.name == "1F1B")
    # stage 0: F 0..4, F ..8, B waits for F 6..8 and B ..12 of stage 1 and a link, 14..22, F ..26, B ..34, and the last
    # B for F 28..30 and B ..34 of stage 1 and a link, 36..44; then its update and the reduction
    assert one_f_one_b.plan(problem, split=False).makespan_ns == pytest.approx((44 + 0.5 + 10) * 1e6)
    held = hold_transfers(problem)
    assert [group.times["measured"].f_ns for group in held.groups] == [6_000_000, 4_000_000]
    assert [group.times["measured"].i_ns for group in held.groups] == [10_000_000, 6_000_000]


@pytest.mark.parametrize(("key", "message"), [
    (("Large", "GH-96", 4, 1), "no model 'Large'; it has Tiny"),
    (("Tiny", "H100", 4, 1), "Tiny: no device 'H100'; it has GH-96"),
    (("Tiny", "GH-96", 8, 1), "no microbatch '8'; it has 4"),
    (("Tiny", "GH-96", 4, 2), "no tensor degree '2'; it has 1")])
def test_what_is_not_in_the_table_is_named(tmp_path: Path, key: tuple[str, str, int, int], message: str) -> None:
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(TABLE))
    with pytest.raises(InputError, match=message):
        read_layer_times(path, *key)


@pytest.mark.parametrize("entry", [[0.1, 0.2], [0.1, -0.2, 0.0], [0.1, "fast", 0.0], 3])
def test_times_are_three_numbers(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps({"m": {"d": {"1": {"1": {"0": entry}}}}}))
    with pytest.raises(InputError, match=r"layer 0: found .* expected \[forward, backward, update\] in seconds"):
        read_layer_times(path, "m", "d", 1, 1)
