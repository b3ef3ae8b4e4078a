"""Placements beyond the known shapes: the placement MIP inside a solve, its bounds, and forwards that run again."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.actions import Stream
from mipipe.planner.check import check_plan
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder import placement_rungs as placing
from mipipe.planner.milp.placement import modes
from mipipe.planner.milp.placement import shares as placement
from mipipe.planner.milp.placement.routes import deal, to_placement, to_shares
from mipipe.planner.options import Objective, PlanOptions
from mipipe.planner.placements.feasible import why_infeasible
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.placements.shortages import shortage
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import Termination, plan

sys.path.insert(0, str(Path(__file__).parent))
from planner_problems import multimodal_problem


def _two_kinds() -> PlanningProblem:
    """Six equal groups on a fast device and a slow one, which is half as fast."""
    times = {"fast": PhaseTimes(10, 10, 10), "slow": PhaseTimes(20, 20, 20)}
    groups = tuple(Group(f"g{n}", times, resident_bytes=10, gradient_bytes=1, saved_fw_bytes=1) for n in range(6))
    edges = tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(5))
    devices = (Device("a", "fast", 1000), Device("b", "slow", 1000))
    return PlanningProblem("kinds", groups, edges, Topology(devices, Link(), Link()), 8)


def test_the_mip_gives_the_fast_device_twice_the_work_and_bounds_the_step() -> None:
    problem = _two_kinds()
    best = placement.propose_by_mip(problem, time_limit_s=2.0, seed=0, count=1)[0].placement
    held = {rank: sum(len(stage.groups) for stage in best.stages if stage.ranks == (rank,)) for rank in (0, 1)}
    assert held == {0: 4, 1: 2}
    result = plan(problem, PlanOptions(time_limit_s=4.0, use_search=False))
    assert result.plan is not None and result.bound_ns is not None and result.makespan_ns is not None
    assert 8 * 4 * 30 <= result.bound_ns <= result.makespan_ns
    rows = {row["rung"] for row in result.ablation}
    assert "placement MIP bound" in rows


@pytest.mark.parametrize(("memory", "slow", "latency_ns", "best"), [
    ((1000, 15, 1000), 20, 0, 2 * 30),  # a device that holds no group, and what fits the known shapes is slow
    ((1000, 1000, 1000), 1000, 0, 2 * 30),  # a device so slow that nothing is worth giving to it
    ((25, 25, 1000), 20, 10_000, 2 * 60),  # links so slow that one device does all
])
def test_devices_may_hold_nothing(memory: tuple[int, ...], slow: int, latency_ns: int, best: int) -> None:
    """The placement MIP's proof counts placements in which some devices idle; groups of one replica each."""
    times = {"fast": PhaseTimes(10, 10, 10), "slow": PhaseTimes(slow, slow, slow)}
    count = 1 if latency_ns == 0 else 2
    groups = tuple(Group(f"g{n}", times, resident_bytes=20, single=True) for n in range(count))
    edges = tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(count - 1))
    kinds = ("slow", "slow", "fast")
    devices = tuple(Device(f"d{n}", kind, size) for n, (kind, size) in enumerate(zip(kinds, memory, strict=True)))
    problem = PlanningProblem("idle", groups, edges, Topology(devices, Link(latency_ns), Link(latency_ns)), 2)
    result = plan(problem, PlanOptions(time_limit_s=10.0, threads=1, use_search=False))
    assert (result.makespan_ns, result.bound_ns, result.termination) == (best, best, Termination.OPTIMAL)


@pytest.mark.parametrize("objective", ["makespan", "period"])
def test_where_no_shape_fits_every_objective_asks_the_mip(objective: Objective) -> None:
    """Only the last device holds a group; without the MIP and search no plan is found, which proves nothing."""
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(10, 10, 10)}, resident_bytes=20, saved_fw_bytes=1) for n in range(2))
    devices = tuple(Device(f"d{n}", "d", size) for n, size in enumerate((15, 15, 1000)))
    problem = PlanningProblem("small", groups, (GroupEdge(0, (1,), 1, 1, "v"),), Topology(devices, Link(), Link()), 2)
    options = PlanOptions(time_limit_s=10.0, threads=1, use_search=False, objective=objective)  # it ends when proven
    result = plan(problem, options)
    assert result.makespan_ns == 2 * 60, result.reason
    without = plan(problem, PlanOptions(time_limit_s=1.0, threads=1, objective=objective, use_milp=False,
                                        use_search=False))
    assert without.plan is None and "a memory of 22B would do" in without.reason  # for the known shapes


