"""Device placement of workload files: against exhaustive search, and every message for a bad file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.planner.place import max_load, place
from mipipe.planner.place_contract import merge_above, transfer_budget
from mipipe.planner.place_instance import PlaceInstance, read_instance
from mipipe.planner.place_latency import _Arrays


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


@settings(max_examples=8, deadline=None)
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
@given(graph=graphs, seed=st.integers(0, 1000))
def test_contraction_keeps_loads_and_never_hides_the_optimum(graph, seed: int, tmp_path_factory) -> None:
    data = workload(*graph)
    instance = read_instance(write(tmp_path_factory.mktemp("place"), data))
    loads = {device: judge(data, device) for device in itertools.product(range(3), repeat=len(data["nodes"]))}
    best = min(loads.values())
    small, merged = merge_above(instance, transfer_budget(instance, best))
    device = np.random.default_rng(seed).integers(0, 3, small.num_classes)
    assert max_load(small, device) == pytest.approx(max_load(instance, device[merged]))
    still = min(max_load(small, np.array(choice)) for choice in itertools.product(range(3), repeat=small.num_classes))
    assert still == pytest.approx(best)


def test_latency_counts_transfers_and_waits(tmp_path: Path) -> None:
    """Two nodes in a row: one subgraph 2 + 3; two subgraphs pay the transfer on both sides; a split piece waits."""
    data = workload([2, 3], [(0, 1)], [4, 0])
    graph = _Arrays(read_instance(write(tmp_path, data)))
    assert graph.latency(np.array([0, 0])) == 5
    assert graph.latency(np.array([0, 4])) == 2 + 4 + 4 + 3
    assert graph.latency(np.array([0, 1])) == 2 + 4 + 4 + 3
    assert graph.latency(np.array([-1, 0])) == 10 + 4 + 3
    triple = _Arrays(read_instance(write(tmp_path, workload([1, 1, 1], [(0, 1), (1, 2)], [1, 1, 0]))))
    assert triple.latency(np.array([0, -1, 0])) == np.inf  # not contiguous: it waits for itself
    assert triple.latency(np.array([0, -1, 1])) == (1 + 1) + 5 + (1 + 1)
    assert triple.latency(np.array([1, -1, 0])) == np.inf  # subgraphs run in the order of their numbers


def test_latency_is_optimal_where_memory_forces_a_split(tmp_path: Path) -> None:
    data = workload([4, 4, 4], [(0, 1), (1, 2)], [1, 1, 0], memory=20)
    result = place(read_instance(write(tmp_path, data)), objective="latency", time_limit_s=1)
    assert result.objective == (4 + 4 + 1) + (1 + 4)
    assert len(set(result.assignment.values())) == 2
    assert result.bound == 12


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
