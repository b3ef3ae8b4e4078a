"""What ``mipipe merge`` says beside merging: its methods, and what a dry run foresees."""

import json
import time

import pytest
from merge_fixtures import trio
from typer.testing import CliRunner

from mipipe.cli.main import app
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.method_table.methods import METHODS
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.planner.actions import ActionKind
from mipipe.planner.merging.costs import (
    MergeRates,
    loop_seconds,
    processor_share,
    shared_rates,
    start_ns,
    timed,
    verify_ns,
    waited,
)
from mipipe.planner.merging.lower import lower_merge
from mipipe.planner.merging.plan import plan_merge
from mipipe.planner.merging.simulate import simulate_merge


def call(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_methods_for_machines():
    found = json.loads(call("--methods", "--json").stdout)["methods"]
    assert [item["name"] for item in found] == [spec.name for spec in METHODS]
    ties = next(item for item in found if item["name"] == "ties")
    density = next(item for item in ties["parameters"] if item["name"] == "density")
    assert ties["arxiv"] == "2306.01708" and density == {
        "name": "density", "default": 1.0, "kind": "float", "per_model": True, "low": 0.0, "high": 1.0, "choices": [],
        "optional": False, "doc": "share of entries kept"}


def test_one_method_by_name():
    found = call("--methods", "nearswap")
    assert found.exit_code == 0 and "nearswap" in found.stdout and "ties" not in found.stdout
    assert [item["name"] for item in json.loads(call("--methods", "slerp", "--json").stdout)["methods"]] == ["slerp"]
    wrong = call("--methods", "tiess")
    assert wrong.exit_code == 2 and "no method 'tiess'" in wrong.output


@pytest.mark.parametrize(("arguments", "message"), [((), "give a recipe"), (("r.yaml",), "give the folder to make")])
def test_what_is_missing_is_said(arguments, message):
    found = call(*arguments)
    assert found.exit_code == 2 and message in found.output


def plan_of(root, ranks, rates):
    recipe = {"merge_method": "ties", "base_model": f"{root}/base", "parameters": {"density": 0.5},
              "models": [{"model": f"{root}/expert1"}, {"model": f"{root}/expert2"}]}
    return plan_merge(build(parse_recipe(recipe, "recipe")), ranks, rates)


def test_small_tensors_cost_what_their_steps_do(tmp_path):
    """With rates that make all data free, a merge takes its instructions' own times, in loops of the interpreter."""
    trio(tmp_path)
    plan = plan_of(tmp_path, 1, MergeRates(1e18, 1e18, 1e18, 1e18, loop_s=0.01))
    timeline = simulate_merge(plan, lower_merge(plan))
    counts = {kind: sum(span.kind is kind for span in timeline.spans) for kind in ActionKind}
    expected = 0.01 * (0.12 * counts[ActionKind.MEASURE] + 0.012 * counts[ActionKind.COMBINE]
                       + 0.006 * counts[ActionKind.SAVE])
    assert expected * 1e9 < timeline.makespan_ns < 1.3 * expected * 1e9 + 0.012e7 * counts[ActionKind.LOAD]


def test_on_a_shared_machine_a_loop_takes_what_its_share_leaves():
    """Of ten loops of 5 ms three were interrupted: the share of all of them counts, not the luckiest."""
    assert loop_seconds([(0.005, 0.005)] * 7 + [(0.055, 0.005)] * 3) == pytest.approx(0.005 * 0.2 / 0.05)
    assert loop_seconds([(0.004, 0.005), (0.006, 0.0055)]) == pytest.approx(0.005)  # clocks differ: never faster
    assert loop_seconds([(0.005, 0.0), (0.007, 0.0)]) == pytest.approx(0.006)  # a clock too coarse for it


def test_short_samples_count_at_the_share_of_the_process():
    own = []

    def work():
        began = time.thread_time()
        own.append(sum(range(100_000)))
        own.append(time.thread_time() - began)
        return own[0]

    seconds, computed, found = timed(work, 0.1)
    assert seconds >= 10 * computed >= 10 * own[1] > 0 and found == sum(range(100_000))
    assert waited(2.0, 0.1, 0.2) == pytest.approx(0.75) and waited(1.0, 0.3, 0.2) == 0.0
    assert timed(lambda: time.sleep(0.02), 1.0)[0] >= 0.02
    assert processor_share([(0.5, 0.1), (0.5, 0.3)]) == pytest.approx(0.4)


@pytest.mark.parametrize(("cores", "share", "ranks", "slower"), [
    (2, 1.0, 2, 1.0), (1, 1.0, 2, 2.0), (2, 1.0, 4, 2.0),  # alone: ranks beyond the processors take turns
    (2, 0.5, 2, 1.25),  # beside three others on two processors: of five, each gets 0.4 of one in place of 0.5
    (1, 0.5, 3, 2.0), (8, 0.95, 8, 1.0)])
def test_ranks_share_processors_and_the_disk(cores, share, ranks, slower):
    rates = MergeRates(100.0, 50.0, 10.0, 20.0, cores, 0.01, share, read_wait=0.25, write_wait=1.0)
    found = shared_rates(rates, ranks)
    assert (found.stream, found.flops, found.loop_s) == pytest.approx((10 / slower, 20 / slower, 0.01 * slower))
    assert found.read == pytest.approx(100 / (0.25 * ranks + 0.75 * slower))
    assert found.write == pytest.approx(50 / ranks)
    assert shared_rates(rates, 1) == rates


def test_two_ranks_on_one_processor_are_foreseen_to_take_as_long_as_one(tmp_path):
    trio(tmp_path)
    times = []
    for cores, ranks in ((1, 1), (1, 2), (2, 2)):
        plan = plan_of(tmp_path, ranks, MergeRates(1e9, 1e9, 1e7, 1e9, cores))
        times.append(simulate_merge(plan, lower_merge(plan)).makespan_ns)
    assert times[1] == pytest.approx(2 * times[2], rel=0.01) and times[1] >= 0.99 * times[0]


def test_starting_counts_and_verifying_what_is_left_of_it_after_the_merge():
    """Transformers is imported beside a merge that leaves a processor free."""
    rates = MergeRates(1.0, 1.0, 1.0, 1.0, cores=2, loop_s=0.01)
    assert 0 < start_ns(rates) == start_ns(rates, 1) < start_ns(rates, 4)
    alone = verify_ns(rates, 0)
    assert alone == verify_ns(rates, 10**12, 2) > 0 == verify_ns(rates, alone + 1)
    assert verify_ns(rates, 10**9) == alone - 10**9


def test_a_dry_run_says_when_ranks_do_not_pay(tmp_path):
    trio(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps({"merge_method": "linear", "models": [
        {"model": str(tmp_path / f"expert{seed}")} for seed in (1, 2)]}))
    arguments = (tmp_path / "r.yaml", "-o", tmp_path / "out", "--dry-run")
    assert "2 ranks do not pay" in call(*arguments, "--ranks", 2).stdout
    assert "do not pay" not in call(*arguments).stdout
    facts = json.loads(call(*arguments, "--json").stdout)
    assert facts["total_ns"] == facts["start_ns"] + facts["recipes"][0]["estimated_ns"]
