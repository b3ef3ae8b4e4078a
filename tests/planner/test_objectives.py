"""Objectives other than the makespan: memory within an epsilon, and the utilisation of the devices in use."""

from __future__ import annotations

from dataclasses import replace

from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.check import check_plan
from mipipe.planner.ladder.objectives import on_devices, utilisation, without_slowest
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.solve import plan

OPTIONS = PlanOptions(time_limit_s=8.0, placement="chain", use_search=False, use_baselines=False)


def _problem(kinds: tuple[str, ...]) -> PlanningProblem:
    times = {"fast": PhaseTimes(10, 10, 10), "slow": PhaseTimes(40, 40, 40)}
    groups = tuple(Group(f"g{n}", {kind: times[kind] for kind in set(kinds)}, resident_bytes=300, saved_fw_bytes=1)
                   for n in range(6))
    edges = tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(5))
    devices = tuple(Device(f"d{n}", kind, 650) for n, kind in enumerate(kinds))
    return PlanningProblem("six", groups, edges, Topology(devices, Link(1), Link(1), {"0->2": Link(5)}), 8)


def test_a_device_that_does_not_shorten_the_step_is_given_back() -> None:
    """Six equal groups: a chain of four devices is as long as one of three, where all have two groups each."""
    problem = _problem(("fast",) * 4)
    usual, found = plan(problem, OPTIONS), plan(problem, replace(OPTIONS, objective="utilisation"))
    assert usual.plan is not None and found.plan is not None and found.makespan_ns is not None
    check_plan(found.plan)
    assert found.plan.problem == problem
    assert found.makespan_ns <= 1.05 * usual.makespan_ns  # type: ignore[operator]
    assert utilisation(found.plan)[0] >= utilisation(usual.plan)[0]
    assert found.plan.provenance["devices_in_use"] == 3
    assert found.plan.provenance["utilisation"] == round(6 * 30 * 8 / (3 * found.makespan_ns), 4)


def test_every_device_stays_where_the_step_needs_it() -> None:
    found = plan(_problem(("fast",) * 3), replace(OPTIONS, objective="utilisation"))
    assert found.plan is not None and found.plan.provenance["devices_in_use"] == 3


def test_the_slowest_device_goes_first_and_links_keep_their_ends() -> None:
    problem = _problem(("fast", "slow", "fast"))
    kept = without_slowest(problem, [0, 1, 2])
    assert kept == [0, 2]
    smaller = on_devices(problem, kept)
    assert smaller.topology.overrides == {"0->1": Link(5)} and smaller.num_ranks == 2
