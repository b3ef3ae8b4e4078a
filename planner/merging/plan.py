"""`MergePlan`: which rank merges which tensors, in which order, where each goes, and what it will cost.

The result of a merge does not depend on the plan: tiles, seeds and sums are fixed by names and shapes. The plan decides
only how long it takes and how much memory each rank uses.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mipipe.graphs.errors import InfeasibleError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles
from mipipe.graphs.merging.graph import MergeGraph, MergeUnit
from mipipe.graphs.merging.layout import Shard, as_checkpoint, lay_out
from mipipe.graphs.merging.recipes.recipe import MergeRecipe
from mipipe.graphs.serialize import STRICT, digest
from mipipe.graphs.units import GIGABYTE, format_bytes
from mipipe.planner.merging.calibration import assign_streams
from mipipe.planner.merging.costs import (
    OVERHEAD_BYTES,
    MergeRates,
    UnitCost,
    held_bytes,
    measure_rates,
    shared_rates,
    step_bytes,
    unit_cost,
)
from mipipe.planner.merging.steps import TILE_ENTRIES, unit_steps

SHARD_BYTES = 5 * GIGABYTE
"""Largest output file, as transformers splits by default."""


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank does: nanoseconds of reading, computing and writing added up, and what it reads and writes."""

    __pydantic_config__: ClassVar = STRICT
    time_ns: int
    compute_ns: int
    read_bytes: int
    write_bytes: int
    num_units: int


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Units by rank, in the order of their first input's place on disk, so that files are read forward.

    Every unit is walked in portions of about ``portion_entries``, read ``ahead`` steps before they are needed; see
    `mipipe.planner.merging.lower`. ``memory_bytes`` bounds what a rank then has in memory beyond the bare process.
    ``rates`` are those of one process alone (`mipipe.planner.merging.costs.shared_rates` has those of its ranks).
    ``bound_ns`` is a proven lower bound of the longest rank at these costs, None where none was computed.
    """

    FORMAT: ClassVar = "mipipe.merge_plan"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    graph: MergeGraph
    shards: tuple[Shard, ...]
    ranks: tuple[tuple[int, ...], ...]
    loads: tuple[RankLoad, ...]
    rates: MergeRates
    portion_entries: int
    ahead: int
    memory_bytes: int
    memory_cap: int | None = None
    bound_ns: int | None = None
    streams: tuple[tuple[int, ...], ...] = ()
    """The calibration streams that each rank runs before it merges."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def time_ns(self) -> int:
        """Estimated work of the longest rank, nothing overlapped."""
        return max(load.time_ns for load in self.loads)

    def job_digest(self) -> str:
        """What a half-done merge must share with this one to be continued: graph and layout, not the ranks."""
        return digest(self.graph)[:8] + digest_shards(self.shards)[:8]


def digest_shards(shards: Sequence[Shard]) -> str:
    """A digest of the output's layout."""
    text = ";".join(f"{shard.file}:{shard.num_bytes}:{len(shard.tensors)}" for shard in shards)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_merge(graph: MergeGraph, num_ranks: int, rates: MergeRates, memory_cap: int | None = None,
               shard_bytes: int = SHARD_BYTES, time_limit_s: float = 5.0, seed: int = 0) -> MergePlan:
    """Units balanced over ranks.

    Raises:
        InfeasibleError: a unit needs more memory than the cap.
    """
    width = 8 if graph.compute_dtype == "float64" else 4
    costs = [unit_cost(unit, shared_rates(rates, num_ranks), width) for unit in graph.units]
    portion, ahead, memory = _fit_portions(graph, width, num_ranks, 1 if rates.cores > num_ranks else 0, memory_cap)
    streams, running = assign_streams(graph, num_ranks, rates, memory_cap)
    ranks, bound, notes = _assign(costs, num_ranks, time_limit_s, seed)
    ordered = tuple(tuple(sorted(rank, key=lambda index: _place(graph.units[index]))) for rank in ranks)
    loads = tuple(RankLoad(sum(costs[i].total_ns for i in rank), sum(costs[i].compute_ns for i in rank),
                           sum(costs[i].read_bytes for i in rank), sum(costs[i].write_bytes for i in rank), len(rank))
                  for rank in ordered)
    shards = () if graph.stores_parts else lay_out(graph.units, shard_bytes)
    return MergePlan(graph, shards, ordered, loads, rates, portion, ahead,
                     max(memory, OVERHEAD_BYTES + running if running else 0), memory_cap, bound, streams, notes)


def plan_recipe(recipe: MergeRecipe, where: str, out: Path, known: Mapping[str, CheckpointFiles], num_ranks: int,
                memory_cap: int | None, shard_bytes: int, dtype: str | None = None,
                rates: MergeRates | None = None) -> MergePlan:
    """The plan of one recipe; ``dtype`` replaces its out_dtype, ``rates`` those that are measured now.

    Raises:
        InputError, InfeasibleError: see `mipipe.graphs.merging.build.build` and `plan_merge`.
    """
    if dtype is not None:
        recipe = dataclasses.replace(recipe, out_dtype=dtype)
    graph = build(recipe, f"{where}, recipe {recipe.name}" if recipe.name else where, known)
    return plan_graph(graph, out, num_ranks, memory_cap, shard_bytes, rates)


