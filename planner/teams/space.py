"""All degrees that a model, a batch and a number of devices allow, each with a bound below every step it can make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from mipipe.graphs.costs.split_rules import ATTENTION
from mipipe.graphs.operator_graph import DTYPE_BYTES, Role
from mipipe.planner.teams.bounds import bound_of
from mipipe.planner.teams.degrees import Degrees, Recompute
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.pieces import ModelPieces, misfit
from mipipe.planner.teams.pricing import ADAM_BYTES, GRADIENT_BYTES, Pricer


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


def divisors(value: int) -> list[int]:
    """All divisors, the smallest first."""
    return [size for size in range(1, value + 1) if value % size == 0]


def all_degrees(model: ModelPieces, devices: int, global_batch: int, given: Mapping[str, int]) -> Iterator[Degrees]:
    """Every combination of axes that divides what it must; ``given`` fixes some. Chunks and recomputation are left to
    the master, microbatches and sharding over copies to `variants`."""
    experts = any(segment.tags.role is Role.EXPERTS for segment in model.graph.segments)
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
                        made = replace(base, expert=expert)
                        if given.get("expert", expert) == expert and misfit(model, made, global_batch) is None:
                            yield made


def anything(degrees: Degrees) -> bool:
    """Every degrees are wanted."""
    return True


def variants(degrees: Degrees, global_batch: int, given: Mapping[str, int], microbatch: int | None = None,
             wanted: Callable[[Degrees], bool] = anything) -> Iterator[list[Degrees]]:
    """Degrees with every microbatch size, the smallest first: a list for each way in which copies share state. Only
    those that are ``wanted``."""
    sizes = [size for size in divisors(global_batch // degrees.copies) if microbatch in (None, size)]
    for zero in (1, 2, 3) if degrees.copies * degrees.context > 1 else (1,):
        if given.get("zero", zero) == zero:
            made = [replace(degrees, microbatch=size, zero=zero) for size in sizes]
            yield [each for each in made if wanted(each)]


@dataclass(frozen=True, slots=True)
class DegreeSpace:
    """The points whose memory may suffice, by their bounds; how many combinations there are; and a bound for those
    that there was no time to price (None: all were)."""

    points: list[Point]
    combinations: int
    unpriced: float | None = None


def points(pricer: Pricer, devices: int, global_batch: int, given: Mapping[str, int], microbatch: int | None,
           recomputation: Recompute | None, in_time: Callable[[], bool] = lambda: True,
           wanted: Callable[[Degrees], bool] = anything) -> DegreeSpace:
    """Combinations of degrees that are ``wanted``, priced as long as there is time.

    Axes with the smallest microbatch come first, small teams before large ones; then, the most promising axes first,
    their other microbatches and ways to share state. A larger microbatch keeps more: where one does not fit, larger
    ones are not looked at.
    """
    bases = list(all_degrees(pricer.model, devices, global_batch, given))
    lines = {base: list(variants(base, global_batch, given, microbatch, wanted)) for base in bases}
    count = sum(len(line) for base in bases for line in lines[base])
    host = pricer.machine.fabric.levels[0].size
    bases.sort(key=lambda base: (base.team > host, base.team, base.expert > 8 * host))
    tried: dict[Degrees, Point | None] = {}

    def price(degrees: Degrees) -> Point | None:
        if degrees not in tried:
            bound = bound_of(pricer, degrees, global_batch, recomputation) if roughly_fits(pricer, degrees) else None
            tried[degrees] = None if bound is None else Point(bound[0], degrees, *bound[1:])
        return tried[degrees]

    def enough() -> bool:
        return count > EFFORT.priced and not in_time()

    firsts: dict[Degrees, float] = {}
    for base in bases:
        for line in lines[base] if not enough() else ():
            first = price(line[0]) if line else None
            if first is not None:
                firsts[base] = promise(pricer, first, global_batch)
                break
    for base in sorted(firsts, key=lambda base: firsts[base]):
        for line in lines[base]:
            for degrees in line:
                if enough() or price(degrees) is None:
                    break
    found = [point for point in tried.values() if point is not None]
    left = least_seconds(pricer) * global_batch / devices if enough() else None
    return DegreeSpace(sorted(found, key=lambda point: point.bound), count, left)


def promise(pricer: Pricer, point: Point, global_batch: int) -> float:
    """A guess at the step of a combination: its bound with the bubble of interleaved 1F1B (Narayanan et al., 2021)."""
    degrees = point.degrees
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    chunks = 1 if microbatches % degrees.ranks else min(MOST_CHUNKS, max(1, len(pricer.model.layers) // degrees.ranks))
    return point.bound * (1 + (degrees.ranks - 1) / (microbatches * chunks))


def roughly_fits(pricer: Pricer, degrees: Degrees) -> bool:
    """Whether what stays, and what one microbatch keeps with all layers run again, fit all ranks together."""
    held = pricer.footprint(degrees)
    size = DTYPE_BYTES[pricer.machine.dtype]
    total = held.kept * degrees.microbatch
    for num_bytes, trained, copies in ((held.dense, held.trained_dense, degrees.context * degrees.copies),
                                       (held.experts, held.trained_experts, degrees.expert_copies)):
        shares = [copies if degrees.zero >= stage else 1 for stage in (1, 2, 3)]
        total += trained / size * (ADAM_BYTES / shares[0] + GRADIENT_BYTES / shares[1]) + num_bytes / shares[2]
    return total <= degrees.ranks * pricer.machine.usable_bytes


def least_seconds(pricer: Pricer) -> float:
    """Device seconds of one sequence that no degrees are below: products at their best shapes, which are those of a
    team of one, without their bytes, which larger microbatches share."""
    model, kind = pricer.model, pricer.machine.kind
    total = 0.0
    for member in range(len(model.graph.segments)):
        profile = pricer.profile(member, Degrees())
        for phase, work in profile.phases.items():
            if model.index.runs(member, phase):
                for item in work.products:
                    low = None if item.kind.startswith(ATTENTION) else pricer.machine.low
                    peak = kind.peak(low or pricer.machine.dtype)
                    total += item.count * item.flops / (peak * kind.achieved.share(item.kind, item.narrow, low))
    return total / model.sequences
