"""Degrees chosen: every combination bounded, the promising ones solved by the master MIP, the winners ordered.

1. Every combination of degrees gets a bound (`mipipe.planner.teams.space`); those whose memory cannot suffice are out.
2. In the order of bounds, as long as a bound is below the best step found: the master
   (`mipipe.planner.milp.placement.degrees`) cuts the layers into stages and says which run again, for one chunk per
   rank and for more; the simulator says what 1F1B and interleaved 1F1B take on its stages, and for the best other
   published schedules. The search's bound is the least over all combinations, overlapped pairs allowed.
3. Orders by tuned lists on stages in Vs and Ws (`mipipe.planner.teams.waves`) for combinations whose busiest rank has
   least to do, as long as that is below the best step.
4. The order level (`mipipe.planner.solve`) improves the schedule of the best pipelines in the time that is left, and of
   that which would be best if all its forwards overlapped with backwards.

Three bounds are told: over all placements and orders; over placements with every layer on one rank, where a rank has
whole layers (`mipipe.planner.teams.packing`); and over those of them without overlapped pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from mipipe.graphs.errors import InfeasibleError, TimeUpError
from mipipe.graphs.units import format_bytes
from mipipe.planner.teams.bounds import packed
from mipipe.planner.teams.degrees import Degrees, Recompute, check_given, completed
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult
from mipipe.planner.teams.found import Found, distinct, notes_of, runners_of
from mipipe.planner.teams.masters import chunks_of, solved_master
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.orders import ordered
from mipipe.planner.teams.pieces import misfit
from mipipe.planner.teams.pricing import Pricer
from mipipe.planner.teams.space import Point, anything, points, promise
from mipipe.planner.teams.waves import promising, shapes_of, wave

QUICK, FINE = (1.0, 0.02), (3.0, 2e-4)
"""Seconds and gap of a master: when combinations are tried, and for the best of them."""
LATER = 1.03
"""By how much longer steps are guessed for every other point of the same mesh that comes before."""


def search_teams(pricer: Pricer, devices: int, global_batch: int, options: TeamOptions,
                 tell: Callable[[str], None] = lambda text: None,
                 wanted: Callable[[Degrees], bool] = anything) -> Found:
    """The best degrees within the time limit, of those that are ``wanted`` (as for `points`).

    Raises:
        InputError: what is fixed does not divide the devices.
        InfeasibleError: no degrees fit the memory, or none divide.
        TimeUpError: none was evaluated in time.
    """
    began = time.monotonic()
    check_given(options.given, devices)
    space = points(pricer, devices, global_batch, options.given, options.microbatch, options.recomputation,
                   lambda: time.monotonic() - began < EFFORT.until_priced * options.time_limit_s, wanted)
    waiting, count = space.points, space.combinations
    if not waiting:
        raise InfeasibleError(_why_none(pricer, count, options, devices, global_batch))
    results: list[TeamResult] = []
    tries, best = 0, float("inf")
    for number, point in enumerate(_in_turn(pricer, waiting, global_batch)):
        spent = time.monotonic() - began
        if distinct(results) > EFFORT.told and (point.bound >= best
                                                or packed(pricer, point.degrees, global_batch,
                                                          options.recomputation)[0] >= best):
            continue
        if spent > EFFORT.until_tried * options.time_limit_s and results:
            break
        if spent > options.time_limit_s:
            break
        tell(f"{number} of {len(waiting)} combinations, best {best:.4g} s")
        tries += 1
        cutoff = best if distinct(results) > EFFORT.told else 2 * best
        for chunks in chunks_of(pricer, point.degrees, global_batch, options)[:1]:
            found = solved_master(pricer, replace(point.degrees, chunks=chunks), global_batch, options, cutoff, QUICK)
            if found is not None:
                results.append(found)
                best = min(best, found.seconds)
    else:
        number = len(waiting)
    if not results:
        if number < len(waiting):
            raise TimeUpError(f"no degrees evaluated within {options.time_limit_s:g} s; try a longer --time-limit")
        raise InfeasibleError(_why_none(pricer, count, options, devices, global_batch))
    unpriced = float("inf") if space.unpriced is None else space.unpriced
    bound = min(*[point.floor for point in waiting], unpriced)
    whole_bound, plain_bound = (min(unpriced, least) for least in _whole_bounds(
        pricer, waiting, global_batch, options.recomputation, EFFORT.packing * options.time_limit_s))
    whole_bound = max(bound, whole_bound)  # where time was short; each is over fewer plans than the one before
    plain_bound = max(whole_bound, plain_bound)
    results = _polished(pricer, results, global_batch, options, began, tell)
    if options.order:
        results += _with_pairs(pricer, results, waiting, global_batch, options, began)
        results = _waved(pricer, results, waiting, global_batch, options, began, tell)
        until = began + EFFORT.until_ordered * options.time_limit_s
        results = ordered(pricer, results, global_batch, until, options.seed, tell)
    top = results[0]
    return Found(top, min(bound, top.seconds), min(whole_bound, top.seconds), min(plain_bound, top.seconds),
                 runners_of(results), notes_of(results, top), count, len(waiting), tries, time.monotonic() - began)


def _in_turn(pricer: Pricer, waiting: list[Point], global_batch: int) -> list[Point]:
    """Points by promise, every further one of the same mesh a little later, so that meshes take turns."""
    guessed = sorted(((promise(pricer, point, global_batch), number) for number, point in enumerate(waiting)))
    seen: dict[tuple[object, ...], int] = {}
    ranked = []
    for guess, number in guessed:
        mesh = _mesh(waiting[number].degrees)
        ranked.append((guess * LATER ** seen.get(mesh, 0), number))
        seen[mesh] = seen.get(mesh, 0) + 1
    return [waiting[number] for _, number in sorted(ranked)]


def _whole_bounds(pricer: Pricer, waiting: list[Point], global_batch: int, recomputation: Recompute | None,
                  seconds: float) -> tuple[float, float]:
    """The least over combinations of what the busiest rank takes where every piece is on one rank, with overlapped
    pairs and without; those that there is no time for count with their bound over all placements."""
    until = time.monotonic() + seconds
    found, both = [], dict[int, tuple[float, float]]()
    for pairs in (True, False):
        least = float("inf")
        known = {id(point): point.floor if pairs else point.bound for point in waiting}
        for point in sorted(waiting, key=lambda point: known[id(point)]):
            own = known[id(point)]
            if own >= least or time.monotonic() > until:
                least = min(least, own)
                break
            if id(point) not in both:
                both[id(point)] = packed(pricer, point.degrees, global_batch, recomputation, point.stays)
            plain, paired = both[id(point)]
            least = min(least, max(own, paired if pairs else plain))
        found.append(least)
    return found[0], found[1]


def _polished(pricer: Pricer, results: list[TeamResult], global_batch: int, options: TeamOptions, began: float,
              tell: Callable[[str], None]) -> list[TeamResult]:
    """The results, the best combinations solved again finely and with every number of chunks."""
    results = sorted(results, key=lambda found: found.seconds)
    for item in results[:EFFORT.polished]:
        for chunks in chunks_of(pricer, item.degrees, global_batch, options):
            if time.monotonic() - began > EFFORT.until_polished * options.time_limit_s:
                break
            degrees = replace(item.degrees, chunks=chunks, recompute="none")
            tell(f"polishing {degrees.text()}")
            better = solved_master(pricer, degrees, global_batch, options, 1.05 * results[0].seconds, FINE)
            if better is not None:
                results.append(better)
    return sorted(results, key=lambda found: found.seconds)


def _with_pairs(pricer: Pricer, results: list[TeamResult], waiting: list[Point], global_batch: int,
                options: TeamOptions, began: float) -> list[TeamResult]:
    """Stages on meshes that were not tried as they lose without overlapped pairs, and may win with them: the order
    level looks for these."""
    if options.given.get("chunks", 1) != 1:
        return []
    best = min(item.seconds for item in results)
    tried = {_mesh(item.degrees) for item in results}
    may: dict[tuple[object, ...], tuple[float, Degrees]] = {}
    for point in sorted(waiting, key=lambda point: point.floor):
        mesh = _mesh(point.degrees)
        if point.floor >= best or time.monotonic() - began > EFFORT.until_polished * options.time_limit_s:
            break
        if point.degrees.ranks > 1 and mesh not in tried and mesh not in may:
            paired = packed(pricer, point.degrees, global_batch, options.recomputation, point.stays)[1]
            may[mesh] = max(point.floor, paired), point.degrees
    found = []
    for least, degrees in sorted(may.values(), key=lambda item: item[0])[:EFFORT.paired]:
        made = solved_master(pricer, degrees, global_batch, options, float("inf"), QUICK) if least < best else None
        found += [] if made is None else [made]
    return found


def _mesh(degrees: Degrees) -> tuple[object, ...]:
    return degrees.ranks, degrees.split, degrees.copies


def _waved(pricer: Pricer, results: list[TeamResult], waiting: list[Point], global_batch: int, options: TeamOptions,
           began: float, tell: Callable[[str], None]) -> list[TeamResult]:
    """The results, with orders by lists on the stages of combinations whose busiest rank has least to do."""
    if options.recomputation is not None or "chunks" in options.given:
        return results
    found = list(results)
    for ends, degrees in promising(pricer, waiting, global_batch):
        best = min(item.seconds for item in found)
        if ends >= best:
            break
        for shape in shapes_of(len(pricer.model.pieces), degrees.ranks):
            if time.monotonic() - began > EFFORT.until_listed * options.time_limit_s:
                return found
            tell(f"{shape.name} on {degrees.text()}, best {best:.4g} s")
            made = wave(pricer, degrees, global_batch, shape, [degrees.recompute] * len(pricer.model.pieces),
                        EFFORT.tuned_s, options.seed)
            if made is None or made.shortage:
                break
            found.append(made)
            if made.seconds > 1.2 * best:
                break
    return sorted(found, key=lambda item: item.seconds)


def _why_none(pricer: Pricer, count: int, options: TeamOptions, devices: int, global_batch: int) -> str:
    """Why no degrees are left: what is fixed does not divide, or memory is short."""
    if not count and options.given:
        reason = misfit(pricer.model, completed(options.given, devices, options.microbatch or 1, "none"), global_batch)
        if reason is not None:
            return f"no plan exists: {reason}"
    if not count:
        more = -(-global_batch // devices) * devices
        return "no plan exists: no degrees divide the devices, heads, sequences and batch" + (
            " with those that are fixed; fix fewer" if options.given else
            f"; --global-batch {more} would, with copies={devices}")
    return (f"no plan exists: none of {count} combinations of degrees fits {format_bytes(pricer.machine.memory_bytes)}"
            " per device; give more devices or memory" + (", or fix fewer degrees" if options.given else ""))
