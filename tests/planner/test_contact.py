"""Deadlock at first contact: the checker against a simulation of hosts that stop in the first use of a communicator."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from mipipe.graphs.errors import ProgramError
from mipipe.planner.actions import ActionKind
from mipipe.planner.check import check_first_contact, check_program
from mipipe.planner.comparison_rows import baseline_rows
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.opening import Communicator, openings
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.program import Program
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan
from mipipe.planner.team import Team

sys.path.insert(0, str(Path(__file__).parent))
from planner_random import ample

TWO_WAY = ("DualPipe", "Chimera")


def stuck(program: Program, opened) -> dict[int, object]:
    """Hosts run ahead through opening and program and stop in the first use of a communicator until all members are in
    theirs (as NCCL's hosts do); where each rank ends that does not come through."""
    lists = []
    for rank, instructions in enumerate(program.ranks):
        own = [] if not opened else list(opened[rank])
        for item in instructions:
            if item.kind in (ActionKind.SEND, ActionKind.RECV):
                move = program.transfers[item.transfer]
                own.append(Communicator(False, (move.source_rank, move.target_rank)))
            elif item.kind is ActionKind.ALL_REDUCE and len(item.peers) > 1:
                own.append(Communicator(True, tuple(sorted(item.peers))))
        lists.append(own)
    at, made, moving = [0] * len(lists), set(), True
    while moving:
        moving = False
        for rank, own in enumerate(lists):
            while at[rank] < len(own):
                wanted = own[at[rank]]
                if wanted not in made:
                    if not all(at[other] < len(lists[other]) and lists[other][at[other]] == wanted
                               for other in wanted.members):
                        break
                    made.add(wanted)
                at[rank] += 1
                moving = True
    return {rank: own[at[rank]] for rank, own in enumerate(lists) if at[rank] < len(own)}


def both(found: Plan) -> bool:
    """With the exchange at start-up a plan's program is proved and comes through; without it, whether the checker lets
    it pass, which it does only where the simulation comes through too."""
    program = lower(found)
    check_program(found, program)
    check_first_contact(found, program, openings(program))
    assert not stuck(program, openings(program))
    try:
        check_first_contact(found, program)
    except ProgramError as error:
        assert str(error).startswith("program: deadlock at first contact: ")
        return False
    assert not stuck(program, ())
    return True


@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), pytest.param(8, 16, marks=pytest.mark.slow)])
def test_published_schedules(ranks, microbatches):
    """All come through once everything is open; without that, two-way pipelines are caught and one-way ones are not."""
    problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=2, i=2, w=1, copies=2,
                              activations=2 * ranks + 2)
    seen = set()
    for baseline in BASELINES:
        for row in baseline_rows(problem, baseline):
            if row.plan is None:
                continue
            seen.add(baseline.name)
            passed = both(row.plan)
            if baseline.name in TWO_WAY:
                assert not passed and stuck(lower(row.plan), ()), baseline.name
            elif baseline.name in ("GPipe", "1F1B", "Interleaved 1F1B", "ZB-H1"):
                assert passed, baseline.name
    assert seen >= {"GPipe", "1F1B", *TWO_WAY}


@pytest.mark.parametrize("seed", range(2, 5))
def test_plans_of_amples(seed):
    """What the planner makes: chains and branches, uneven groups, interleaved stages."""
    problem = ample(Random(seed))
    found = plan(problem.replace(num_microbatches=4), PlanOptions(time_limit_s=0.5, use_milp=False)).plan
    assert found is not None
    both(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, *range(5, 60)])
def test_plans_of_many_amples(seed):
    test_plans_of_amples(seed)


def two_way() -> Plan:
    problem = uniform_problem(ranks=2, microbatches=4, f=2, i=2, w=1, copies=2, activations=6)
    dualpipe = next(item for item in BASELINES if item.name == "DualPipe")
    return next(row.plan for row in baseline_rows(problem, dualpipe) if row.plan is not None)


