"""Where device placement starts: cuts of linear orders, pieces, bounds without a solver; and that limits hold cold."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.planner.devices import kernels, linear, throughput
from mipipe.planner.devices.coarse import LARGEST, PIECES, coarsen
from mipipe.planner.devices.compiled import compile_kernels
from mipipe.planner.devices.instances.contract import average_bound
from mipipe.planner.devices.instances.instance import PlaceInstance, WorkloadNode, contract_classes, read_instance
from mipipe.planner.devices.linear import best_intervals, cut_order, interval_loads, topological_orders
from mipipe.planner.devices.place import check_feasible, place
from mipipe.planner.devices.result import PlaceResult
from mipipe.planner.devices.starts import fits, max_load
from mipipe.planner.milp import device_placement

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def random_instance(seed: int, classes: int, *, training: bool = True, devices: int = 3, cores: int = 1,
                    memory: float = 1e9) -> PlaceInstance:
    """A random graph, mostly a chain with skips; with training every second class has a backward node, and some classes
    have only one."""
    rng = np.random.default_rng(seed)
    forward = [[int(b) for b in rng.choice(range(max(0, n - 4), n), min(n, 1 + int(rng.random() < 0.3)), replace=False)]
               for n in range(classes)]
    nodes = [WorkloadNode(n, float(rng.integers(1, 10)), float(rng.integers(5, 60)), float(rng.integers(1, 10)), n)
             for n in range(classes)]
    values = [(n, [m for m in range(classes) if n in forward[m]], float(rng.integers(0, 5))) for n in range(classes)]
    if training:
        back = {n: classes + place for place, n in enumerate(reversed(range(classes))) if n % 2 or rng.random() < 0.8}
        for n, key in back.items():
            colour: object = n if rng.random() < 0.9 else ("alone", n)
            nodes.append(WorkloadNode(key, float(rng.integers(1, 10)), 60.0, 2.0, colour, backward=True))
        nodes = [*nodes[:classes], *sorted(nodes[classes:], key=lambda node: node.id)]
        position = {node.id: place for place, node in enumerate(nodes)}
        for n, key in back.items():
            values[n] = (n, [*values[n][1], position[key]], values[n][2])
            onward = [position[back[b]] for b in forward[n] if b in back]
            values.append((position[key], onward, float(rng.integers(0, 5))))
    return contract_classes("random", (devices, cores, memory), nodes, [value for value in values if value[1]])


instances = st.builds(random_instance, st.integers(0, 10_000), st.integers(2, 9), training=st.booleans(),
                      devices=st.integers(1, 3), cores=st.integers(0, 2), memory=st.sampled_from([25.0, 1e9]))


def is_contiguous(instance: PlaceInstance, device: np.ndarray) -> bool:
    workload = kernels.workload_of(instance)
    return all(kernels.is_contiguous(workload, d, device) for d in range(instance.num_devices))


def assigned(instance: PlaceInstance, result: PlaceResult) -> np.ndarray:
    """The device of every class in a result, by the labels of its nodes."""
    labels = [instance.label(d) for d in range(instance.num_devices)]
    device = np.zeros(instance.num_classes, dtype=np.int64)
    for node, c in zip(instance.node_ids, instance.node_class, strict=True):
        device[c] = labels.index(result.assignment[str(node)])
    return device


@settings(max_examples=40, deadline=None)
@given(instance=instances, seed=st.integers(0, 100))
def test_loads_without_kernels_are_the_kernels_loads(instance: PlaceInstance, seed: int) -> None:
    device = np.random.default_rng(seed).integers(0, instance.num_devices, instance.num_classes)
    assert max_load(instance, device) == pytest.approx(kernels.all_loads(kernels.workload_of(instance), device).max())


@settings(max_examples=40, deadline=None)
@given(instance=instances)
def test_every_interval_costs_what_the_kernels_say(instance: PlaceInstance) -> None:
    """A third device takes what the interval leaves, so that both ends of every transfer are paid somewhere."""
    two = contract_two(instance)
    for places in topological_orders(instance):
        acc, cpu = interval_loads(instance, places)
        for i, j in itertools.combinations_with_replacement(range(len(acc)), 2):
            inside = (places >= i) & (places < j)
            loads = kernels.all_loads(kernels.workload_of(two), np.where(inside, 0, 1))
            if instance.size[inside].sum() <= instance.memory:
                assert acc[i, j] == pytest.approx(loads[0])
            else:
                assert acc[i, j] == np.inf
            assert cpu[i, j] == pytest.approx(instance.cpu[inside].sum())


def contract_two(instance: PlaceInstance) -> PlaceInstance:
    """The instance on two accelerators."""
    return PlaceInstance(**{**{name: getattr(instance, name) for name in PlaceInstance.__dataclass_fields__},
                            "num_accelerators": 2, "num_cpus": 0})


@settings(max_examples=30, deadline=None)
@given(instance=instances)
def test_the_cut_of_an_order_is_the_best_there_is(instance: PlaceInstance) -> None:
    devices, first = range(instance.num_devices), instance.num_accelerators
    turns = [who for who in itertools.permutations(devices)  # equal devices in one order: another changes names alone
             if sorted(who, key=lambda d: d >= first) == list(devices)]
    for places in topological_orders(instance):
        count = int(places.max()) + 1
        best = np.inf
        for cuts in itertools.combinations_with_replacement(range(count + 1), instance.num_devices - 1):
            interval = np.searchsorted(cuts, places, side="right")
            for who in turns:
                device = np.array(who)[interval]
                if fits(instance, device):
                    best = min(best, max_load(instance, device))
        device = cut_order(instance, places, lambda: 60.0)
        assert (device is None) == (best == np.inf)
        if device is not None:
            assert fits(instance, device) and is_contiguous(instance, device)
            assert max_load(instance, device) == pytest.approx(best)


def test_long_orders_are_cut_into_pieces_that_fit_the_work(monkeypatch) -> None:
    """1,000 classes in a row on 16 accelerators and 2 cores, with a hundredth of the entries allowed."""
    monkeypatch.setattr(linear, "WORK", linear.WORK / 100)
    sizes: list[int] = []
    loads_of = linear.interval_loads

    def counted(instance: PlaceInstance, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append((int(places.max()) + 1) ** 2 * 17 * 3)
        return loads_of(instance, places)

    monkeypatch.setattr(linear, "interval_loads", counted)
    instance = random_instance(0, 1000, training=False, devices=16, cores=2)
    found = list(best_intervals(instance, lambda: 60.0))
    assert len(sizes) == 3 and linear.WORK / 2 < max(sizes) <= linear.WORK
    assert len(found) == 3 and all(is_contiguous(instance, device) for device in found)
    assert min(max_load(instance, device) for device in found) < 2 * average_bound(instance)


def test_no_time_gives_no_cut() -> None:
    assert list(best_intervals(random_instance(0, 9), lambda: -1.0)) == []


@settings(max_examples=10, deadline=None)
@given(instance=instances)
def test_bounds_without_a_solver_hold_and_say_something(instance: PlaceInstance) -> None:
    bound = average_bound(instance)
    assert bound > 0
    if instance.num_devices ** instance.num_classes < 20_000:
        loads = [max_load(instance, np.array(device))
                 for device in itertools.product(range(instance.num_devices), repeat=instance.num_classes)]
        assert bound <= min(loads) * (1 + 1e-9)


def test_devices_without_cores_share_all_the_work() -> None:
    """A captured model's groups take no time on a core, for there is none: the bound is the work's equal share."""
    nodes = [WorkloadNode(n, 1.0, 0.0, 1.0, n) for n in range(8)]
    assert average_bound(contract_classes("captured", (4, 0, 9.0), nodes, [])) == pytest.approx(2.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cores=st.integers(0, 1))
def test_pieces_keep_an_assignment_and_its_load(seed: int, cores: int) -> None:
    instance = random_instance(seed, 120, devices=2, cores=cores)
    device = np.random.default_rng(seed).integers(0, instance.num_devices, instance.num_classes)
    small, piece = coarsen(instance, device)
    held = np.zeros(small.num_classes, dtype=np.int64)
    held[piece] = device
    assert (held[piece] == device).all()
    assert max_load(small, held) == pytest.approx(max_load(instance, device))
    free, _ = coarsen(instance)
    wanted = PIECES * instance.num_devices
    assert wanted <= free.num_classes < instance.num_classes
    merged = free.acc > instance.acc.max()
    assert (free.acc[merged] <= LARGEST * instance.acc.sum() / wanted + 1e-9).all()


@settings(max_examples=3, deadline=None)
@given(instance=st.builds(random_instance, st.integers(0, 10_000), st.integers(4, 40), training=st.booleans(),
                          devices=st.integers(1, 4), cores=st.integers(0, 1), memory=st.sampled_from([400.0, 1e9])))
def test_a_larger_space_is_never_worse(instance: PlaceInstance) -> None:
    """Unrestricted against contiguous within one short limit, and both against their start and their bounds."""
    compile_kernels()
    assert device_placement.solve_part  # loaded as well: neither search pays for the first call
    starts = [max_load(instance, device) for device in best_intervals(instance, lambda: 60.0)]
    free, contiguous = (place(instance, contiguous=kind, time_limit_s=0.7, threads=1) for kind in (False, True))
    assert free.objective <= contiguous.objective * (1 + 2e-6)
    assert contiguous.objective <= min(starts, default=np.inf) * (1 + 1e-9)
    assert free.bound <= free.objective and free.bound <= contiguous.objective * (1 + 1e-9)
    assert is_contiguous(instance, assigned(instance, contiguous))
    assert max_load(instance, assigned(instance, free)) == pytest.approx(free.objective)


def conv_instance(folder: Path, *blocks: int, devices: int) -> PlaceInstance:
    path = folder / "conv.json"
    path.write_text(json.dumps(runpy.run_path(str(BENCHMARKS / "conv_training.py"))["conv_training"](blocks, devices)))
    return read_instance(path)


def test_a_training_graph_of_convolutions_starts_from_intervals(tmp_path: Path) -> None:
    """ResNet-152: from packed starts ten seconds of search stayed 9 % above the intervals' cut, found at once."""
    instance = conv_instance(tmp_path, 3, 8, 36, 3, devices=8)
    start = min(max_load(instance, device) for device in best_intervals(instance, lambda: 60.0))
    check_feasible(instance)
    free, contiguous = (place(instance, contiguous=kind, time_limit_s=0.8, threads=1) for kind in (False, True))
    assert free.objective <= contiguous.objective <= start
    assert free.bound >= instance.acc.sum() / 8 * (1 - 1e-9)


