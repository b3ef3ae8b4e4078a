"""Where no known shape fits, a placement that does is looked for before a solve says that it found no plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mipipe.graphs.topology import Topology
from mipipe.planner.check import check_plan
from mipipe.planner.ladder import exactly, fitting, placement_rungs
from mipipe.planner.ladder.admission import admit_placement
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.placements.shortages import lacking_bytes, shortage
from mipipe.planner.plan import Plan
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.solve import plan


def chain(groups: list[Group], memory: list[int], *, microbatches: int = 2, activations: int | None = None,
          colocate: tuple[tuple[int, ...], ...] = ()) -> PlanningProblem:
    topology = Topology.uniform(len(memory), latency_ns=1, kind="a")
    devices = tuple(replace(device, memory_bytes=size) for device, size in zip(topology.devices, memory, strict=True))
    edges = tuple(GroupEdge(n, (n + 1,), value=f"v{n}") for n in range(len(groups) - 1))
    return PlanningProblem("tight", tuple(groups), edges, replace(topology, devices=devices), microbatches,
                           Limits(None, activations), colocate)


def group(name: str, resident: int, saved: tuple[int, int, int], again: int | None = None) -> Group:
    fi, fw, iw = saved
    return Group(name, {"a": PhaseTimes(4, 4, 4)}, resident_bytes=resident, saved_fi_bytes=fi, saved_fw_bytes=fw,
                 saved_iw_bytes=iw, recompute_bytes=again, single=True)


TOGETHER = chain([group("g0", 16, (4, 5, 4)), group("g1", 4, (8, 1, 0)), group("g2", 19, (4, 7, 0))], [44, 60, 500],
                 colocate=((0, 2),))
"""All groups on one rank, as the first and the last belong together: on the third alone they fit."""

AGAIN = chain([group("g0", 20, (6, 7, 3), 2), group("g1", 13, (1, 4, 0), 2), group("g2", 6, (6, 6, 0), 0),
               group("g3", 13, (2, 8, 3), 2)], [133, 133], activations=20)
"""Cut in two, ranks hold 18 and 25 bytes of 20: some of a rank's groups run F again, and others do not."""


@pytest.mark.parametrize("problem", [TOGETHER, AGAIN], ids=["together", "again"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_placement_that_fits_is_found(problem: PlanningProblem, seed: int) -> None:
    """Of no shape, in whatever order moves are drawn; with a list for it."""
    run = Run(problem, PlanOptions(time_limit_s=60, threads=1, seed=seed, recompute=True))
    assert all(fitting.lacking(run, shape) for shape in propose_shapes(problem, "free"))
    fitting.fit(run)
    found, = run.candidates
    assert found.best is not None and found.proposer == (fitting.PROPOSER,)
    check_plan(Plan("", problem, found.placement, found.best.schedule, found.makespan_ns))


def test_a_solve_looks_for_it_unless_nothing_fits_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fitting, "fit", lambda run: asked.append(run.problem.name))
    monkeypatch.setattr(exactly, "rescue", lambda run: None)
    monkeypatch.setattr(placement_rungs, "by_mip", lambda run, admit: None)
    tight = replace(TOGETHER, name="nowhere", topology=Topology.uniform(3, latency_ns=1, kind="a", memory_bytes=30))
    for problem, said in ((TOGETHER, "of those tried"), (tight, "groups g0, g2, which stay together, fit no device")):
        found = plan(problem, PlanOptions(time_limit_s=20, threads=1, recompute=True))
        assert found.plan is None and said in found.reason
    assert asked == [TOGETHER.name]


@pytest.mark.parametrize("options", [PlanOptions(time_limit_s=1000, placement="chain"),
                                     PlanOptions(time_limit_s=1000, use_search=False)])
def test_nothing_is_looked_for_at_a_shape_that_was_asked_for_or_without_search(options: PlanOptions) -> None:
    run = Run(TOGETHER, options)
    fitting.fit(run)
    assert not run.candidates


def test_bytes_lacking_are_those_of_every_rank() -> None:
    for shape in propose_shapes(AGAIN, "free"):
        lack, worst = lacking_bytes(AGAIN, shape), shortage(AGAIN, shape)
        assert worst is not None and lack[worst.rank] == max(lack) == worst.lacking_bytes > 0


def test_a_small_problem_that_no_list_fits_is_asked_of_the_exact_model() -> None:
    """A backward that begins before all is saved: the second group's input gradient frees what the first one's needs.
    No group may have two replicas, so that the loop takes the model's bound as one over all placements."""
    early = chain([group("g0", 5, (1, 0, 0)), group("g1", 1, (3, 0, 1)), group("g2", 1, (2, 0, 0))], [7, 7],
                  microbatches=1)
    options = PlanOptions(time_limit_s=2.5, threads=1)
    found = plan(early, options)
    assert found.plan is not None and found.how.placement == ("exact MIP",), found.reason
    check_plan(found.plan)
    assert found.how.bound == "exact MIP" and found.makespan_ns == found.bound_ns
    assert plan(early, replace(options, use_milp=False)).plan is None


def test_where_values_in_flight_alone_take_the_memory_one_microbatch_follows_the_other() -> None:
    """No saved tensor holds a forward back; with the next one's value on its way a gradient has no room."""
    groups = tuple(Group(f"g{n}", {"a": PhaseTimes(2, 9, None)}, single=True) for n in range(2))
    problem = PlanningProblem("in flight", groups, (GroupEdge(0, (1,), 5, 2, "v"),),
                              Topology.uniform(2, latency_ns=1, kind="a"), 3, Limits(None, 8))
    run = Run(problem, PlanOptions(time_limit_s=60, threads=1))
    found = admit_placement(run, next(propose_shapes(problem, "chain")))
    assert found is not None and found.makespan_ns == 3 * (2 + 1 + 2 + 9 + 1 + 9)
    check_plan(Plan("", problem, found.placement, found.best.schedule, found.makespan_ns))
    two_way = problem.replace(groups=tuple(replace(one, single=False) for one in groups), num_microbatches=4)
    mirrored = admit_placement(run := Run(two_way, run.options), next(propose_shapes(two_way, "two-way")))
    assert mirrored is None and not run.candidates  # each image would wait for the other's next microbatch
