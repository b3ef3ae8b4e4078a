"""Degrees chosen: every combination bounded, the promising ones solved by the master MIP, the winners ordered.

1. Every combination of degrees gets a bound (`mipipe.planner.teams.space`); those whose memory cannot suffice are out.
2. In the order of bounds, as long as a bound is below the best step found: the master
   (`mipipe.planner.milp.placement.degrees`) cuts the layers into stages and says which run again, for one chunk per
   rank and for more; the simulator says what 1F1B and interleaved 1F1B take on its stages, and for the best other
   published schedules. The search's bound is the least over all combinations, overlapped pairs allowed.
3. The order level (`mipipe.planner.solve`) improves the schedule of the best pipelines in the time that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from mipipe.graphs.errors import InfeasibleError, MipipeError, TimeUpError
from mipipe.graphs.units import format_bytes
from mipipe.planner.milp.placement.degrees import ChainTask, ModeCost, StageCounts, stage_counts
from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan
from mipipe.planner.teams.degrees import Degrees, Recompute, check_given, completed
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams, piece_costs, result_of
from mipipe.planner.teams.pieces import misfit
from mipipe.planner.teams.pricing import PieceCost, Pricer
from mipipe.planner.teams.space import mode_costs, points, promise
from mipipe.planner.teams.stages import cut_pieces, stage_cost, team_problem

RUNNERS = 3
PRICED, MASTER, POLISH, ORDER = 0.3, 0.55, 0.7, 0.9
"""Shares of the time limit after which no further degrees are priced, none tried, none solved finely, and no order
searched."""
QUICK, FINE = (1.0, 0.02), (3.0, 2e-4)
"""Seconds and gap of a master: when combinations are tried, and for the best of them."""
POLISHED = 3
"""Combinations that are solved finely, with every number of chunks."""
SQUEEZES = 3
"""How often a master is solved again with as much less memory as its stages took too much when simulated."""
PUBLISHED = ("zb-h1", "zb-v", "dualpipev", "dualpipe")
"""Published schedules that are tried on the best pipelines beside 1F1B and interleaved 1F1B."""
CHUNKS = (1, 2, 4, 8)
"""Stages per rank that are tried, as far as the layers go."""


@dataclass(frozen=True, slots=True)
class TeamOptions:
    """What is fixed (degrees, microbatch, recomputation; None: free), and the limit in seconds."""

    given: Mapping[str, int] = field(default_factory=dict)
    microbatch: int | None = None
    recomputation: Recompute | None = None
    time_limit_s: float = 60.0
    seed: int = 0
    order: bool = True


@dataclass
class Found:
    """What a search found: the best, what came next and why it loses, and a bound in seconds over all degrees."""

    best: TeamResult
    bound: float
    runners: list[tuple[TeamResult, str]]
    notes: list[str]
    combinations: int
    fitting: int
    solved: int
    seconds: float

    @property
    def gap(self) -> float:
        return self.best.seconds / self.bound - 1 if self.bound else 0.0

    def how(self) -> str:
        """How the best was found, in a few words."""
        return (f"best of {self.combinations:,} combinations of degrees ({self.fitting:,} found that may fit,"
                f" {self.solved} solved) in {self.seconds:.1f} s")

    def bound_text(self) -> str:
        """Step, bound and gap."""
        shown = "proven optimal" if self.gap < 5e-5 else f"gap {self.gap:.1%}"
        return (f"step {self.best.seconds:.4g} s, bound over all degrees, placements and orders {self.bound:.4g} s"
                f" ({shown})")

    def data(self, told: Callable[[TeamResult], dict[str, Any]]) -> dict[str, Any]:
        """As JSON data, beside the best's own."""
        return {"bound_s": self.bound, "gap": self.gap, "combinations": self.combinations, "solved": self.solved,
                "seconds": round(self.seconds, 3), "notes": self.notes,
                "runners_up": [{**told(result), "loses_by": why} for result, why in self.runners]}


