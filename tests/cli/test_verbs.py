"""The light verbs on small files: what they print, what they write, and one clear line for each kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from mipipe.graphs.serialize import load, save
from mipipe.graphs.units import parse_bytes
from mipipe.planner.actions import Action
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.plan import Plan, RankOrder, Schedule
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.timeline import Timeline


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return load(folder / "plan.json", Plan)


def test_plan_prints_the_figures_the_issue_asks_for(mipipe, folder: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "--placement", "chain", "--time-limit", 2)
    assert ended.code == 0, ended.stderr
    for word in ("rank 0 F0", "makespan", "bound at this placement", "bubble ratio", "peak", "found by"):
        assert word in ended.stdout


def test_plan_json_is_one_object_with_bound_and_gap(mipipe, folder: Path, tmp_path: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "--placement", "chain", "--time-limit", 3, "--json", "--explain",
                   "-o", tmp_path / "plan.json", "--html", tmp_path / "plan.html", "--trace", tmp_path / "trace.json")
    assert ended.code == 0, ended.stderr
    data = ended.data
    written = load(tmp_path / "plan.json", Plan)
    timeline = simulate(written, lower(written))
    assert data["makespan"] * written.problem.unit_ns == timeline.makespan_ns == written.makespan_ns
    assert data["bound"] <= data["makespan"] and data["placement_bound"] <= data["makespan"]
    assert data["gap"] == pytest.approx(data["makespan"] / data["bound"] - 1)
    assert [rank["bubble"] for rank in data["ranks"]] == [
        bubble / written.problem.unit_ns for bubble in timeline.bubbles_ns()]
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_same_seed_gives_a_plan_at_least_as_good_as_the_bound(mipipe, folder: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "--placement", "chain", "--time-limit", 3, "--seed", 5, "--json")
    assert ended.data["provenance"]["seed"] == 5


def test_memory_too_small_says_the_smallest_that_would_do(mipipe, folder: Path, tmp_path: Path) -> None:
    problem = load(folder / "problem.json", PlanningProblem)
    ended = mipipe("plan", folder / "problem.json", "--memory", "100B", "--time-limit", 2)
    assert ended.code == 3
    assert "memory" in ended.error and "\n" not in ended.error
    promised = re.search(r"a device memory of (\S+) would do", ended.error)
    assert promised, ended.error
    enough = mipipe("plan", folder / "problem.json", "--memory", promised[1], "--time-limit", 1)
    assert enough.code == 0, enough.stderr
    assert parse_bytes(promised[1]) < sum(group.resident_bytes + 8 * group.saved_fw_bytes for group in problem.groups)


def test_simulate_writes_what_it_prints(mipipe, folder: Path, plan: Plan, tmp_path: Path) -> None:
    ended = mipipe("simulate", folder / "plan.json", "-o", tmp_path / "timeline.json", "--program",
                   tmp_path / "program.json", "--json")
    timeline = load(tmp_path / "timeline.json", Timeline)
    assert ended.data["makespan"] == timeline.makespan_ns / plan.problem.unit_ns
    assert mipipe("check", folder / "plan.json", "--program", tmp_path / "program.json").code == 0


def test_show_puts_timelines_on_one_scale_with_their_ratio(mipipe, folder: Path, plan: Plan, tmp_path: Path) -> None:
    simulated = simulate(plan, lower(plan))
    slow = dataclasses.replace(simulated, origin="measured", spans=tuple(
        dataclasses.replace(span, start_ns=2 * span.start_ns, end_ns=2 * span.end_ns) for span in simulated.spans))
    save(slow, tmp_path / "measured.json")
    data = mipipe("show", folder / "plan.json", tmp_path / "measured.json", "--json").data
    assert [item["origin"] for item in data["timelines"]] == ["simulated", "measured"]
    assert [item["ratio"] for item in data["timelines"]] == [1.0, 2.0]
    text = mipipe("show", folder / "plan.json", tmp_path / "measured.json", "--html", tmp_path / "both.html").stdout
    assert "measured.json measured / plan.json simulated: 2.000" in text
    assert "measured.json measured" in (tmp_path / "both.html").read_text()


def test_check_accepts_the_plan(mipipe, folder: Path) -> None:
    assert mipipe("check", folder / "plan.json", "--json").data["ok"] is True


def reordered(plan: Plan, rank: int, order: tuple[Action, ...]) -> Plan:
    """The plan with another order on one rank."""
    ranks = list(plan.schedule.ranks)
    ranks[rank] = RankOrder(order)
    return dataclasses.replace(plan, schedule=Schedule(tuple(ranks)))


def test_a_deadlock_shows_the_grid(mipipe, plan: Plan, tmp_path: Path) -> None:
    """Rank 0 wants its gradient before it has sent its forward."""
    order = list(plan.schedule.ranks[0].compute)
    first = next(action for action in order if str(action).endswith("I0"))
    order.remove(first)
    save(reordered(plan, 0, (first, *order)), tmp_path / "dead.json")
    ended = mipipe("check", tmp_path / "dead.json")
    assert ended.code == 5
    assert "deadlock" in ended.error and "rank 0" in ended.error
    assert "0I0" in ended.error and "\n" in ended.error


def test_a_missing_action_is_named(mipipe, plan: Plan, tmp_path: Path) -> None:
    order = plan.schedule.ranks[1].compute
    save(reordered(plan, 1, order[:-1]), tmp_path / "short.json")
    for verb in ("check", "simulate"):
        ended = mipipe(verb, tmp_path / "short.json")
        assert ended.code == 5
        assert str(order[-1]) in ended.error or "missing" in ended.error


@pytest.mark.parametrize(("text", "words"), [
    ("not json", ["not readable as JSON"]),
    ("[1, 2]", ["found a list", "expected a mapping"]),
    ("{}", ["no format", "mipipe.plan"]),
    ('{"format": "other.plan", "version": 1}', ["'other.plan'", "'mipipe.plan'"]),
    ('{"format": "mipipe.plan", "version": 99}', ["99", "reads version"]),
    ("\xff\xfe", ["broken.json"]),
])
def test_unreadable_and_foreign_files(mipipe, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    for verb in ("check", "simulate", "show", "export"):
        more = ["--trace", tmp_path / "t.json"] if verb == "export" else []
        ended = mipipe(verb, path, *more)
        assert ended.code == 1
        assert "broken.json" in ended.error and "\n" not in ended.error
        if verb in ("check", "simulate"):
            assert all(word in ended.error for word in words), ended.error


def test_unknown_keys(mipipe, folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "plan.json").read_text())
    data["problem"]["num_microbatchs"] = 3
    (tmp_path / "typo.json").write_text(json.dumps(data))
    ended = mipipe("check", tmp_path / "typo.json")
    assert ended.code == 1
    assert "problem.num_microbatchs" in ended.error


def test_a_missing_file_and_a_folder(mipipe, tmp_path: Path) -> None:
    assert "no-such.json: cannot be read" in mipipe("check", tmp_path / "no-such.json").error
    assert mipipe("check", tmp_path).code == 1


def test_outputs_are_checked_before_the_work(mipipe, folder: Path, tmp_path: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "-o", tmp_path / "no" / "plan.json", "--time-limit", 100)
    assert ended.code == 1 and "does not exist" in ended.error


def test_zero_microbatches(mipipe, folder: Path) -> None:
    assert "--microbatches 0" in mipipe("plan", folder / "problem.json", "--microbatches", 0).error
    ended = mipipe("compare", "--ranks", 4, "--microbatches", 0)
    assert ended.code == 1 and "microbatches" in ended.error


def test_a_cyclic_problem(mipipe, folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "problem.json").read_text())
    data["edges"].append({"source": 3, "targets": [1], "num_bytes": 0, "grad_bytes": 0, "value": "back"})
    (tmp_path / "cyclic.json").write_text(json.dumps(data))
    ended = mipipe("plan", tmp_path / "cyclic.json")
    assert ended.code == 1 and "cycle" in ended.error


def test_options_that_do_not_apply(mipipe, folder: Path, tmp_path: Path) -> None:
    assert "--cluster does not apply" in mipipe("plan", folder / "problem.json", "--cluster", "c.yaml").error
    assert "--memory" in mipipe("plan", folder / "problem.json", "--memory", "many").error
    assert "placement" in mipipe("plan", folder / "problem.json", "--placement", "circle").error
    assert "nothing to write" in mipipe("export", folder / "plan.json").error
    assert "--ranks is missing" in mipipe("compare", "--microbatches", 8).error


def test_export_needs_a_plan_for_the_order(mipipe, folder: Path, tmp_path: Path) -> None:
    mipipe("simulate", folder / "plan.json", "-o", tmp_path / "timeline.json")
    ended = mipipe("export", tmp_path / "timeline.json", "--csv", tmp_path / "order.csv")
    assert ended.code == 1 and "give the plan" in ended.error
    assert mipipe("export", folder / "plan.json", "--csv", tmp_path / "order.csv").code == 0
    rows = (tmp_path / "order.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[0].startswith("0F0,")


def test_a_time_limit_too_short_for_any_plan(mipipe, tmp_path: Path) -> None:
    """Time up without a plan ends with 6; with a plan found in time it is no error."""
    save(uniform_problem(ranks=16, microbatches=64, f=1, i=1, w=1), tmp_path / "large.json")
    ended = mipipe("plan", tmp_path / "large.json", "--time-limit", 0.1, "--json")
    assert ended.code in (0, 6)
    if ended.code == 6:
        assert "longer time limit" in ended.error
    else:
        assert math.isfinite(ended.data["makespan"])