@pytest.mark.parametrize("limit", [None, 1000])
def test_what_no_argument_shows_is_not_claimed(limit: int | None) -> None:
    """Where one microbatch fits, nothing says that more memory is needed, or how much."""
    problem = _two_kinds().replace(limits=Limits(activation_bytes=limit))
    reason = why_infeasible(problem, "chain")
    assert reason.startswith("at placement chain") and "needed" not in reason
    assert reason.endswith("more memory may do; or use more devices")  # no device has room for what the limit allows


def test_the_workspaces_of_two_streams_at_once_are_counted() -> None:
    """A dispatch's W and the next forward overlap, each with a workspace: no list sees that, the plan's check did."""
    groups = (Group("dispatch", {"d": PhaseTimes(2, 100, 1)}, stream=Stream.COLLECTIVE, saved_fi_bytes=3,
                    workspace_bytes=1),
              Group("experts", {"d": PhaseTimes(2, 15, 0)}, workspace_bytes=1))
    topology = Topology((Device("d0", "d", 1 << 50),), Link(), Link())
    problem = PlanningProblem("streams", groups, (GroupEdge(0, (1,), 0, 0, "v"),), topology, 2)
    for size in (4, 5):
        result = plan(problem.replace(limits=Limits(activation_bytes=size)), PlanOptions(time_limit_s=0.5, threads=1))
        assert result.plan is not None or (size == 4 and "raise the activation limit to 5B" in result.reason)
    least = plan(problem, PlanOptions(time_limit_s=0.5, threads=1, objective="memory"))
    assert least.plan is not None
    check_plan(least.plan)


def test_a_placement_and_its_shares_are_inverse() -> None:
    problem = multimodal_problem()
    units = placement.units_of(problem).groups
    for found in propose_shapes(problem):
        shares = to_shares(problem, units, found)
        again = to_placement(problem, units, shares)
        assert to_shares(problem, units, again) == shares


def test_the_modes_are_the_best_of_all_choices() -> None:
    """Against enumeration: the least load such that one microbatch at a time fits."""
    problem = multimodal_problem(activation_bytes=60)
    base = next(found for found in propose_shapes(problem, "interleaved"))
    assert shortage(problem, base) is not None
    chosen = modes.choose(problem, base, pressure=0.0, time_limit_s=5.0, seed=0)
    assert chosen is not None and any(stage.recompute for stage in chosen.placement.stages)
    assert _largest_load(problem, chosen.placement) == min(
        _largest_load(problem, variant) for variant in _variants(base) if _one_fits(problem, variant))


def test_no_modes_where_a_full_device_has_no_stage_that_may_run_again() -> None:
    """Its row has no variable: no error of the modelling library, but no answer."""
    times = {"device": PhaseTimes(10, 10, 10)}
    groups = tuple(Group(f"g{n}", times, saved_fw_bytes=50, recompute_bytes=(5, None)[n]) for n in range(2))
    devices = (Device("a", "device", 1000), Device("b", "device", 1000))
    problem = PlanningProblem("kept", groups, (GroupEdge(0, (1,), 0, 0, "v"),), Topology(devices, Link(), Link()), 4,
                              Limits(activation_bytes=40))
    base = next(found for found in propose_shapes(problem, "chain"))
    assert modes.choose(problem, base, pressure=1.0, time_limit_s=5.0, seed=0) is None
    assert modes.choose(problem.replace(limits=Limits(activation_bytes=60)), base, pressure=1.0, time_limit_s=5.0,
                        seed=0) is not None
    result = plan(problem, PlanOptions(time_limit_s=1.0, recompute=True))
    assert result.plan is None and result.termination is Termination.INFEASIBLE


def _variants(base):
    for again in product((False, True), repeat=len(base.stages)):
        yield replace(base, stages=tuple(replace(stage, recompute=flag)
                                         for stage, flag in zip(base.stages, again, strict=True)))


def _largest_load(problem, found) -> int:
    stages = view(problem, found)
    load = [0] * problem.num_ranks
    for s, stage in enumerate(found.stages):
        load[stage.ranks[0]] += (1 + stage.recompute) * stages.f_ns[s][0] + stages.i_ns[s][0] + stages.w_ns[s][0]
    return max(load)


