"""Stages of a published schedule in which some layers run again: as many, and those, that its memory asks for.

A schedule holds more microbatches of some stages than of others: in a V of 2 P stages, stage s about 2 P - s. Layers of
the first stages that run again make most room for their time. `mipipe.planner.milp.placement.mixed` decides how many
layers every stage has, and which mode each of them; the simulator says what the stages take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mipipe.graphs.errors import MipipeError
from mipipe.planner.milp.placement.mixed import MixCost, MixTask, RankOrders, mixed_counts
from mipipe.planner.placements.cuts import Shape
from mipipe.planner.schedules import EvenTimes
from mipipe.planner.schedules.dualpipe import dualpipe_v
from mipipe.planner.teams.bounds.of_degrees import mode_costs, seconds_in_kernels
from mipipe.planner.teams.bounds.packing import least_busiest
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult, schedule_of
from mipipe.planner.teams.holding import orders_of
from mipipe.planner.teams.masters import SQUEEZES, evaluated, layers_of, passing_bytes, runs_of
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.piece_cost import PieceCost
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.stages import kept_apart


def mixed(pricer: Pricer, degrees: Degrees, global_batch: int, schedule: str, best: float, seconds: float,
          seed: int = 0) -> TeamResult | None:
    """What a published schedule takes on the best stages found in so many seconds, some layers run again; None where no
    stages fit, or are faster than ``best``. With less memory again where they took too much."""
    try:
        task, modes = mix_task(pricer, degrees, global_batch, schedule)
    except MipipeError:  # the schedule does not exist for these sizes
        return None
    for _ in range(SQUEEZES):
        answer = mixed_counts(task, time_limit_s=seconds, seed=seed, cutoff=EFFORT.near * best)
        made = None if answer is None else evaluated(pricer, degrees, answer, modes, global_batch, schedule)
        if made is None or not made.shortage:
            return made if made is not None and made.seconds < best else None
        task = replace(task, memory=tuple(room - max(0, item.peak - item.capacity)
                                          for room, item in zip(task.memory, made.memory, strict=True)))
    return None


def mix_task(pricer: Pricer, degrees: Degrees, global_batch: int, schedule: str) -> tuple[MixTask, list[Recompute]]:
    """What is decided for a published schedule, and the modes that its counts are by."""
    baseline, split = schedule_of(schedule, degrees)
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    pattern = baseline.make(degrees.ranks, microbatches, EvenTimes(1, 1, 1))
    by_mode = mode_costs(pricer, degrees, None)
    mix = rank_mix(pricer, degrees, v_alive(degrees.ranks))
    return MixTask(runs_of(pricer, by_mode, lambda cost: mix_cost(cost, split)), pattern.num_stages, orders_of(pattern),
                   _rooms(pricer, degrees), 1.0 if mix is None else mix.share), list(by_mode)


def _rooms(pricer: Pricer, degrees: Degrees) -> tuple[int, ...]:
    """Bytes of every rank's member without the buffers of what passes between stages: a value and its gradient on both
    sides of a backward, a value on both sides of a forward beside it."""
    return (pricer.machine.usable_bytes - 6 * passing_bytes(pricer, degrees),) * degrees.ranks


def wave_stages(pricer: Pricer, degrees: Degrees, global_batch: int, shape: Shape, alive: float, seconds: float,
                seed: int = 0) -> tuple[list[int], list[Recompute]] | None:
    """Layers of every stage, and the mode of every piece, for an order that is not known yet; None where none fit.

    ``alive``: microbatches of the model that its first rank holds, in shares of the ranks; of a stage as many as that
    makes for what is left of the model after it. With them it holds what one stage's weight gradients wait for.
    """
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    by_mode, stages = mode_costs(pricer, degrees, None), shape.num_stages
    hop = 2 * alive * degrees.ranks / stages
    held = [min(microbatches, math.ceil(1 + hop * (stages - stage - 1))) for stage in range(stages)]
    orders = []
    for rank in range(degrees.ranks):
        own = [stage for stage in range(stages) if shape.rank_of[stage] == rank]
        moments = tuple(tuple((stage, held[stage], held[stage], int(stage == waits)) for stage in own) for waits in own)
        work, every = (tuple((stage, microbatches, *more) for stage in own) for more in ((0,), ()))
        orders.append(RankOrders(moments, work, work, every, every, own[0], own[-1], own[-1], own[0]))
    task = MixTask(runs_of(pricer, by_mode, lambda cost: mix_cost(cost, True)), stages, tuple(orders),
                   _rooms(pricer, degrees), 1.0)
    answer = mixed_counts(task, time_limit_s=seconds, seed=seed)
    return None if answer is None else layers_of(pricer, answer, list(by_mode))


def mix_cost(cost: PieceCost, split: bool) -> MixCost:
    """A piece's cost; ``split``: I and W are actions of their own."""
    held = kept_apart([cost]) if split else (0, cost.kept, 0)
    path = cost.i.total if split and cost.i is not None else cost.backward
    return MixCost(cost.f.total, cost.backward, path, cost.optimizer, cost.resident, *held,
                   replace(cost, late=0).while_running if split else cost.while_running, cost.forward_space)


@dataclass(frozen=True, slots=True)
class MeanMix:
    """Pieces of which some run again, such that all ranks together have memory for a number of microbatches: seconds
    of a microbatch in all of them, ``counts`` of equal pieces and what one of them takes."""

    forward: float
    backward: float
    kernels: float
    counts: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def share(self) -> float:
        """Of the time of a forward and a backward that an overlapped pair takes."""
        both = self.forward + self.backward
        return max(self.kernels, both - self.kernels) / max(1e-30, both)