def search_teams(pricer: Pricer, devices: int, global_batch: int, options: TeamOptions,
                 tell: Callable[[str], None] = lambda text: None) -> Found:
    """The best degrees within the time limit.

    Raises:
        InputError: what is fixed does not divide the devices.
        InfeasibleError: no degrees fit the memory, or none divide.
        TimeUpError: none was evaluated in time.
    """
    began = time.monotonic()
    check_given(options.given, devices)
    space = points(pricer, devices, global_batch, options.given, options.microbatch, options.recomputation,
                   lambda: time.monotonic() - began < PRICED * options.time_limit_s)
    waiting, count = space.points, space.combinations
    if not waiting:
        raise InfeasibleError(_why_none(pricer, count, options, devices, global_batch))
    results: list[TeamResult] = []
    solved, best, bound = 0, float("inf"), float("inf")
    for number, point in enumerate(sorted(waiting, key=lambda point: promise(pricer, point, global_batch))):
        spent = time.monotonic() - began
        if point.bound >= best and _distinct(results) > RUNNERS:
            continue
        if spent > MASTER * options.time_limit_s and results:
            break
        if spent > options.time_limit_s:
            break
        tell(f"{number} of {len(waiting)} combinations, best {best:.4g} s")
        solved += 1
        cutoff = best if _distinct(results) > RUNNERS else 2 * best
        for chunks in _chunks(pricer, point.degrees, global_batch, options)[:1]:
            found = _solved(pricer, replace(point.degrees, chunks=chunks), global_batch, options, cutoff, QUICK)
            if found is not None:
                results.append(found)
                best = min(best, found.seconds)
    else:
        number = len(waiting)
    if not results:
        if number < len(waiting):
            raise TimeUpError(f"no degrees evaluated within {options.time_limit_s:g} s; try a longer --time-limit")
        raise InfeasibleError(_why_none(pricer, count, options, devices, global_batch))
    bound = min(*[point.floor for point in waiting], float("inf") if space.unpriced is None else space.unpriced)
    results = _polished(pricer, results, global_batch, options, began, tell)
    if options.order:
        results = _ordered(pricer, results, global_batch, options, began, tell)
    top = results[0]
    return Found(top, min(bound, top.seconds), _runners(results), _notes(results, top), count, len(waiting), solved,
                 time.monotonic() - began)


def _chunks(pricer: Pricer, degrees: Degrees, global_batch: int, options: TeamOptions) -> list[int]:
    """Stages per rank that are possible, the most promising first: many, but two pieces in each where that may be."""
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    pieces = len(pricer.model.pieces)
    found = [chunks for chunks in (CHUNKS if degrees.ranks > 1 else (1,))
             if options.given.get("chunks", chunks) == chunks and chunks * degrees.ranks <= pieces
             and (chunks == 1 or microbatches % degrees.ranks == 0)]
    return sorted(found, key=lambda chunks: (2 * chunks * degrees.ranks > pieces and chunks > 1, -min(chunks, 4)))


def _solved(pricer: Pricer, degrees: Degrees, global_batch: int, options: TeamOptions, cutoff: float,
            effort: tuple[float, float]) -> TeamResult | None:
    """What the master's stages take for one combination; None where none fit or beat the cutoff.

    Where anything runs again, the master is asked for stages in which no whole layer does, too: it holds the workspace
    of whole layers ready on every rank, and that may be what is lacking.
    """
    first = _with_modes(pricer, degrees, global_batch, options, cutoff, effort, whole=True)
    if options.recomputation is not None or (first is not None and set(first.recompute) == {"none"}):
        return first
    least = cutoff if first is None else min(cutoff, first.seconds)
    other = _with_modes(pricer, degrees, global_batch, options, least, effort, whole=False)
    found = [item for item in (first, other) if item is not None]
    return min(found, key=lambda item: item.seconds, default=None)


def _with_modes(pricer: Pricer, degrees: Degrees, global_batch: int, options: TeamOptions, cutoff: float,
                effort: tuple[float, float], whole: bool) -> TeamResult | None:
    """The master's stages, simulated; with less memory where they took too much. ``whole``: layers may run again."""
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    task, modes = chain_task(pricer, degrees, microbatches, options.recomputation, whole)
    for _ in range(SQUEEZES):
        answer = stage_counts(task, time_limit_s=effort[0], gap=effort[1], seed=options.seed,
                              cutoff=None if cutoff == float("inf") else cutoff)
        result = None if answer is None else _evaluated(pricer, degrees, answer, modes, global_batch)
        if result is None or not result.shortage:
            return result
        task = replace(task, memory=round(0.99 * task.memory - result.shortage))
    return None


def _polished(pricer: Pricer, results: list[TeamResult], global_batch: int, options: TeamOptions, began: float,
              tell: Callable[[str], None]) -> list[TeamResult]:
    """The results, the best combinations solved again finely and with every number of chunks."""
    results = sorted(results, key=lambda found: found.seconds)
    for item in results[:POLISHED]:
        for chunks in _chunks(pricer, item.degrees, global_batch, options):
            if time.monotonic() - began > POLISH * options.time_limit_s:
                break
            degrees = replace(item.degrees, chunks=chunks, recompute="none")
            tell(f"polishing {degrees.text()}")
            better = _solved(pricer, degrees, global_batch, options, 1.05 * results[0].seconds, FINE)
            if better is not None:
                results.append(better)
    return sorted(results, key=lambda found: found.seconds)