def _one_fits(problem, found) -> bool:
    stages = view(problem, found)
    for rank in range(problem.num_ranks):
        here = [s for s, stage in enumerate(found.stages) if stage.ranks == (rank,)]
        held = sum(stages.kept[s][0] if found.stages[s].recompute else stages.saved_fi[s][0] + stages.saved_fw[s][0]
                   for s in here)
        if held + max(stages.saved_iw[s][0] + stages.workspace[s] for s in here) > problem.limits.activation_bytes:
            return False
    return True


def test_forwards_run_again_only_where_memory_pays_for_them() -> None:
    roomy, tight = (multimodal_problem(microbatches=8, activation_bytes=size) for size in (5000, 110))
    options = PlanOptions(time_limit_s=2.0, placement="chain", use_baselines=False, use_search=False)
    assert not any(stage.recompute for stage in plan(roomy, options).plan.placement.stages)  # type: ignore[union-attr]
    with_modes, without = plan(tight, options), plan(tight, replace(options, recompute=False))
    assert with_modes.plan is not None and any(stage.recompute for stage in with_modes.plan.placement.stages)
    assert without.makespan_ns is None or with_modes.makespan_ns < without.makespan_ns  # type: ignore[operator]
    check_plan(with_modes.plan)
    assert "mode MIP" in {row["rung"] for row in with_modes.ablation}


@pytest.mark.parametrize("recompute", [True, False])
def test_the_placement_bound_holds_with_replicas_and_modes(recompute: bool) -> None:
    problem = multimodal_problem(microbatches=4, layers=3, encoder_layers=1, ranks=2, activation_bytes=120)
    if not recompute:
        problem = placing.without_recomputation(problem)
    bound, _ = placement.free_bound(problem, time_limit_s=5.0, seed=0)
    result = plan(problem, PlanOptions(time_limit_s=0.7, recompute=recompute, use_search=False))
    assert bound is not None and result.makespan_ns is not None and bound <= result.makespan_ns


def test_fewer_microbatches_than_devices_that_share_them_are_dealt_all_the_same() -> None:
    """No share was half a microbatch, and the solve ended in a division by none."""
    assert deal([0.25] * 4, 1, None) == (0,)
    assert deal([0.3, 0.4, 0.3], 1, [2]) == (1,)
    assert sorted(deal([0.2] * 5, 2, None)) == [0, 1]


def _tight(copies: str, activations: str, last: str, layers: int) -> PlanningProblem:
    return uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=layers, last=last, copies=copies,
                           activations=activations)


@pytest.mark.parametrize(("copies", "activations", "last", "layers"), [("2", "1.5", "1", 4), ("2", "1", "2", 8)])
def test_plain_chains_whose_even_cuts_do_not_fit_are_placed_by_the_mip(copies: str, activations: str, last: str,
                                                                      layers: int) -> None:
    """Even cuts put too many activations on one device; what fits with one copy fits with room for two."""
    result = plan(_tight(copies, activations, last, layers), PlanOptions(time_limit_s=1.5, threads=1, gap=1.0))
    assert result.plan is not None and result.termination is not Termination.INFEASIBLE


def test_weights_that_no_run_of_groups_packs() -> None:
    """Weights of 6, 5, 4 and 5 bytes on two devices of 10: the first goes with the third."""
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(3, 3, 3)}, resident_bytes=size)
                   for n, size in enumerate((6, 5, 4, 5)))
    problem = PlanningProblem("packed", groups, tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(3)),
                              Topology.uniform(2, kind="d", memory_bytes=10), 2)
    result = plan(problem, PlanOptions(time_limit_s=4.0, threads=1))
    assert result.plan is not None
    full = problem.replace(groups=tuple(replace(group, resident_bytes=6) for group in groups))
    result = plan(full, PlanOptions(time_limit_s=4.0, threads=1))
    assert result.termination is Termination.INFEASIBLE and "lack even at placement" in result.reason


def test_a_verdict_without_a_proof_speaks_of_what_was_tried() -> None:
    """Of a shape that is asked for only its own cuts are looked at, and not all where these are many."""
    result = plan(_tight("2", "1.2", "1", 16), PlanOptions(time_limit_s=4.0, placement="chain"))
    assert result.plan is None and "lacks least of those tried" in result.reason