def test_a_search_without_kernels_ends_in_time_with_a_bound(monkeypatch, tmp_path: Path) -> None:
    """Kernels that are never ready: intervals and MIP answer, and no annealing run waits for the compiler."""
    @contextmanager
    def never() -> Iterator[object]:
        yield lambda: False

    def forbidden(*_: object) -> None:
        raise AssertionError("a kernel was called before it was ready")

    monkeypatch.setattr(throughput, "compiling", never)
    monkeypatch.setattr(throughput, "cool", forbidden)
    instance = conv_instance(tmp_path, 2, 2, devices=4)
    result = place(instance, time_limit_s=1, threads=1)
    assert result.seconds < 4
    assert 0 < average_bound(instance) <= result.bound <= result.objective
    assert result.objective <= min(max_load(instance, device) for device in best_intervals(instance, lambda: 60.0))


COLD = """
import json, sys, time
from pathlib import Path
from mipipe.planner.devices import kernels
from mipipe.planner.devices.instances.instance import read_instance
from mipipe.planner.devices.place import place
from mipipe.planner.kernel import is_compiled
cold = not is_compiled(kernels.anneal_throughput)
began = time.monotonic()
result = place(read_instance(Path(sys.argv[1])), time_limit_s=float(sys.argv[2]), threads=1)
print(json.dumps([cold, time.monotonic() - began, result.objective, result.bound, result.method]))
"""


def cold_run(folder: Path, limit: float) -> list:
    ended = subprocess.run([sys.executable, "-c", COLD, str(folder / "conv.json"), str(limit)], text=True, timeout=180,
                           capture_output=True, env={**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache")})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_limit_holds_with_cold_kernels(tmp_path: Path) -> None:
    """Compiling takes some ten seconds: a limit of one is kept, in a process whose cache is empty."""
    conv_instance(tmp_path, 2, 2, devices=4)
    cold, seconds, objective, bound, _ = cold_run(tmp_path, 1.0)
    assert cold and seconds < 4
    assert 0 < bound <= objective


@pytest.mark.slow
def test_kernels_compiled_apart_are_used(tmp_path: Path) -> None:
    """With time enough the first call anneals too, and the second finds the cache."""
    conv_instance(tmp_path, 3, 8, devices=6)
    cold, seconds, _, _, _ = cold_run(tmp_path, 60.0)
    assert cold and seconds < 70
    assert not cold_run(tmp_path, 1.0)[0]
