"""``mipipe train --elastic``: what it refuses, and the plan it makes for the devices that are left."""

import pytest

from mipipe.cli.printing.output import stdout
from mipipe.cli.train import replan_devices
from mipipe.graphs.errors import InfeasibleError
from mipipe.planner.check.plan import check_plan
from mipipe.planner.options import PlanOptions, options_of
from mipipe.planner.problems.uniform import uniform_problem


def test_a_plan_for_fewer_devices(capsys) -> None:
    """The same groups on two of three devices, as the lost plan was made: complete and within its memory cap; one is
    too few, and the error says so. A shape that they cannot have (here two copies of every
    layer, in the room of one) gives way to any."""
    problem = uniform_problem(ranks=3, microbatches=4, f=1, i=1, w=1, layers=6, copies=2)
    options = PlanOptions(time_limit_s=2.0, placement="chain", objective="memory", seed=3)
    again = replan_devices(problem.replace(topology=problem.topology.without({1})), options)
    assert again.problem.num_ranks == 2
    assert again.problem.groups == problem.groups and again.problem.limits == problem.limits
    assert options_of(again) == options and again.placement.name == "chain"
    check_plan(again)
    with pytest.raises(InfeasibleError, match="no plan was found: rank 0"):
        replan_devices(problem.replace(topology=problem.topology.without({0, 2})), PlanOptions(time_limit_s=0.7))
    single = replan_devices(uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, copies=1),
                            PlanOptions(time_limit_s=0.7, placement="two-way"))
    assert options_of(single).placement == "free"
    assert "planning with any placement" in capsys.readouterr().err


def test_options_that_do_not_go_with_a_supervisor(mipipe) -> None:
    """It watches the ranks of one host."""
    ended = mipipe("train", "--plan", "p.json", "--graph", "g.json", "--config", "c.yaml", "--elastic", "--torchrun",
                   "--nnodes 2")
    assert ended.code == 1 and "--elastic watches all ranks of one host" in ended.error


def test_names_of_emoji_stay_names(mipipe, capsys) -> None:
    """In paths and in help: the terminal library knows some words between colons."""
    stdout().print("metrics: a:factory:b [bold].jsonl")
    assert capsys.readouterr().out == "metrics: a:factory:b [bold].jsonl\n"
    assert "package.module:factory;" in " ".join(mipipe("train", "--help").stdout.replace("\u2502", " ").split())
