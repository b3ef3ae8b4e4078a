"""Every configuration of a small model on few devices: all degrees, all cuts, all recomputation, orders searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, pairwise

from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams
from mipipe.planner.teams.orders import order_of
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.misfit import samples_misfit
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.space import all_degrees, anything, divisors, shared_ways
from mipipe.planner.teams.stages import overlap_rule


def variants(degrees: Degrees, global_batch: int, given: Mapping[str, int], microbatch: int | None = None,
             wanted: Callable[[Degrees], bool] = anything) -> Iterator[list[Degrees]]:
    """Degrees with every microbatch size, the smallest first, that are wanted: a list for each way to divide state."""
    sizes = [size for size in divisors(global_batch // degrees.copies) if microbatch in (None, size)]
    for way in shared_ways(degrees, given):
        yield [each for size in sizes if wanted(each := replace(way, microbatch=size))]


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to put ``total`` layers into stages; the first and the last may have none beside embedding and head."""
    for cuts in combinations(range(total + parts - 1), parts - 1):
        ends = (-1, *cuts, total + parts - 1)
        sizes = tuple(after - before - 1 for before, after in pairwise(ends))
        if all(sizes[1:-1]):
            yield sizes


def all_of(pricer: Pricer, devices: int, batch: int, given: Mapping[str, int],
           microbatch: int | None) -> list[Degrees]:
    return [degrees for base in all_degrees(pricer.model, devices, batch, given)
            for line in variants(base, batch, given, microbatch) for degrees in line
            if samples_misfit(pricer.model, degrees) is None]


def everything(pricer: Pricer, devices: int, batch: int, given: Mapping[str, int], microbatch: int | None, *,
               fits: bool = True) -> Iterator[TeamResult]:
    """Every combination of degrees with every cut and every recomputation of all layers under 1F1B; ``fits``: as far as
    memory suffices."""
    layers = len(pricer.model.layers)
    for degrees in all_of(pricer, devices, batch, given, microbatch):
        for cut in compositions(layers, degrees.ranks) if degrees.ranks > 1 else ((layers,),):
            for mode in pricer.model.recompute:
                found = evaluate_teams(pricer, replace(degrees, recompute=mode), batch, layers=cut)
                if not (fits and found.shortage):
                    yield found


def least_step(item: TeamResult) -> float:
    """Seconds of the busiest rank's work, if overlapped pairs hid all that they can: no order on these stages is
    below."""
    rule, count = overlap_rule(item.stages), item.plan.problem.num_microbatches
    return max(count * stage.load * rule.numerator / rule.denominator + stage.optimizer for stage in item.stages)


def best_ordered(pricer: Pricer, items: list[TeamResult], batch: int, seconds: float) -> tuple[TeamResult, int]:
    """The best of all, the order searched for so many seconds on the stages of every one whose busiest rank does not
    say that no order can be the best; and how many these were."""
    best = min((item for item in items if not item.shortage), key=lambda item: item.seconds)
    count = 0
    for item in sorted((item for item in items if item.degrees.ranks > 1), key=least_step):
        if least_step(item) >= best.seconds:
            break
        count += 1
        made = order_of(pricer, item, batch, seconds, 0)
        if made is not None and not made.shortage and made.seconds < best.seconds:
            best = made
    return best, count