def test_the_message_names_the_cycle():
    found = two_way()
    with pytest.raises(ProgramError) as caught:
        check_first_contact(found, lower(found))
    first, *rows = str(caught.value).splitlines()
    assert "SEND" in first and "of rank 0" in first and "of rank 1" in first
    assert [row.split("→")[1].split()[0] for row in rows] == ["SEND", "SEND"]


def test_openings_that_do_not_help_are_refused():
    """Ranks that open in different orders, one that leaves out a channel it needs, and one that opens alone."""
    found = two_way()
    program = lower(found)
    first, second = openings(program)
    with pytest.raises(ProgramError, match=r"at first contact: opening the channel from rank . to . by rank ."):
        check_first_contact(found, program, (first, second[::-1]))
    assert stuck(program, (first, second[::-1]))
    with pytest.raises(ProgramError, match="at first contact"):
        check_first_contact(found, program, (first, second[1:]))
    assert stuck(program, (first, second[1:]))
    lonely = uniform_problem(ranks=2, microbatches=4, f=2, i=2, w=1)
    chain = next(row.plan for row in baseline_rows(lonely, BASELINES[0]) if row.plan is not None)
    alone = openings(lower(chain))[0], Communicator(True, (0, 1))
    with pytest.raises(ProgramError, match="rank 1 never uses the sum over ranks 0, 1, for which others wait"):
        check_first_contact(chain, lower(chain), ((*alone[0], alone[1]), alone[0]))


def on_four(name: str) -> Plan:
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, copies=2, activations=10)
    baseline = next(item for item in BASELINES if item.name == name.removesuffix(" of teams"))
    found = next(row.plan for row in baseline_rows(problem, baseline) if row.plan is not None)
    return replace(found, team=Team({"tensor": 2})) if name.endswith(" of teams") else found


def broken(program: Program, rank: int, first: int, second: int) -> Program:
    """The program with two instructions of a rank exchanged."""
    items = list(program.ranks[rank])
    items[first], items[second] = items[second], items[first]
    return replace(program, ranks=tuple(tuple(items) if number == rank else own
                                        for number, own in enumerate(program.ranks)))


@pytest.mark.parametrize("name", ["DualPipe", "Chimera", "ZB-V", "Interleaved 1F1B", "DualPipe of teams"])
def test_what_is_broken_by_hand_is_caught(name):
    """Two first contacts of a rank exchanged at start-up, one rank that leaves the exchange out, all that do, and sums
    in another order on one rank: each is an error that begins with one line; and what passes comes through."""
    found = on_four(name)
    program = lower(found)
    opened = openings(program)
    check_program(found, program)
    check_first_contact(found, program, opened)
    caught = 0
    for rank, own in enumerate(opened):
        for place in range(len(own) - 1):
            order = (*own[:place], own[place + 1], own[place], *own[place + 2:])
            changed = [*opened[:rank], order, *opened[rank + 1:]]
            if stuck(program, changed):
                with pytest.raises(ProgramError, match=r"^program: deadlock at first contact: opening the [^\n]*"):
                    check_first_contact(found, program, changed)
                caught += 1
            else:  # the two have no rank in common but this one, and nobody comes between
                check_first_contact(found, program, changed)
        with pytest.raises(ProgramError, match=r"^program: deadlock at first contact: "):
            check_first_contact(found, program, [*opened[:rank], (), *opened[rank + 1:]])
    assert caught >= 4
    if stuck(program, ()):
        with pytest.raises(ProgramError, match=r"^program: deadlock at first contact: [^\n]*SEND"):
            check_first_contact(found, program)
    else:
        check_first_contact(found, program)
    assert bool(stuck(program, ())) == name.startswith(TWO_WAY)
    for rank, own in enumerate(program.ranks):
        sums = [index for index, item in enumerate(own) if item.kind is ActionKind.ALL_REDUCE]
        assert len(sums) == (2 if name.startswith(TWO_WAY) else 0)
        if sums:
            with pytest.raises(ProgramError, match=r"^program: deadlock at first contact: [^\n]*ALL_REDUCE"):
                check_first_contact(found, broken(program, rank, *sums), opened)
            with pytest.raises(ProgramError, match=r"^program: deadlock: |comes after the reduction of stage"):
                check_program(found, broken(program, rank, *sums))
