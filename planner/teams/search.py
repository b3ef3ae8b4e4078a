"""Degrees chosen: every combination bounded, the promising ones solved by the master MIP, the winners ordered.

1. Combinations of degrees get a bound (`mipipe.planner.teams.space`), all where they are few, else those that may be
   faster than the best step found, the most promising first; those whose memory cannot suffice are out.
2. By their promise, as long as a bound is below the best step found: the master
   (`mipipe.planner.milp.placement.degrees`) cuts the layers into stages and says which run again, for one chunk per
   rank and for more; the simulator says what 1F1B and interleaved 1F1B take on its stages, and for the best other
   published schedules. The search's bound is the least over all combinations, overlapped pairs allowed.
3. DualPipeV where its overlapped pairs may gain most, on stages by a MIP that counts what it holds of each
   (`mipipe.planner.teams.mixing`); what may be faster than the best is priced then, and DualPipeV tried on that, too.
   Orders by tuned lists on stages in Vs and Ws
   (`mipipe.planner.teams.waves`) for combinations whose busiest rank has least to do, as long as that is below the best
   step.
4. The order level (`mipipe.planner.solve`) improves the schedule of the best pipelines in the time that is left, and of
   that which would be best if all its forwards overlapped with backwards.

Ctrl-C ends the search, and the best that it has found is the result.

Three bounds are told: over all placements and orders; over placements with every layer on one rank, where a rank has
whole layers (`mipipe.planner.teams.bounds.packing`); and over those of them without overlapped pairs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from mipipe.graphs.errors import InfeasibleError, TimeUpError
from mipipe.graphs.units import format_bytes
from mipipe.planner.clock import noting_ctrl_c
from mipipe.planner.teams.bounds.of_degrees import packed
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult
from mipipe.planner.teams.found import Found, distinct, notes_of, runners_of
from mipipe.planner.teams.masters import chunks_of, solved_master
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.orders import LATER, ordered, paired
from mipipe.planner.teams.prices.degrees import Degrees, Recompute, check_given, completed
from mipipe.planner.teams.prices.misfit import misfit, samples_misfit
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.so_far import SoFar
from mipipe.planner.teams.space import DegreeSpace, Point, anything, promise
from mipipe.planner.teams.waves import listed, promising, shapes_of

QUICK, FINE = (1.0, 0.02), (3.0, 2e-4)
"""Seconds and gap of a master: when combinations are tried, and for the best of them."""


def search_teams(pricer: Pricer, devices: int, global_batch: int, options: TeamOptions,
                 tell: Callable[[str], None] = lambda text: None,
                 wanted: Callable[[Degrees], bool] = anything) -> Found:
    """The best degrees within the time limit, or until Ctrl-C, of those that are ``wanted``.

    Raises:
        KeyboardInterrupt: Ctrl-C came before any were evaluated.
        InputError: what is fixed does not divide the devices.
        InfeasibleError: no degrees fit the memory, or none divide.
        TimeUpError: none was evaluated in time.
    """
    began, so_far = time.monotonic(), SoFar()
    check_given(options.given, devices)

    def in_time(share: float) -> bool:
        so_far.ask()
        return time.monotonic() - began < share * options.time_limit_s

    def say(text: str) -> None:
        so_far.ask()
        tell(text)

    seen: dict[Degrees, bool] = {}
    with noting_ctrl_c(so_far.note):
        space = DegreeSpace(pricer, devices, global_batch, options.given, options.microbatch, options.recomputation,
                            wanted)
        try:
            _search(pricer, space, so_far, seen, global_batch, options, began, in_time, say)
            if not so_far.results:
                if space.left()[0] < math.inf or len(seen) < len(space.points):
                    raise TimeUpError(f"no degrees evaluated within {options.time_limit_s:g} s; try a longer"
                                      " --time-limit")
                raise InfeasibleError(_why_none(pricer, space.combinations, options, devices, global_batch))
            bounds = _bounds(pricer, space, global_batch, options, began + EFFORT.until_packed * options.time_limit_s)
        except KeyboardInterrupt:
            so_far.note()
            if not so_far.results:
                raise
            bounds = _bounds(pricer, space, global_batch, options, -math.inf)
    results = so_far.ranked
    bound, whole, plain = (min(least, results[0].seconds) for least in bounds)
    return Found(results[0], bound, whole, plain, runners_of(results), notes_of(results, results[0]),
                 space.combinations, len(space.points), sum(seen.values()), time.monotonic() - began,
                 so_far.interrupted)


def _search(pricer: Pricer, space: DegreeSpace, so_far: SoFar, seen: dict[Degrees, bool], global_batch: int,
            options: TeamOptions, began: float, in_time: Callable[[float], bool],
            tell: Callable[[str], None]) -> None:
    """Price, try and improve until time is up; what is found goes to ``so_far``."""
    results = so_far.results
    if space.combinations <= EFFORT.priced:
        space.all()
    else:
        space.more(lambda: in_time(EFFORT.until_priced))
    if space.left()[0] < math.inf:
        _try(pricer, results, seen, space.points, global_batch, options, EFFORT.until_first_tried, in_time, tell)
        tell("pricing what may be faster")
        space.more(lambda: in_time(EFFORT.until_more_priced), min((item.seconds for item in results), default=math.inf))
    _try(pricer, results, seen, space.points, global_batch, options, EFFORT.until_tried, in_time, tell)
    while not results and in_time(1.0) and space.left()[0] < math.inf:  # no stages for those that were priced
        space.more(lambda: len(seen) == len(space.points) and in_time(1.0))
        _try(pricer, results, seen, space.points, global_batch, options, EFFORT.until_tried, in_time, tell)
    if not results:
        return
    _improve(pricer, so_far, space, global_batch, options, began, in_time, tell)
    tell("pricing what may be faster")
    space.more(lambda: in_time(EFFORT.until_bounded), so_far.ranked[0].seconds, by_floors=True)


def _try(pricer: Pricer, results: list[TeamResult], seen: dict[Degrees, bool], waiting: list[Point], global_batch: int,
         options: TeamOptions, share: float, in_time: Callable[[float], bool], tell: Callable[[str], None]) -> None:
    """Adds to ``results`` what the master makes of points that may be the best, in turn, up to a share of the time
    limit, or until there is one. ``seen``: points that this was done with, and whether they were solved."""
    best = min((item.seconds for item in results), default=math.inf)
    for number, point in enumerate(_in_turn(pricer, waiting, global_batch)):
        if point.degrees in seen:
            continue
        enough = distinct(results) > EFFORT.told
        if enough and (point.bound >= best
                       or packed(pricer, point.degrees, global_batch, options.recomputation)[0] >= best):
            seen[point.degrees] = False
            continue
        if not in_time(share) and (results or not in_time(1.0)):
            break
        tell(f"{number} of {len(waiting)} combinations, best {best:.4g} s")
        seen[point.degrees] = True
        for chunks in chunks_of(pricer, point.degrees, global_batch, options)[:1]:
            found = solved_master(pricer, replace(point.degrees, chunks=chunks), global_batch, options,
                                  best if enough else 2 * best, QUICK)
            if found is not None:
                results.append(found)
                best = min(best, found.seconds)


def _improve(pricer: Pricer, so_far: SoFar, space: DegreeSpace, global_batch: int, options: TeamOptions,
             began: float, in_time: Callable[[float], bool], tell: Callable[[str], None]) -> None:
    """Adds better stages and orders for the best of the results, and for others that orders may make the best."""
    waiting, tried = space.points, set[Degrees]()

    def pair(share: float) -> None:
        if options.order and options.recomputation is None and options.given.get("chunks", 1) == 1:
            tell("overlapped pairs")
            until = began + share * options.time_limit_s
            so_far.take(paired(pricer, waiting, global_batch, so_far.ranked[0].seconds, until, tried, options.seed))

    pair(EFFORT.until_dualpipev)
    so_far.take(_polished(pricer, so_far.ranked, global_batch, options, began, tell))
    if not options.order:
        return
    so_far.take(_with_pairs(pricer, so_far.ranked, waiting, global_batch, options, began))
    tell("pricing what may be faster")
    if space.more(lambda: in_time(EFFORT.until_most_priced), so_far.ranked[0].seconds, by_floors=True):
        pair(EFFORT.until_paired)
    so_far.take(_waved(pricer, so_far.ranked, waiting, global_batch, options, began, tell))
    until = began + EFFORT.until_ordered * options.time_limit_s
    so_far.take(ordered(pricer, so_far.ranked, global_batch, until, options.seed, options.recomputation, tell))


def _bounds(pricer: Pricer, space: DegreeSpace, global_batch: int, options: TeamOptions,
            until: float) -> tuple[float, float, float]:
    """Seconds over all degrees below all steps, below those with every layer on one rank, and below those of them
    without overlapped pairs; worked on up to a moment of the monotonic clock."""
    left, left_plain = space.left()
    bound = min(left, *(point.floor for point in space.points))
    whole, plain = _whole_bounds(pricer, space.points, global_batch, options.recomputation, until)
    whole = max(bound, min(left, whole))  # where time was short; each is over fewer plans than the one before
    return bound, whole, max(whole, min(left_plain, plain))


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
                  until: float) -> tuple[float, float]:
    """The least over combinations of what the busiest rank takes where every piece is on one rank, with overlapped
    pairs and without; those that there is no time for, up to a moment of the monotonic clock, count with their bound
    over all placements."""
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
              tell: Callable[[str], None]) -> Iterator[TeamResult]:
    """The best combinations solved again finely and with every number of chunks."""
    for item in [item for item in results if not item.plan.schedule.has_pairs][:EFFORT.polished]:
        for chunks in chunks_of(pricer, item.degrees, global_batch, options):
            if time.monotonic() - began > EFFORT.until_polished * options.time_limit_s:
                break
            degrees = replace(item.degrees, chunks=chunks, recompute="none")
            tell(f"polishing {degrees.text()}")
            better = solved_master(pricer, degrees, global_batch, options, 1.05 * results[0].seconds, FINE)
            if better is not None:
                yield better


def _with_pairs(pricer: Pricer, results: list[TeamResult], waiting: list[Point], global_batch: int,
                options: TeamOptions, began: float) -> Iterator[TeamResult]:
    """Stages on meshes that were not tried as they lose without overlapped pairs, and may win with them: the order
    level looks for these."""
    if options.given.get("chunks", 1) != 1:
        return
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
    for least, degrees in sorted(may.values(), key=lambda item: item[0])[:EFFORT.paired]:
        if time.monotonic() - began > EFFORT.until_polished * options.time_limit_s:
            break
        made = solved_master(pricer, degrees, global_batch, options, float("inf"), QUICK) if least < best else None
        if made is not None:
            yield made


def _mesh(degrees: Degrees) -> tuple[object, ...]:
    return degrees.ranks, degrees.split, degrees.copies


def _waved(pricer: Pricer, results: list[TeamResult], waiting: list[Point], global_batch: int, options: TeamOptions,
           began: float, tell: Callable[[str], None]) -> Iterator[TeamResult]:
    """Orders by lists on the stages of combinations whose busiest rank has least to do."""
    if options.recomputation is not None or "chunks" in options.given:
        return
    best = results[0].seconds
    for ends, degrees in promising(pricer, waiting, global_batch):
        if ends >= best:
            continue
        for shape in shapes_of(len(pricer.model.pieces), degrees.ranks):
            if time.monotonic() - began > EFFORT.until_listed * options.time_limit_s:
                return
            tell(f"{shape.name} on {degrees.text()}, best {best:.4g} s")
            made = listed(pricer, degrees, global_batch, shape, options.seed)
            if made is None or made.shortage:
                break
            yield made
            slow, best = made.seconds > 1.2 * best, min(best, made.seconds)
            if slow:
                break


def _why_none(pricer: Pricer, count: int, options: TeamOptions, devices: int, global_batch: int) -> str:
    """Why no degrees are left: what is fixed does not divide, or memory is short."""
    if not count and options.given:
        fixed = completed(options.given, devices, options.microbatch or 1, "none")
        most = replace(fixed, microbatch=options.microbatch or max(1, global_batch // fixed.copies))
        reason = misfit(pricer.model, fixed, global_batch) or samples_misfit(pricer.model, most)
        if reason is not None:
            return f"no plan exists: {reason}"
    if not count:
        step = devices * (options.microbatch or 1)
        more = -(-global_batch // step) * step
        return "no plan exists: no degrees divide the devices, heads, sequences and batch" + (
            " with those that are fixed; fix fewer" if options.given else
            f"; --global-batch {more} would, with copies={devices}" if more != global_batch else "")
    return (f"no plan exists: none of {count} combinations of degrees fits {format_bytes(pricer.machine.memory_bytes)}"
            " per device; give more devices or memory" + (", or fix fewer degrees" if options.given else ""))
