"""Expert placement: the greedy rule, the search, the MIP, migration and EPLB's tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.experts.balance.greedy import greedy_layer
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap, device_times, layer_bound, slots_for, unit_times
from mipipe.planner.experts.balance.swaps import Layer, balanced_start, improve_map, shared_tokens
from mipipe.planner.experts.migrate import Change, align, best_change, moved_experts, share_moves
from mipipe.planner.experts.plan import ExpertOptions, plan_experts, share_slots, slots_in_memory
from mipipe.planner.milp.expert_patterns import solve_layer

EPLB_EXAMPLE = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


def cluster(num_devices: int, per_host: int = 8, kinds: tuple[str, ...] = ("gpu",)) -> Topology:
    devices = tuple(Device(f"d{i}", kinds[i % len(kinds)], 10**9, f"host{i // per_host}", i % per_host)
                    for i in range(num_devices))
    return Topology(devices, Link(0, 400 * 10**9), Link(0, 50 * 10**9))


def simple(weights: np.ndarray, num_devices: int) -> Layer:
    return Layer(weights, np.ones(num_devices), np.zeros(num_devices, dtype=int))


def exhaustive(weights: np.ndarray, units: np.ndarray, slots: int) -> float:
    """The best busiest time over all maps (tiny sizes only)."""
    best = np.inf
    experts, num_devices = len(weights), len(units)
    for extra in itertools.combinations_with_replacement(range(experts), num_devices * slots - experts):
        items = sorted([*range(experts), *extra])
        for order in set(itertools.permutations(items)):
            devices = np.array(order).reshape(num_devices, slots)
            best = min(best, device_times(weights, devices, units).max())
    return best


def test_greedy_rule_balances_eplbs_worked_example_as_published() -> None:
    """12 experts, 4 groups, 2 nodes, 8 devices, 16 slots: the loads of the map printed in EPLB's README."""
    published = np.array([[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                          [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]])
    for layer, weights in enumerate(np.array(EPLB_EXAMPLE, dtype=float)):
        found = greedy_layer(weights, 16, 8, num_nodes=2, num_groups=4)
        ours = device_times(weights, found, np.ones(8))
        theirs = device_times(weights, published[layer].reshape(8, 2), np.ones(8))
        assert np.isclose(ours.max(), theirs.max())
        assert (np.bincount(found.ravel()) == np.bincount(published[layer])).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=3, max_size=5), st.integers(0, 10), st.sampled_from([1.0, 1.0, 1.5, 3.0]))
@example([42, 25, 37, 43], 5, 1.0)  # a wrong proof of HiGHS at its usual tolerances
@example([2, 5, 5, 6], 0, 1.0)  # the optimum keeps both replicas of one expert on one device
def test_search_and_mip_agree_with_exhaustive_search(loads: list[int], seed: int, slower: float) -> None:
    weights = np.array(loads, dtype=float)
    devices, slots = {3: (2, 2), 4: (3, 2), 5: (2, 3)}[len(loads)]
    units = np.ones(devices)
    units[0] = slower
    best = exhaustive(weights, units, slots)
    layer = Layer(weights, units, np.zeros(devices, dtype=int))
    bound = layer_bound(weights, layer.units, slots)
    found = improve_map(layer, balanced_start(layer, slots), bound)
    solved = solve_layer(layer, found, bound, time_limit_s=20, seed=seed)
    assert bound <= best * (1 + 1e-6)
    assert layer.makespan(found) >= best * (1 - 1e-9)
    assert solved is not None and solved.makespan == layer.makespan(solved.devices) == pytest.approx(best)
    assert solved.bound == solved.makespan


def test_flashlbs_example_is_proven() -> None:
    """vLLM-Ascend's example of FlashLB: 8 devices of 2 slots, where EPLB reaches 232 and FlashLB 205."""
    loads = ExpertLoads(((600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0),))
    result = plan_experts(loads, cluster(8), ExpertOptions(replicas=8, time_limit_s=60))
    assert result.layers[0].busiest == result.layers[0].bound == pytest.approx(590 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(8, 16, 8), (4, 32, 4), (16, 64, 16), (8, 32, 0)]), st.floats(0.3, 1.5))
