"""Device placement of workload files: against exhaustive search, and every message for a bad file."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.planner.devices import cooling
from mipipe.planner.devices import kernels as place_kernels
from mipipe.planner.devices.from_problem import instance_of
from mipipe.planner.devices.instances.contract import merge_above, parts, transfer_budget
from mipipe.planner.devices.instances.instance import PlaceInstance, read_instance
from mipipe.planner.devices.place import place
from mipipe.planner.devices.starts import max_load
from mipipe.planner.devices.workers import TimedJob, run_jobs
from mipipe.planner.milp import device_placement
from mipipe.planner.milp.highs import SolverStatus
from mipipe.planner.problems.uniform import uniform_problem


def workload(times: list[int], edges: list[tuple[int, int]], costs: list[int], *, accelerators: int = 2, cpus: int = 1,
             memory: float = 1e9, colours: dict[int, int] | None = None) -> dict:
    return {"maxFPGAs": accelerators, "maxCPUs": cpus, "maxSizePerFPGA": memory,
            "nodes": [{"id": n, "supportedOnFpga": 1, "cpuLatency": 5 * t, "fpgaLatency": t, "isBackwardNode": 0,
                       "size": 10, **({"colorClass": colours[n]} if colours and n in colours else {})}
                      for n, t in enumerate(times)],
            "edges": [{"sourceId": a, "destId": b, "cost": costs[a]} for a, b in edges]}


def write(folder: Path, data: object) -> Path:
    path = folder / "case.json"
    path.write_text(json.dumps(data))
    return path


def judge(data: dict, device: tuple[int, ...]) -> float:
    """The largest load, straight from the problem statement."""
    accelerators = data["maxFPGAs"]
    loads = np.zeros(accelerators + data["maxCPUs"])
    cost = {edge["sourceId"]: edge["cost"] for edge in data["edges"]}
    for node in data["nodes"]:
        d = device[node["id"]]
        loads[d] += node["fpgaLatency"] if d < accelerators else node["cpuLatency"]
        elsewhere = {device[edge["destId"]] for edge in data["edges"] if edge["sourceId"] == node["id"]} - {d}
        for other in [*elsewhere, d] if elsewhere else []:
            if other < accelerators:
                loads[other] += cost[node["id"]]
    return float(loads.max())


def convex(data: dict, device: tuple[int, ...]) -> bool:
    count = len(data["nodes"])
    reach = np.zeros((count, count), dtype=bool)
    for edge in data["edges"]:
        reach[edge["sourceId"], edge["destId"]] = True
    for k in range(count):
        reach |= np.outer(reach[:, k], reach[k])
    return not any(device[a] == device[c] != device[b] and reach[a, b] and reach[b, c]
                   for a, b, c in itertools.permutations(range(count), 3))


graphs = st.integers(4, 6).flatmap(lambda n: st.tuples(
    st.lists(st.integers(1, 9), min_size=n, max_size=n),
    st.lists(st.sampled_from([(a, b) for a in range(n) for b in range(a + 1, n)]), min_size=1, max_size=2 * n,
             unique=True),
    st.lists(st.integers(0, 6), min_size=n, max_size=n)))


@settings(max_examples=5, deadline=None)
@given(graph=graphs, contiguous=st.booleans())
def test_throughput_is_optimal_on_tiny_graphs(graph, contiguous: bool, tmp_path_factory) -> None:
    data = workload(*graph)
    instance = read_instance(write(tmp_path_factory.mktemp("place"), data))
    devices = data["maxFPGAs"] + data["maxCPUs"]
    best = min(judge(data, device) for device in itertools.product(range(devices), repeat=len(data["nodes"]))
               if not contiguous or convex(data, device))
    result = place(instance, time_limit_s=3, contiguous=contiguous)
    chosen = tuple({"acc0": 0, "acc1": 1, "cpu0": 2}[result.assignment[str(n)]] for n in range(len(data["nodes"])))
    assert judge(data, chosen) == pytest.approx(result.objective)
    assert result.objective == pytest.approx(best)
    assert result.bound <= best * (1 + 1e-9)
    assert not contiguous or convex(data, chosen)


@settings(max_examples=10, deadline=None)
@given(graph=graphs, cpus=st.integers(0, 2), seed=st.integers(0, 1000))
def test_contraction_keeps_loads_and_never_hides_the_optimum(graph, cpus: int, seed: int, tmp_path_factory) -> None:
    data = workload(*graph, cpus=cpus)
    instance = read_instance(write(tmp_path_factory.mktemp("place"), data))
    devices = range(2 + cpus)
    best = min(judge(data, device) for device in itertools.product(devices, repeat=len(data["nodes"])))
    small, merged = merge_above(instance, transfer_budget(instance, best), best)
    device = np.random.default_rng(seed).integers(0, 2 + cpus, small.num_classes)
    assert max_load(small, device) == pytest.approx(max_load(instance, device[merged]))
    still = min(max_load(small, np.array(choice)) for choice in itertools.product(devices, repeat=small.num_classes))
    assert still == pytest.approx(best)


def test_a_value_between_two_cores_is_free(tmp_path: Path) -> None:
    """Accelerators too slow to help: the two nodes go to two cores although their value is dearer than any budget."""
    data = workload([20, 20], [(0, 1)], [1000, 0], accelerators=1, cpus=2)
    for node in data["nodes"]:
        node["cpuLatency"] = 15
    result = place(read_instance(write(tmp_path, data)), time_limit_s=2)
    assert result.objective == 15 and result.gap == 0


@settings(max_examples=8, deadline=None)
@given(graph=graphs, cpus=st.integers(0, 2), seed=st.integers(0, 1000))
def test_parts_hold_the_optimum_and_nothing_better(graph, cpus: int, seed: int, tmp_path_factory) -> None:
    data = workload(*graph, cpus=cpus)
    instance = read_instance(write(tmp_path_factory.mktemp("place"), data))
    best = min(judge(data, device) for device in itertools.product(range(2 + cpus), repeat=len(data["nodes"])))
    found = []
    for part in parts(instance, best * (1 + 1e-4)):
        device, _ = device_placement.solve_part(part, best * (1 + 1e-4), time_limit_s=10, seed=seed)
        if device is not None:
            found.append(max_load(instance, device[part.merged]))
    assert min(found) == pytest.approx(best)
    for part in parts(instance, best * (1 - 1e-4)):
        outcome = device_placement.solve_part(part, best * (1 - 1e-4), time_limit_s=10, seed=seed)[1]
        assert outcome.termination is SolverStatus.INFEASIBLE


def test_a_dear_value_is_cut_once(tmp_path: Path) -> None:
    """Budget 5, values of 5: at most one may be cut, towards the core; the optimum does."""
    data = workload([10, 1, 10], [(0, 1), (1, 2)], [5, 5, 0], accelerators=1)
    data["nodes"][0]["cpuLatency"] = 16
    instance = read_instance(write(tmp_path, data))
    assert transfer_budget(instance, 16.0) == pytest.approx(5.0)
    assert [(part.instance.num_classes, part.dear, part.on_core) for part in parts(instance, 16.0)] == [
        (1, (), ()), (1, (), ()), (3, (0,), (0,)), (3, (0,), (0,))]
    result = place(instance, time_limit_s=2)
    assert result.objective == 16 and result.gap == 0
    assert result.assignment == {"0": "cpu0", "1": "acc0", "2": "acc0"}


@pytest.mark.slow
def test_layer_graphs_are_annealed_as_long_as_time_allows(tmp_path: Path, monkeypatch) -> None:
    """Too many layers to prove: after short runs each thread cools once over what time is left, then from the best."""
    steps: list[int] = []
    anneal = place_kernels.anneal_throughput

    def counted(workload, device, contiguous, count, *rest):
        steps.append(count)
        return anneal(workload, device, contiguous, count, *rest)

    monkeypatch.setattr(place_kernels, "anneal_throughput", counted)
    rng = np.random.default_rng(0)
    times = rng.integers(1, 1000, 200).tolist()
    data = workload(times, list(itertools.pairwise(range(200))), [1] * 200, accelerators=6)
    instance = read_instance(write(tmp_path, data))
    result = place(instance, time_limit_s=6)
    assert sum(count >= cooling.PROBE * 200 for count in steps) >= 2  # a probe and what it says
    devices = [*(f"acc{d}" for d in range(6)), "cpu0"]
    assert result.objective == judge(data, tuple(devices.index(result.assignment[str(n)]) for n in range(200)))
    assert result.objective <= 1.01 * result.bound


def test_captured_problems_are_placed_by_the_same_code() -> None:
    """Four equal stages of a chain on two devices: loads and transfers follow from the problem."""
    problem = uniform_problem(ranks=2, microbatches=4, f=2, i=3, w=1, comm=1)
    result = place(instance_of(problem), time_limit_s=2)
    assert result.assignment.keys() == {group.name for group in problem.groups}
    assert len(set(result.assignment.values())) == 2
    work = sum(group.times["device"].total_ns for group in problem.groups) / 2
    crossed = sum(problem.topology.transfer_ns(0, 1, size) for size in (problem.edges[0].num_bytes,
                                                                      problem.edges[0].grad_bytes or 0))
    assert result.objective == pytest.approx((work + crossed) / 1e6) and result.gap == 0


def test_jobs_end_at_the_deadline_and_results_are_taken() -> None:
    taken: list[int] = []

    def job(number: int) -> TimedJob:
        def work(stop: np.ndarray) -> Callable[[], None]:
            while number and not stop[0]:
                time.sleep(0.01)
            return lambda: taken.append(number)
        return work

    began = time.monotonic()
    run_jobs((job(number) for number in itertools.count()), threads=2, seconds=0.2, enough=lambda: False)
    assert 0.15 < time.monotonic() - began < 2
    assert sorted(taken) == [0, 1, 2]
    run_jobs((job(number) for number in itertools.count()), threads=1, seconds=60, enough=lambda: len(taken) > 3)
    assert len(taken) == 4


def test_colour_classes_stay_together(tmp_path: Path) -> None:
    data = workload([5, 1, 5, 1], [(0, 1), (2, 3)], [0, 0, 0, 0], colours={0: 7, 2: 7}, cpus=0)
    instance: PlaceInstance = read_instance(write(tmp_path, data))
    result = place(instance, time_limit_s=2)
    assert instance.num_classes == 3
    assert result.assignment["0"] == result.assignment["2"]
    assert result.objective == 10 and result.gap == 0


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.pop("nodes"), "nodes: Field required"),
    (lambda d: d["nodes"].append(dict(d["nodes"][0])), "node id 0 appears twice"),
    (lambda d: d["edges"].append({"sourceId": 0, "destId": 9, "cost": 1}), "there is no node 9"),
    (lambda d: d["edges"].append({"sourceId": 1, "destId": 0, "cost": 1}), "has a cycle: 0 -> 1|has a cycle: 1 -> 0"),
    (lambda d: d["edges"].append({"sourceId": 0, "destId": 2, "cost": 5}), "out-edges of cost 1.0 and 5.0"),
    (lambda d: d["nodes"][0].update(cpuLatency=-1), r"nodes\[0\].cpuLatency"),
    (lambda d: d["nodes"][0].update(fpgaLatency="fast"), r"nodes\[0\].fpgaLatency"),
])
def test_malformed_files_say_why(tmp_path: Path, change, message: str) -> None:
    data = workload([1, 2, 3], [(0, 1)], [1, 1, 1])
    change(data)
    with pytest.raises(InputError, match=message) as caught:
        read_instance(write(tmp_path, data))
    assert "case.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"accelerators": 0, "cpus": 0}, "no devices"),
    ({"cpus": 0, "memory": 12.0}, "maxSizePerFPGA must be at least 15"),
])
def test_infeasible_instances_say_what_would_do(tmp_path: Path, change: dict, message: str) -> None:
    instance = read_instance(write(tmp_path, workload([1, 2, 3], [(0, 1)], [1, 1, 1], **change)))
    with pytest.raises(InfeasibleError, match=message):
        place(instance, time_limit_s=1)