def chain_task(pricer: Pricer, degrees: Degrees, microbatches: int,
               recomputation: Recompute | None, whole: bool = True) -> tuple[ChainTask, list[Recompute]]:
    """The master's task for one combination, and the modes its counts are by (``whole``: with that of whole layers)."""
    model, by_mode = pricer.model, mode_costs(pricer, degrees, recomputation)
    by_mode = {mode: costs for mode, costs in by_mode.items() if whole or mode != "full"}
    runs: list[tuple[int, tuple[ModeCost, ...]]] = []
    last = -1
    for number, piece in enumerate(model.pieces):
        if piece.kind == last:
            runs[-1] = (runs[-1][0] + 1, runs[-1][1])
            continue
        last = piece.kind
        runs.append((1, tuple(_mode_cost(costs[number]) for costs in by_mode.values())))
    link = pricer.machine.fabric.link(degrees.team * degrees.copies).link
    size = max((model.index.num_bytes[value.name] for value in model.graph.values if "float" in value.spec.dtype
                and model.index.source[value.name] >= 0), default=0)
    parts = degrees.context * (degrees.tensor if degrees.sequence or pricer.machine.scatter else 1)
    passing = round(size * degrees.microbatch / model.sequences / parts)
    hop = link.transfer_ns(passing) / 1e9
    room = pricer.machine.usable_bytes - 2 * passing * min(2, degrees.ranks - 1)
    return ChainTask(tuple(runs), degrees.ranks, degrees.chunks, microbatches, hop,
                     pricer.machine.kind.achieved.action_ns * 1e-9, room), list(by_mode)


def _mode_cost(cost: PieceCost) -> ModeCost:
    return ModeCost(cost.f.total, cost.backward, cost.optimizer, cost.resident, cost.kept,
                    cost.again + cost.late + cost.gathered + cost.buffers)


def _evaluated(pricer: Pricer, degrees: Degrees, answer: StageCounts, modes: list[Recompute],
               global_batch: int) -> TeamResult | None:
    """The simulated step of the master's stages; pieces of a stage in the model's order, modes in theirs."""
    model = pricer.model
    layers: list[int] = []
    recompute: list[Recompute] = []
    order = _run_order(pricer)
    for stage in answer.counts:
        count = 0
        for number, by_mode in enumerate(stage):
            queue = [mode for mode, size in zip(modes, by_mode, strict=True) for _ in range(size)]
            layer = model.pieces[order[number]].layer is not None
            recompute += queue if layer or "none" not in modes else ["none"] * len(queue)  # only layers run again
            count += len(queue) if layer else 0
        layers.append(count)
    uniform = set(recompute)
    shown = replace(degrees, recompute=recompute[0] if len(uniform) == 1 else "none")
    try:
        return evaluate_teams(pricer, shown, global_batch, layers=layers, recompute=recompute,
                              schedule="interleaved" if degrees.chunks > 1 else "1F1B")
    except MipipeError:
        return None


def _run_order(pricer: Pricer) -> list[int]:
    """The first piece of every run of equal pieces."""
    pieces = pricer.model.pieces
    return [number for number, piece in enumerate(pieces) if not number or pieces[number - 1].kind != piece.kind]


def _ordered(pricer: Pricer, results: list[TeamResult], global_batch: int, options: TeamOptions, began: float,
             tell: Callable[[str], None]) -> list[TeamResult]:
    """The results with the best pipeline's schedule searched, where it has ranks to order."""
    for item in [item for item in results if item.degrees.ranks > 1][:POLISHED]:
        for name in PUBLISHED:
            if time.monotonic() - began < ORDER * options.time_limit_s:
                tell(f"{name} on {item.degrees.text()}")
                results += _published(pricer, item, name, global_batch)
    results.sort(key=lambda found: found.seconds)
    best = results[0]
    left = ORDER * options.time_limit_s - (time.monotonic() - began)
    pipelines = [item for item in results if item.degrees.ranks > 1
                 and item.seconds - item.times.bubble - item.times.pipeline < best.seconds][:2]
    for number, item in enumerate(pipelines):
        share = left / (len(pipelines) - number)
        if share < 2.0:
            break
        start = time.monotonic()
        tell(f"ordering {item.degrees.text()}")
        better = _order(pricer, item, global_batch, share, options.seed)
        left -= time.monotonic() - start
        if better is not None and better.seconds < item.seconds:
            results.append(better)
    return sorted(results, key=lambda found: found.seconds)


