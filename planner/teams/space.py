"""All degrees that a model, a batch and a number of devices allow, each with a bound below every step it can make."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, count

from mipipe.graphs.costs.products import ATTENTION
from mipipe.graphs.operator_graph import DTYPE_BYTES
from mipipe.planner.teams.bounds.of_degrees import bound_of, seconds_in_kernels
from mipipe.planner.teams.bounds.windows import apart, table
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.misfit import misfit, samples_misfit
from mipipe.planner.teams.prices.pieces import ModelPieces
from mipipe.planner.teams.prices.pricing import Pricer


@dataclass(frozen=True, slots=True)
class Point:
    """Degrees (with one chunk and no recomputation) and seconds that no placement or schedule of theirs is below:
    ``bound`` where forwards and backwards do not overlap, ``floor`` where they may, too. Overlapped pairs take at least
    the share ``stays`` of their parts' time."""

    bound: float
    degrees: Degrees
    floor: float = 0.0
    stays: float = 0.5


MOST_CHUNKS = 8
"""Stages per rank that a guess counts with at the most."""


@cache
def divisors(value: int) -> tuple[int, ...]:
    """All divisors, the smallest first."""
    return tuple(size for size in range(1, value + 1) if value % size == 0)


def all_degrees(model: ModelPieces, devices: int, global_batch: int, given: Mapping[str, int]) -> Iterator[Degrees]:
    """Every combination of axes, and of encoders in ``batch`` mode, that divides what it must; ``given`` fixes some
    axes. Chunks and recomputation are left to the master, microbatches and ``zero`` to `DegreeSpace`."""
    experts = model.has_experts
    sequence_given = given.get("sequence")
    for tensor in divisors(devices):
        if given.get("tensor", sequence_given or tensor) != tensor:
            continue
        for context in divisors(devices // tensor):
            if given.get("context", context) != context:
                continue
            for ranks in divisors(devices // tensor // context):
                copies = devices // tensor // context // ranks
                if given.get("ranks", ranks) != ranks or given.get("copies", copies) != copies \
                        or global_batch % copies:
                    continue
                for sequence in (False, True) if tensor > 1 else (False,):
                    if (sequence_given is not None and sequence != (tensor > 1)) or ("tensor" in given and sequence):
                        continue
                    base = Degrees(ranks, tensor, sequence, context, 1, copies)
                    for expert in divisors(tensor * context * copies) if experts else (1,):
                        if given.get("expert", expert) != expert:
                            continue
                        for branches in _subsets(model.encoders if tensor > 1 else ()):
                            made = replace(base, expert=expert, batch_branches=branches)
                            if misfit(model, made, global_batch) is None:
                                yield made


def _subsets(branches: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(branches, size) for size in range(len(branches) + 1))


def anything(degrees: Degrees) -> bool:
    """Every degrees are wanted."""
    return True


def shared_ways(degrees: Degrees, given: Mapping[str, int]) -> list[Degrees]:
    """The ways in which devices that hold the same may divide it."""
    return [replace(degrees, zero=zero) for zero in ((1, 2, 3) if degrees.copies * degrees.context > 1 else (1,))
            if given.get("zero", zero) == zero]


@dataclass(frozen=True, slots=True)
class Unpriced:
    """Degrees that are not priced one by one: all with the same ``axes``, or those of them with one ``microbatch``, in
    all ways to share state. None takes less than ``floor`` seconds, or than ``plain`` where forwards and backwards do
    not overlap. ``guess``: of the best of them; those not looked at yet have 0 and are looked at first."""

    axes: Degrees
    microbatch: int | None
    floor: float
    plain: float
    guess: float = 0.0


class DegreeSpace:
    """All combinations of degrees that are ``wanted``: those that are priced and whose memory may suffice are
    ``points``, by their bounds; the others are priced as time goes on.

    Work that is cut alike takes less in one large microbatch than in small ones: launches, latencies and what a layer
    of experts costs by itself are paid once. So one price at the largest microbatch, without what shared state adds and
    without recomputation, is below all combinations with these axes, and most are never priced one by one.
    """

    def __init__(self, pricer: Pricer, devices: int, global_batch: int, given: Mapping[str, int],
                 microbatch: int | None, recomputation: Recompute | None,
                 wanted: Callable[[Degrees], bool] = anything) -> None:
        self._pricer, self._batch, self._recomputation = pricer, global_batch, recomputation
        self.points: list[Point] = []
        self.combinations = 0
        self._lines: dict[Degrees, dict[Degrees, list[int]]] = {}
        least = least_seconds(pricer) * global_batch / devices

        for base in all_degrees(pricer.model, devices, global_batch, given):
            sizes = [size for size in divisors(global_batch // base.copies) if microbatch in (None, size)]
            if samples_misfit(pricer.model, replace(base, microbatch=1)) is not None:  # some do not divide
                sizes = [size for size in sizes if samples_misfit(pricer.model, replace(base, microbatch=size)) is None]
            lines: dict[Degrees, list[int]] = {}
            for way in shared_ways(base, given):
                own = [size for size in sizes if wanted is anything or wanted(replace(way, microbatch=size))]
                self.combinations += len(own)
                if fitting := _fitting(pricer, way, own):
                    lines[way] = fitting
            if lines:
                self._lines[base] = lines
        self._unpriced = [Unpriced(base, None, least, least) for base in self._lines]

    def all(self) -> list[Point]:
        """Price all that is not; the points, the least bounds first."""
        for item in self._unpriced:
            for size in self._sizes(item.axes) if item.microbatch is None else [item.microbatch]:
                self.points += self._priced(item.axes, size)
        self._unpriced = []
        self.points.sort(key=lambda point: point.bound)
        return self.points

    def more(self, keep_on: Callable[[], bool], below: float = math.inf, *, by_floors: bool = False) -> list[Point]:
        """Price as long as ``keep_on`` says what may take less than ``below`` seconds, the most promising first, or the
        least floors; the new points, which are among ``points`` from now on."""
        found: list[Point] = []
        numbers = count()
        heap: list[tuple[float, int, Unpriced]] = []
        left: list[Unpriced] = []

        def add(item: Unpriced) -> None:
            if item.floor >= below:
                left.append(item)
            else:
                heapq.heappush(heap, (item.floor if by_floors else item.guess, next(numbers), item))

        for item in self._unpriced:
            add(item)
        while heap and keep_on():
            item = heapq.heappop(heap)[2]
            if item.microbatch is not None:
                made = self._priced(item.axes, item.microbatch)
                self.points += made
                found += made
            elif not item.guess:
                add(self._looked_at(item.axes))
            else:
                for size in self._sizes(item.axes):
                    add(self._looked_at(item.axes, size))
        self._unpriced = left + [item for _, _, item in heap]
        self.points.sort(key=lambda point: point.bound)
        return found

    def left(self) -> tuple[float, float]:
        """Seconds that nothing unpriced is below, and the same without overlapped pairs; infinite where all is."""
        return (min((item.floor for item in self._unpriced), default=math.inf),
                min((item.plain for item in self._unpriced), default=math.inf))

    def _sizes(self, base: Degrees) -> list[int]:
        """The microbatches of certain axes, the smallest first."""
        return sorted({size for line in self._lines[base].values() for size in line})

    def _looked_at(self, base: Degrees, size: int | None = None) -> Unpriced:
        sizes = [size] if size is not None else self._sizes(base)
        floor, plain = floor_of(self._pricer, replace(base, microbatch=sizes[-1]), self._batch, self._recomputation)
        bubble = bubble_of(self._pricer, replace(base, microbatch=sizes[0]), self._batch)
        return Unpriced(base, size, floor, plain, max(1e-30, plain * (1 + bubble)))

    def _priced(self, base: Degrees, size: int) -> list[Point]:
        """The points of axes with one microbatch. A larger one keeps more: where one does not fit, those are not looked
        at that share state alike."""
        found = []
        for way, line in self._lines[base].items():
            if size in line:
                made = replace(way, microbatch=size)
                bound = bound_of(self._pricer, made, self._batch, self._recomputation)
                if bound is None:
                    self._lines[base][way] = [other for other in line if other < size]
                else:
                    found.append(Point(bound[0], made, *bound[1:]))
        return found


def _fitting(pricer: Pricer, degrees: Degrees, sizes: list[int]) -> list[int]:
    """The microbatches, the smallest first, that may fit by what all ranks hold together."""
    return sizes[:bisect_left(sizes, True, key=lambda size: not roughly_fits(
        pricer, replace(degrees, microbatch=size)))]


def floor_of(pricer: Pricer, degrees: Degrees, global_batch: int,
             recomputation: Recompute | None = None) -> tuple[float, float]:
    """Seconds below every step with these axes and with this microbatch or a smaller one, whatever the memory, the way
    in which copies share state and the recomputation that is allowed (None: any); and where forwards and backwards do
    not overlap. The ranks together do all work once, and kernels and collectives at best beside one another."""
    modes: list[Recompute] = ["none" if recomputation in (None, "full") else recomputation]  # "full" adds to "none"
    if recomputation is None:  # estimated where "none" is traced, or fused in another way: it may be less
        modes += [way for way in pricer.model.recompute if way == "latents" or (
            way == "selective" and pricer.model.graph.modes is not None)]
    plain = [replace(degrees, zero=1, recompute=mode, chunks=1) for mode in modes]
    costs = [pricer.costs(each) for each in plain]
    each_once = apart(costs)
    kernels = sum(table(each_once, seconds_in_kernels).min(axis=0).tolist())
    talk = sum(table(each_once, lambda cost: cost.f.total + cost.backward - seconds_in_kernels(cost)).min(
        axis=0).tolist())
    update = sum(cost.optimizer for cost in costs[0])
    microbatches, most = global_batch // (degrees.copies * degrees.microbatch), global_batch // degrees.copies
    collectives = max(pricer.collectives(each) for each in plain)
    rounding = 1e-9 * (most * (collectives / degrees.ranks + 2) + 2)  # collectives and durations are whole nanoseconds
    found = [(microbatches * busy + update) * (1 - 1e-9) / degrees.ranks - rounding
             for busy in (max(kernels, talk), kernels + talk)]
    return max(0.0, found[0]), max(0.0, found[1])


def promise(pricer: Pricer, point: Point, global_batch: int) -> float:
    """A guess at the step of a combination: its bound with a bubble."""
    return point.bound * (1 + bubble_of(pricer, point.degrees, global_batch))


def bubble_of(pricer: Pricer, degrees: Degrees, global_batch: int) -> float:
    """A guess at the bubble in shares of the work: that of interleaved 1F1B (Narayanan et al., 2021)."""
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    chunks = 1 if microbatches % degrees.ranks else min(MOST_CHUNKS, max(1, len(pricer.model.layers) // degrees.ranks))
    return (degrees.ranks - 1) / (microbatches * chunks)


def roughly_fits(pricer: Pricer, degrees: Degrees) -> bool:
    """Whether what stays, and what one microbatch keeps with all layers run again, may fit all ranks together."""
    held = pricer.footprint(degrees)
    machine = pricer.machine
    size = DTYPE_BYTES[machine.dtype]
    total = held.kept * degrees.microbatch
    for num_bytes, trained, copies in ((held.dense, held.trained_dense, degrees.alike),
                                       (held.experts, held.trained_experts, degrees.alike_experts)):
        shares = [copies if degrees.zero >= stage else 1 for stage in (1, 2, 3)]
        total += trained / size * (machine.state_bytes / shares[0] + machine.gradient_bytes / shares[1]) \
            + num_bytes / shares[2]
    return total <= degrees.ranks * pricer.machine.usable_bytes


def least_seconds(pricer: Pricer) -> float:
    """Device seconds of one sequence that no degrees are below: products at their best shapes, without their bytes,
    which larger microbatches share. The best are those of a team of one; but of banks of experts any, for each expert
    has more rows where they are divided over copies."""
    model, kind = pricer.model, pricer.machine.kind
    total = 0.0
    for member in range(len(model.graph.segments)):
        profile = pricer.profile(member, Degrees())
        for phase, work in profile.phases.items():
            if model.index.runs(member, phase):
                for item in work.products:
                    low = None if item.kind.startswith(ATTENTION) else pricer.machine.low
                    peak = kind.peak(low or pricer.machine.dtype)
                    achieved = kind.achieved.but(half=0.0) if "grouped" in item.kind else kind.achieved
                    total += item.count * item.flops / (peak * achieved.share(item.kind, item.narrow, low))
    return total / model.sequences