def mean_mix(by_mode: Sequence[Sequence[PieceCost]], room: float, alive: Sequence[float]) -> MeanMix | None:
    """The mix of the least time within ``room`` bytes, what frees most for its time first (a linear program: of equal
    pieces any part may run again); None where there is none. Of ``alive`` microbatches each is held by as many pieces
    of every kind."""
    alike: dict[tuple[int, ...], list[Sequence[PieceCost]]] = {}
    for piece in zip(*by_mode, strict=True):
        alike.setdefault(tuple(map(id, piece)), []).append(piece)
    counts = tuple(map(len, alike.values()))
    share = 1 / len(alive)
    steps: list[tuple[float, int, float, PieceCost, PieceCost]] = []
    mixes: list[list[tuple[float, PieceCost]]] = []
    for kind, (own, *_) in enumerate(alike.values()):
        now = min(own, key=lambda cost: (seconds_of(cost), cost.kept))
        mixes.append([(1.0, now)])
        room -= share * sum(alive) * counts[kind] * now.kept
        while less := [cost for cost in own if cost.kept < now.kept]:
            prices = [(seconds_of(cost) - seconds_of(now)) / (now.kept - cost.kept) for cost in less]
            after = less[prices.index(min(prices))]
            steps += [(min(prices) / held, kind, held, now, after) for held in alive]
            now = after
    for _, kind, held, before, after in sorted(steps, key=lambda step: step[:2]):
        if room >= 0:
            break
        freed = share * held * counts[kind] * (before.kept - after.kept)
        part = min(1.0, -room / freed)
        mixes[kind] += [(-share * part, before), (share * part, after)]
        room += part * freed
    if room < -1:
        return None

    def mean(read: Callable[[PieceCost], float]) -> list[float]:
        return [sum(part * read(cost) for part, cost in mix) for mix in mixes]

    forward, backward, kernels = (sum(count * each for count, each in zip(counts, mean(read), strict=True))
                                  for read in (lambda cost: cost.f.total, lambda cost: cost.backward,
                                               seconds_in_kernels))
    return MeanMix(forward, backward, kernels, counts, tuple(mean(seconds_of)))


def seconds_of(cost: PieceCost) -> float:
    """Seconds of a piece for one microbatch."""
    return cost.f.total + cost.backward


def rank_mix(pricer: Pricer, degrees: Degrees, alive: Sequence[float]) -> MeanMix | None:
    """The mix on these ranks that holds so many microbatches (`mean_mix`); None where memory does not suffice. Where
    whole layers run again there must be room for one."""
    by_mode = list(mode_costs(pricer, degrees, None).values())
    resident = sum(cost.resident for cost in by_mode[0])
    work = [max(cost.while_running for cost in costs) for costs in by_mode]
    found = []
    for allowed in {max(work), min(work)}:
        own = [costs for costs, size in zip(by_mode, work, strict=True) if size <= allowed]
        found.append(mean_mix(own, degrees.ranks * (pricer.machine.usable_bytes - allowed) - resident, alive))
    return min((mix for mix in found if mix is not None), key=lambda mix: mix.forward + mix.backward, default=None)


def v_alive(ranks: int) -> list[float]:
    """Microbatches that DualPipeV holds of a stage on the way down its V, and back up: means over ranks."""
    return [1.5 * ranks + 0.5, 0.5 * ranks + 0.5]


def pair_guess(pricer: Pricer, degrees: Degrees, global_batch: int) -> float | None:
    """A guess at the step of DualPipeV with some layers run again: stages of equal work, but that of the busiest rank
    where layers stay whole. None where memory does not suffice."""
    mix = rank_mix(pricer, degrees, v_alive(degrees.ranks))
    if mix is None:
        return None
    return (_even_seconds(degrees.ranks, global_batch // (degrees.copies * degrees.microbatch), mix)
            + sum(cost.optimizer for cost in pricer.costs(degrees)) / degrees.ranks)


def _even_seconds(ranks: int, microbatches: int, mix: MeanMix) -> float:
    """DualPipeV's step on even stages. Beyond the least number of microbatches every one adds a pair of every stage."""
    stages, more = 2 * ranks, microbatches - 2 * ranks
    forward, backward = mix.forward / stages, mix.backward / stages
    uneven = least_busiest(mix.seconds, mix.counts, ranks) * ranks / (mix.forward + mix.backward)
    step = 0.0
    for order in _orders_of_pairs(ranks):
        alone, pairs = ([sum(counts[at] for counts in each) for each in (order.forwards, order.backwards)]
                        for at in (1, 2))
        start = max(order.front * forward, stages * forward + (stages - 1 - order.turn) * backward
                    - sum(count for _, count in order.ahead) * forward)
        end = max(0.0, (stages - 1 - order.last) * forward + (stages - order.back) * backward
                  - sum(count for _, count in order.behind) * backward)
        busy = (alone[0] * forward + alone[1] * backward
                + mix.share * ((pairs[0] + 2 * more) * forward + (pairs[1] + 2 * more) * backward))
        step = max(step, start + uneven * busy + end + order.back * backward)
    return step


@lru_cache
def _orders_of_pairs(ranks: int) -> tuple[RankOrders, ...]:
    """DualPipeV's of the fewest microbatches that it exists for."""
    return orders_of(dualpipe_v(ranks, 2 * ranks))