def test_search_is_never_worse_than_the_greedy_rule(seed: int, size: tuple[int, int, int], skew: float) -> None:
    devices, experts, spare = size
    weights = np.random.default_rng(seed).permutation(np.arange(1, experts + 1) ** -skew)
    layer = simple(weights, devices)
    slots = (experts + spare) // devices
    bound = layer_bound(weights, layer.units, slots)
    found = improve_map(layer, balanced_start(layer, slots), bound)
    assert bound * (1 - 1e-9) <= layer.makespan(found)
    assert layer.makespan(found) <= layer.makespan(greedy_layer(weights, experts + spare, devices)) * (1 + 1e-9)
    assert set(found.ravel()) == set(range(experts))


def test_slower_devices_and_far_links_get_less_work() -> None:
    loads = ExpertLoads((tuple(float(10 + i % 7) for i in range(32)),), token_ns={"fast": 10.0, "slow": 20.0},
                        token_bytes=0)
    topology = cluster(4, kinds=("fast", "slow"))
    result = plan_experts(loads, topology, ExpertOptions(time_limit_s=5))
    units = unit_times(loads, topology)
    times = device_times(np.array(loads.loads[0]), result.map.devices(0), units)
    tokens = times / units
    assert tokens[1] < tokens[0] and tokens[3] < tokens[2]
    assert times.max() == pytest.approx(result.layers[0].busiest)
    assert units.tolist() == [10.0, 20.0, 10.0, 20.0]
    with_wire = unit_times(ExpertLoads(loads.loads, token_bytes=4096, token_ns={"gpu": 1.0}), cluster(16))
    near, far = 7 / 16 * 2 * 4096 / 400, 8 / 16 * 2 * 4096 / 50
    assert with_wire == pytest.approx(1.0 + near + far)


def test_coactivated_experts_meet_on_one_node_without_losing_balance() -> None:
    pairs = tuple((expert, expert + 8, 50.0) for expert in range(8))
    loads = ExpertLoads((tuple([100.0] * 16),), coactivation=(pairs,))
    result = plan_experts(loads, cluster(4, per_host=2), ExpertOptions(time_limit_s=5, polish=False))
    assert result.layers[0].shared_tokens == pytest.approx(8 * 50.0)
    assert result.layers[0].max_over_mean == pytest.approx(1.0)


def test_relabelling_moves_nothing_when_only_device_numbers_differ() -> None:
    rng = np.random.default_rng(1)
    current = rng.permutation(32).reshape(8, 4)
    target = current[rng.permutation(8)][:, ::-1]
    aligned = align(current, target, np.ones(8), np.zeros(8, dtype=int))
    assert (aligned == current).all()


def test_a_move_is_made_only_when_it_pays_off() -> None:
    weights = np.array([8.0, 7.0, 2.0, 1.0])
    layer = simple(weights, 2)
    current = np.array([[0, 1], [2, 3]])
    fresh = np.array([[0, 3], [1, 2]])
    stay = best_change(layer, current, fresh, horizon=1, move_ns=100)
    go = best_change(layer, current, fresh, horizon=100, move_ns=100)
    assert (stay == current).all()
    assert layer.makespan(go) == 9.0 and moved_experts(current, go).max() == 1
    capped = best_change(layer, current, fresh, horizon=100, move_ns=0, max_moves=0)
    assert (capped == current).all()