def _published(pricer: Pricer, item: TeamResult, name: str, global_batch: int) -> list[TeamResult]:
    """A result's degrees under a published schedule, with its stages where that has as many, with even ones, and with
    all layers run again; those that fit and are faster."""
    degrees = replace(item.degrees, chunks=1)
    same = item.layers if item.degrees.chunks == 1 else None
    for layers, mode in ((same, None), (None, "none"), (None, "selective"), (None, "full")):
        if mode is None and same is None:
            continue
        try:
            if mode is None:
                made = evaluate_teams(pricer, degrees, global_batch, layers=layers, schedule=name,
                                      recompute=item.recompute)
            else:
                made = evaluate_teams(pricer, replace(degrees, recompute=cast("Recompute", mode)), global_batch,
                                      schedule=name)
        except MipipeError:
            continue
        if not made.shortage:
            return [made] if made.seconds < item.seconds else []
    return []


def _order(pricer: Pricer, item: TeamResult, global_batch: int, seconds: float, seed: int) -> TeamResult | None:
    """The order level on the stages of a result, weight gradients on their own; None where it has no plan."""
    degrees = item.degrees
    costs = piece_costs(pricer, degrees, item.recompute)
    pieces = cut_pieces(pricer.model, item.layers)
    stages = [stage_cost(costs, members, pricer.machine, split=True, first_chunk=number < degrees.ranks)
              for number, members in enumerate(pieces)]
    count = item.plan.problem.num_microbatches
    problem = team_problem(pricer.model, degrees, pricer.machine, stages, count)
    solved = plan(problem, PlanOptions(time_limit_s=seconds, seed=seed, recompute=False))
    if solved.plan is None:
        return None
    instant = round(1e9 * (item.seconds - item.times.pipeline))
    name = f"planned order ({solved.plan.placement.name})"
    return result_of(pricer, degrees, global_batch, solved.plan, stages, name, item.layers, instant, item.recompute)


def _axes(result: TeamResult) -> tuple[int, ...]:
    degrees = result.degrees
    return degrees.ranks, degrees.tensor, degrees.context, degrees.expert, degrees.copies


def _distinct(results: list[TeamResult]) -> int:
    return len({_axes(item) for item in results})


def _runners(results: list[TeamResult]) -> list[tuple[TeamResult, str]]:
    """The best of other degrees, each with the parts of a step in which it loses most."""
    top, seen = results[0], {_axes(results[0])}
    found: list[tuple[TeamResult, str]] = []
    for item in results[1:]:
        if _axes(item) in seen or len(found) == RUNNERS:
            continue
        seen.add(_axes(item))
        found.append((item, why_slower(item, top)))
    return found


def why_slower(item: TeamResult, top: TeamResult) -> str:
    """What one configuration spends more than another, the largest first, and what it saves most."""
    def parts(result: TeamResult) -> dict[str, float]:
        times = result.times
        return {"kernels": times.kernels, **{f"{axis} communication": seconds for axis, seconds in times.axes.items()},
                "pipeline communication": times.pipeline, "bubble": times.bubble, "optimizer": times.optimizer}

    mine, other = parts(item), parts(top)
    more = sorted(((mine[name] - other[name], name) for name in mine), reverse=True)
    worse = [f"{name} +{seconds:.3g} s" for seconds, name in more[:2] if seconds > 0.002 * top.seconds]
    saved = [f"{name} {seconds:.3g} s" for seconds, name in more[-1:] if seconds < -0.002 * top.seconds]
    return ", ".join(worse + saved) or "about equal"


def _notes(results: list[TeamResult], top: TeamResult) -> list[str]:
    pipelines = [item for item in results if item.degrees.ranks > 1]
    alone = [item for item in results if item.degrees.ranks == 1]
    if top.degrees.ranks == 1 and pipelines:
        item = pipelines[0]
        return [f"no pipeline: the best one tried ({item.degrees.text()}) takes {item.seconds:.4g} s,"
                f" {item.seconds / top.seconds - 1:+.1%}: {why_slower(item, top)}"]
    if top.degrees.ranks > 1 and alone:
        item = alone[0]
        return [f"a pipeline pays: without one ({item.degrees.text()}) the step takes {item.seconds:.4g} s,"
                f" {item.seconds / top.seconds - 1:+.1%}: {why_slower(item, top)}"]
    return []


def _why_none(pricer: Pricer, count: int, options: TeamOptions, devices: int, global_batch: int) -> str:
    """Why no degrees are left: what is fixed does not divide, or memory is short."""
    if not count and options.given:
        reason = misfit(pricer.model, completed(options.given, devices, options.microbatch or 1, "none"), global_batch)
        if reason is not None:
            return f"no plan exists: {reason}"
    if not count:
        return "no plan exists: no degrees divide the devices, heads, sequences and batch" + (
            " with those that are fixed" if options.given else "")
    return (f"no plan exists: none of {count} combinations of degrees fits {format_bytes(pricer.machine.memory_bytes)}"
            " per device; give more devices or memory" + (", or fix fewer degrees" if options.given else ""))
