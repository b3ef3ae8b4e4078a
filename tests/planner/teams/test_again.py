"""A plan of teams made again for fewer devices: as good as trying all, on some of them where that is better."""

from __future__ import annotations

from dataclasses import replace

import pytest
from team_brute import everything
from team_machine import machine

from mipipe.graphs.errors import InfeasibleError, InputError, TimeUpError
from mipipe.graphs.serialize import digest, load, save
from mipipe.planner.check.plan import check_plan
from mipipe.planner.plan import Plan
from mipipe.planner.team import TeamMode
from mipipe.planner.teams.again import TeamTask, best_of_fewer, made_again, task_of, with_task
from mipipe.planner.teams.as_team import degrees_of
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pricing import Pricer

QUICK = TeamOptions({}, 1, None, 30.0, order=False)


@pytest.mark.parametrize("batch, links, used", [
    pytest.param(6, 10**10, 3, marks=pytest.mark.slow), (2, 10**10, 2),
    pytest.param(4, 10**7, 1, marks=pytest.mark.slow)])
def test_what_is_left_is_used_as_well_as_it_can_be(pieces, batch, links, used):
    """No degrees of any number of devices up to three are better: three copies of six sequences; as two do not divide
    by three, two copies beside an idle device; one device alone where links are slow."""
    pricer, given = Pricer(pieces, machine(inside=links)), {"context": 1, "zero": 1, "chunks": 1}
    found = best_of_fewer(pricer, 3, batch, replace(QUICK, given=given))
    every = [item for count in range(1, 4) for item in everything(pricer, count, batch, given, 1)]
    assert found.seconds <= min(item.seconds for item in every) * 1.001
    assert found.degrees.devices == used and not found.shortage


@pytest.mark.parametrize("given, devices, kept", [
    ({"tensor": 2}, 3, True), ({"ranks": 2, "copies": 1}, 3, True), ({"tensor": 2, "ranks": 2}, 3, False),
    ({"tensor": 2, "ranks": 2}, 7, True)])
def test_what_was_fixed_stays_so_where_it_can(pieces, given, devices, kept):
    """On some of the devices, else nothing is fixed any more."""
    degrees = best_of_fewer(Pricer(pieces, machine()), devices, 8, replace(QUICK, given=given)).degrees
    assert all(getattr(degrees, name) == size for name, size in given.items()) == kept
    assert degrees.devices <= devices


def test_degrees_that_do_not_run_are_passed_over(pieces):
    """And where none is left, or none has the memory, or as many devices as are asked for, the reason is told."""
    pricer = Pricer(pieces, machine())
    found = best_of_fewer(pricer, 3, 8, QUICK, wanted=lambda degrees: degrees.ranks == 1)
    assert found.degrees.ranks == 1 and best_of_fewer(pricer, 3, 8, QUICK).degrees.ranks == 3
    with pytest.raises(InfeasibleError, match=r"^no plan exists for 1 to 3 devices and 8 sequences a step: none of"):
        best_of_fewer(Pricer(pieces, machine(10**6)), 3, 8, QUICK)
    with pytest.raises(InfeasibleError, match=r"^no plan exists for 3 to 3 devices and 8 "):
        best_of_fewer(pricer, 3, 8, QUICK, least=3, wanted=lambda degrees: degrees.devices < 3)


@pytest.mark.parametrize("given", [{}, {"tensor": 2, "ranks": 2}])
def test_the_time_limit_is_one_for_all_that_is_tried(pieces, monkeypatch, given):
    """For every number of devices and both wishes, on a clock that searches move on by all they may take. Without an
    answer nothing is said of whether a plan exists."""
    clock, spent = [0.0], []

    def search(pricer, devices, batch, options, wanted):
        spent.append(options.time_limit_s)
        clock[0] += options.time_limit_s
        raise TimeUpError("no degrees evaluated")

    with monkeypatch.context() as patched:
        patched.setattr("mipipe.planner.teams.again.search_teams", search)
        patched.setattr("mipipe.planner.teams.again.time.monotonic", lambda: clock[0])
        with pytest.raises(TimeUpError, match="no plan found for 1 to 64 devices and 8 sequences a step within 4 s"):
            best_of_fewer(Pricer(pieces, machine()), 64, 8, replace(QUICK, given=given, time_limit_s=4.0))
    assert len(spent) > 2 and sum(spent) <= 4.0
    with pytest.raises(TimeUpError):
        best_of_fewer(Pricer(pieces, machine()), 3, 8, replace(QUICK, given=given, time_limit_s=1e-9))