def test_moves_in_bytes_go_to_the_layers_where_they_save_most() -> None:
    """Two layers, one with more to gain: with room for one move it gets it; with room for all both change."""
    loads = ExpertLoads(((8.0, 7.0, 2.0, 1.0), (80.0, 70.0, 20.0, 10.0)), expert_bytes=100)
    current = ExpertMap(4, 2, ((0, 1, 2, 3),) * 2)
    results = {size: plan_experts(loads, cluster(2), ExpertOptions(max_bytes=size, polish=False), current=current)
               for size in (0, 200, 399, 400)}
    moved = {size: [layer.moved for layer in result.layers] for size, result in results.items()}
    assert moved == {0: [0, 0], 200: [0, 2], 399: [0, 2], 400: [2, 2]}
    assert results[400].layers[1].busiest == 90.0 and results[0].map == ExpertMap(
        4, 2, current.physical_to_logical, provenance=results[0].map.provenance)
    with pytest.raises(InputError, match="expert_bytes is missing, so moves"):
        plan_experts(ExpertLoads(loads.loads), cluster(2), ExpertOptions(max_bytes=1), current=current)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), min_size=1, max_size=4), min_size=1,
                max_size=4), st.integers(0, 8))
def test_shared_moves_are_the_best_choice(rows: list[list[tuple[int, int]]], total: int) -> None:
    """Against all combinations; staying is always possible."""
    choices = [[Change(np.zeros(0), 0, 60.0), *(Change(np.zeros(0), moved, float(cost)) for moved, cost in row)]
               for row in rows]
    found = share_moves(choices, total)
    assert sum(change.moved for change in found) <= total
    best = min(sum(change.cost for change in pick) for pick in itertools.product(*choices)
               if sum(change.moved for change in pick) <= total)
    assert sum(change.cost for change in found) == best


def test_shared_slots_go_where_the_skew_is() -> None:
    flat, skewed = tuple([10.0] * 8), (80.0, *([1.0] * 7))
    loads = ExpertLoads((flat, skewed))
    slots = share_slots(loads, cluster(4), 5)
    assert slots == (2, 3)
    assert slots_in_memory(ExpertLoads(loads.loads, expert_bytes=100), 550) == 5
    result = plan_experts(loads, cluster(4), ExpertOptions(time_limit_s=2), slots=slots)
    assert [len(row) for row in result.map.physical_to_logical] == [8, 12]
    assert result.layers[1].max_over_mean < result.layers[1].greedy_max_over_mean * (1 + 1e-9)
    with pytest.raises(InfeasibleError, match="smallest that would do is 4"):
        share_slots(loads, cluster(4), 3)


def test_map_tables_are_eplbs_and_survive_validation() -> None:
    placed = ExpertMap(3, 2, ((0, 1, 2, 0),))
    assert placed.counts() == [[2, 1, 1]]
    assert placed.logical_to_physical() == [[[0, 3], [1, -1], [2, -1]]]
    layer = Layer(np.array([2.0, 1.0, 1.0]), np.ones(2), np.array([0, 1]))
    assert shared_tokens(layer, placed.devices(0)) == 0.0


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ExpertLoads(()), "loads: empty"),
    (lambda: ExpertLoads(((1.0, -2.0),)), r"loads\[0\]\[1\]: found -2.0"),
    (lambda: ExpertLoads(((1.0, 2.0), (1.0,))), r"loads\[1\]: 1 experts, but layer 0 has 2"),
    (lambda: ExpertMap(3, 2, ((0, 1, 0, 1),)), "expert 2 is in no slot"),
    (lambda: ExpertMap(2, 2, ((0, 1, 1),)), "3 slots do not divide evenly over 2 devices"),
    (lambda: slots_for(8, 1, 4), "next number of replicas that does is 4"),
    (lambda: slots_for(2, 0, 4), "smallest number of replicas that does is 2"),
    (lambda: plan_experts(ExpertLoads(((1.0, 2.0),)), cluster(2), ExpertOptions(),
                          current=ExpertMap(3, 2, ((0, 1, 2, 0),))), "belongs to another model or cluster"),
    (lambda: slots_in_memory(ExpertLoads(((1.0,),)), 10), "expert_bytes is missing, so experts cannot be counted"),
    (lambda: ExpertOptions(max_moves=-1), "at most -1 moves"),
    (lambda: unit_times(ExpertLoads(((1.0,),), token_ns={"other": 1.0}), cluster(2)), "no entry for device kind 'gpu'"),
])
def test_bad_input_gets_one_clear_line(make, message: str) -> None:
    with pytest.raises((InputError, InfeasibleError), match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
