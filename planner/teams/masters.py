"""Stages of one combination of degrees by the master MIP, and what they take when simulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from mipipe.graphs.errors import MipipeError
from mipipe.planner.milp.placement.degrees import ChainTask, ModeCost, StageCounts, stage_counts
from mipipe.planner.teams.bounds.of_degrees import mode_costs
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.piece_cost import PieceCost
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.prices.tied import on_ranks

Cost = TypeVar("Cost")

SQUEEZES = 3
"""How often a master is solved, or an order made, again with as much less memory as what it gave took too much when
simulated."""
CHUNKS = (1, 2, 3, 4, 5, 6, 8, 10)
"""Stages per rank that are tried, as far as the layers go."""


def chunks_of(pricer: Pricer, degrees: Degrees, global_batch: int, options: TeamOptions) -> list[int]:
    """Stages per rank that are possible, the most promising first: many, but two pieces in each where that may be."""
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    pieces = len(pricer.model.pieces)
    found = [chunks for chunks in (CHUNKS if degrees.ranks > 1 else (1,))
             if options.given.get("chunks", chunks) == chunks and chunks * degrees.ranks <= pieces
             and (chunks == 1 or microbatches % degrees.ranks == 0)]
    return sorted(found, key=lambda chunks: (2 * chunks * degrees.ranks > pieces and chunks > 1, -min(chunks, 4)))


def solved_master(pricer: Pricer, degrees: Degrees, global_batch: int, options: TeamOptions, cutoff: float,
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
        result = None if answer is None else evaluated(pricer, degrees, answer, modes, global_batch,
                                                       "interleaved" if degrees.chunks > 1 else "1F1B")
        if result is None or not result.shortage:
            return result
        task = replace(task, memory=round(0.99 * task.memory - result.shortage))
    return None


def chain_task(pricer: Pricer, degrees: Degrees, microbatches: int,
               recomputation: Recompute | None, whole: bool = True) -> tuple[ChainTask, list[Recompute]]:
    """The master's task for one combination, and the modes its counts are by (``whole``: with that of whole layers)."""
    by_mode = mode_costs(pricer, degrees, recomputation)
    by_mode = {mode: costs for mode, costs in by_mode.items() if whole or mode != "full"}
    if degrees.ranks > 1:  # what the first and the last pieces read is on the first and the last rank
        order, tied = range(len(pricer.model.pieces)), pricer.tied(degrees)
        halves = order[:len(order) // 2], order[len(order) // 2:]
        by_mode = {mode: on_ranks(costs, halves, ((0,), (1,)), tied)[0] for mode, costs in by_mode.items()}
    runs = runs_of(pricer, by_mode, _mode_cost)
    link = pricer.machine.fabric.link(degrees.team * degrees.copies).link
    passing = passing_bytes(pricer, degrees)
    hop = link.transfer_ns(passing) / 1e9
    room = pricer.machine.usable_bytes - 2 * passing * min(2, degrees.ranks - 1)
    return ChainTask(runs, degrees.ranks, degrees.chunks, microbatches, hop,
                     pricer.machine.kind.achieved.action_ns * 1e-9, room), list(by_mode)


def passing_bytes(pricer: Pricer, degrees: Degrees) -> int:
    """One member's part of the largest value that may pass between two stages."""
    model = pricer.model
    sizes = [model.index.num_bytes[value.name] * degrees.microbatch / model.sequences / (
        degrees.team if pricer.machine.scatter else model.parts_between(model.index.source[value.name], degrees))
        for value in model.graph.values if "float" in value.spec.dtype and model.index.source[value.name] >= 0]
    return round(max(sizes, default=0.0))


def runs_of(pricer: Pricer, by_mode: Mapping[Recompute, Sequence[PieceCost]],
            read: Callable[[PieceCost], Cost]) -> tuple[tuple[int, tuple[Cost, ...]], ...]:
    """Runs of equal pieces in the model's order: how many, and what is read of one's cost in every mode."""
    order = [*_run_order(pricer), len(pricer.model.pieces)]
    return tuple((after - first, tuple(read(costs[first]) for costs in by_mode.values()))
                 for first, after in pairwise(order))


def _mode_cost(cost: PieceCost) -> ModeCost:
    return ModeCost(cost.f.total, cost.backward, cost.optimizer, cost.resident, cost.kept,
                    max(cost.while_running, cost.forward_space))


def evaluated(pricer: Pricer, degrees: Degrees, answer: StageCounts, modes: Sequence[Recompute], global_batch: int,
              schedule: str) -> TeamResult | None:
    """The simulated step of a MIP's stages; pieces of a stage in the model's order, modes in theirs."""
    layers, recompute = layers_of(pricer, answer, modes)
    uniform = set(recompute)
    shown = replace(degrees, recompute=recompute[0] if len(uniform) == 1 else "none")
    try:
        return evaluate_teams(pricer, shown, global_batch, layers=layers, recompute=recompute, schedule=schedule)
    except MipipeError:
        return None


def layers_of(pricer: Pricer, answer: StageCounts, modes: Sequence[Recompute]) -> tuple[list[int], list[Recompute]]:
    """Layers of every stage of an answer, and the mode of every piece: in the model's order, modes in theirs."""
    layers: list[int] = []
    recompute: list[Recompute] = []
    order = _run_order(pricer)
    for stage in answer.counts:
        count = 0
        for number, by_mode in enumerate(stage):
            queue = [mode for mode, size in zip(modes, by_mode, strict=True) for _ in range(size)]
            layer = pricer.model.pieces[order[number]].layer is not None
            recompute += queue if layer or "none" not in modes else ["none"] * len(queue)  # only layers run again
            count += len(queue) if layer else 0
        layers.append(count)
    return layers, recompute


def _run_order(pricer: Pricer) -> list[int]:
    """The first piece of every run of equal pieces."""
    pieces = pricer.model.pieces
    return [number for number, piece in enumerate(pieces) if not number or pieces[number - 1].kind != piece.kind]