def plan_graph(graph: MergeGraph, out: Path, num_ranks: int, memory_cap: int | None, shard_bytes: int,
               rates: MergeRates | None = None) -> MergePlan:
    """The plan of a graph, at rates measured now where none are given."""
    return plan_merge(graph, num_ranks, measure_rates(graph, out) if rates is None else rates, memory_cap, shard_bytes)


def plan_chain(recipes: Sequence[MergeRecipe], where: str, out: Path, num_ranks: int, memory_cap: int | None,
               shard_bytes: int, dtype: str | None = None,
               opened: Mapping[str, CheckpointFiles] | None = None,
               rates: MergeRates | None = None) -> list[MergePlan]:
    """The plans of chained recipes of which none has run: later ones read the layouts of earlier ones.

    ``opened``: models by the labels that recipes have for them.
    """
    known = dict(opened or {})
    plans = []
    for recipe in recipes:
        plans.append(plan_recipe(recipe, where, out, known, num_ranks, memory_cap, shard_bytes, dtype, rates))
        known[recipe.name] = as_checkpoint(plans[-1].graph, plans[-1].shards)
    return plans


def _place(unit: MergeUnit) -> tuple[str, str, int]:
    first = unit.inputs[0]
    return first.folder, first.tensor.file, first.tensor.start


PORTION_ENTRIES = 4 * TILE_ENTRIES
"""Entries of a portion: large enough that walking through a program takes no time beside them."""
NUM_PORTIONS = 2**13
"""Portions of a large model are so large that there are about this many."""


def _fit_portions(graph: MergeGraph, width: int, num_ranks: int, ahead: int, cap: int | None) -> tuple[int, int, int]:
    """Entries of a portion, how many steps are read ahead, and a bound on a rank's memory: the fastest that fit.

    Raises:
        InfeasibleError: not even the smallest portions do.
    """
    total = sum(unit.num_entries for unit in graph.units)
    portion = max(PORTION_ENTRIES, 2 ** (total // NUM_PORTIONS // num_ranks).bit_length())
    while True:
        peaks, held = [], 0
        for unit in graph.units:
            steps = unit_steps(unit, graph, portion)
            peaks.append(max((step_bytes(unit, step, graph, width) for step in steps), default=0))
            held = max(held, max((held_bytes(unit, step, graph) for step in steps), default=0))
        largest = max(range(len(peaks)), key=lambda index: peaks[index])
        for distance in range(ahead, -1, -1):
            memory = OVERHEAD_BYTES + peaks[largest] + distance * held
            if cap is None or memory <= cap:
                return portion, distance, memory
        if portion <= TILE_ENTRIES:
            unit, least = graph.units[largest], format_bytes(OVERHEAD_BYTES + peaks[largest])
            raise InfeasibleError(f"memory cap {format_bytes(cap or 0)} per rank: merging {unit.name} of shape"
                                  f" {list(unit.shape)} with {unit.method} takes {least} at once; raise --memory to at"
                                  " least that")
        portion //= 2


def _assign(costs: Sequence[UnitCost], num_ranks: int, time_limit_s: float,
            seed: int) -> tuple[list[list[int]], int | None, dict[str, Any]]:
    """Units per rank, a bound on the longest rank, and how they were found."""
    total = sum(cost.total_ns for cost in costs)
    if num_ranks == 1:
        return [list(range(len(costs)))], total, {"method": "one rank"}
    from mipipe.planner.milp.merge_balance import UnitKind, balance
    kinds: dict[tuple[int, int, int, int], list[int]] = {}
    for index, cost in enumerate(costs):
        kinds.setdefault((cost.total_ns, cost.read_bytes, cost.compute_ns, cost.write_bytes), []).append(index)
    members = list(kinds.values())
    start = longest_first([cost.total_ns for cost in costs], num_ranks)
    owner = {index: rank for rank, units in enumerate(start) for index in units}
    counts = [[sum(owner[index] == rank for index in group) for rank in range(num_ranks)] for group in members]
    counts, outcome = balance([UnitKind(len(group), *key) for key, group in kinds.items()], num_ranks, counts,
                              time_limit_s, seed)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for group, row in zip(members, counts, strict=True):
        left = list(group)
        for rank, count in enumerate(row):
            ranks[rank] += left[:count]
            left = left[count:]
    notes = {"method": "MIP over kinds of units, started from longest first", "kinds": len(members),
             "termination": outcome.termination.value, "gap": outcome.gap, "seconds": round(outcome.seconds, 3)}
    longest = max(cost.total_ns for cost in costs)
    return ranks, max(-(-total // num_ranks), longest), notes


def longest_first(times: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Units given one by one, the longest first, to the rank with the least work (Graham 1969); ranks by load."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(times)), key=lambda index: (-times[index], index)):
        rank = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        ranks[rank].append(index)
        loads[rank] += times[index]
    return [ranks[rank] for rank in sorted(range(num_ranks), key=lambda rank: -loads[rank])]