def test_what_is_asked_of_degrees_is_asked_of_branches_modes_too(llama, pieces):
    """Degrees are judged with the modes that a branch has of its own; where the graph cannot be divided as the best
    say, others are taken, or none in time."""
    plan = evaluate_teams(Pricer(pieces, machine()), Degrees(2, 2, copies=2, microbatch=1), 12).plan
    own = TeamMode("tensor", "batch", (llama.segments[1].name,))
    plan = with_task(replace(plan, team=replace(plan.team, modes=(own,))), TeamTask(machine(), replace(QUICK, given={
        "context": 1, "zero": 1})))
    asked, found = [], []

    def runs(other):
        asked.append(other.team)
        return other.team.members > 1

    def divides(other):
        found.append(other.team)
        return len(found) > 1

    again = made_again(plan, llama, 4, copies=2, runs=runs, divides=divides)
    assert all((own in team.modes) == ("tensor" in team.axes) for team in asked) and len(found) == 2
    first, second = ((team.axes, team.modes) for team in found)
    assert first != second == (again.team.axes, again.team.modes)
    with pytest.raises((InfeasibleError, TimeUpError), match="no plan"):
        made_again(plan, llama, 2, copies=2, seconds=0.5, runs=runs, divides=lambda other: False)


def test_a_plan_made_again_is_one_for_the_same_run(llama, pieces, tmp_path):
    """From its file: complete, for the same graph, as many sequences a step, with the modes that a branch has of its
    own where there is an axis for them; and it can be made again once more. One that does not say what it was made for
    is refused."""
    spec, batch = machine(), 12
    before = evaluate_teams(Pricer(pieces, spec), Degrees(ranks=2, tensor=2, copies=2, microbatch=1), batch).plan
    own = TeamMode("tensor", "batch", (llama.segments[1].name,))
    before = replace(before, problem=before.problem.replace(graph_digest=digest(llama)),
                     team=replace(before.team, modes=(own,)))
    with pytest.raises(InputError, match="does not say what devices it was made for"):
        made_again(before, llama, 3, copies=2)
    save(with_task(before, TeamTask(spec, replace(QUICK, given={"tensor": 2}))), tmp_path / "plan.json")
    kept = load(tmp_path / "plan.json", Plan)
    assert task_of(kept) == TeamTask(spec, replace(QUICK, given={"tensor": 2}))
    degrees = []
    for devices in (5, 3, 1):
        again = made_again(kept, llama, devices, copies=kept.team.copies)
        check_plan(again)
        assert again.problem.graph_digest == digest(llama) and task_of(again) == task_of(kept)
        assert again.problem.num_microbatches * again.team.copies == batch
        assert (own in again.team.modes) == ("tensor" in again.team.axes)
        degrees.append(degrees_of(again).devices)
        kept = again
    assert degrees == [4, 2, 1]


@pytest.mark.parametrize("change, message", [
    ({"options": {"given": {"ranks": 0}}}, r"provenance\.task: degrees: 'ranks' is 0; expected ranks, tensor"),
    ({"options": {"time_limit_s": 0}}, r"provenance\.task: time limit: is 0.0 s; expected a number above 0"),
    ({"options": {"microbatch": 0}}, r"provenance\.task: microbatch: is 0; expected at least 1 sequence"),
    ({"machine": {"kind": {"flops": {"bfloat16": 0}}}}, "device kind small: has a peak rate or bandwidth of 0"),
    ({"machine": {"kind": {"achieved": {"memory": 0}}}}, r"provenance\.task: achieved: memory is 0; expected a share"),
    ({"machine": {"fabric": {"levels": []}}}, r"provenance\.task: a fabric without levels")])
def test_what_a_plan_file_says_it_was_made_for_is_checked(llama, pieces, change, message):
    def changed(data, change):
        return {**data, **{key: changed(data[key], item) if isinstance(item, dict) else item
                           for key, item in change.items()}}

    plan = evaluate_teams(Pricer(pieces, machine()), Degrees(microbatch=1), 1).plan
    task = with_task(plan, TeamTask(machine(), replace(QUICK, microbatch=None, given={"ranks": 1}))).provenance["task"]
    with pytest.raises(InputError, match=message):
        made_again(replace(plan, provenance={"task": changed(task, change)}), llama, 1, copies=1)
