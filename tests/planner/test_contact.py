"""Deadlock at first contact: the checker against a simulation of hosts that stop in the first use of a communicator."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from mipipe.graphs.errors import ProgramError
from mipipe.planner.actions import ActionKind
from mipipe.planner.check import check_first_contact, check_program
from mipipe.planner.compare import baseline_rows
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.opening import Communicator, openings
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.program import Program
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from planner_random import random_problem

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


@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (8, 16)])
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
def test_plans_of_random_problems(seed):
    """What the planner makes: chains and branches, uneven groups, interleaved stages."""
    problem, _ = random_problem(Random(seed))
    found = plan(problem.replace(num_microbatches=4), PlanOptions(time_limit_s=2, use_milp=False)).plan
    assert found is not None
    both(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, *range(5, 60)])
def test_plans_of_many_random_problems(seed):
    test_plans_of_random_problems(seed)


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
