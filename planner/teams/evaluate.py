"""A configuration given in full, evaluated: its plan under a published schedule, and what its step takes.

Nothing is searched. The problem is an ordinary one (`mipipe.planner.teams.stages`), the order a baseline's, the
timeline the simulator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mipipe.graphs.collector import no_collection
from mipipe.graphs.errors import InputError, ProblemError
from mipipe.planner.device_memory import ALLOCATOR_SLACK, RUNTIME_BYTES
from mipipe.planner.execution.measure import measure
from mipipe.planner.plan import Plan
from mipipe.planner.problems.held_transfers import hold_transfers
from mipipe.planner.schedules import Baseline, EvenTimes, baseline_named
from mipipe.planner.schedules.one_f_one_b import interleaved, one_f_one_b
from mipipe.planner.teams.as_team import branches_of, team_of
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.misfit import check_fits
from mipipe.planner.teams.prices.piece_cost import AXES, Axis, PieceCost
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.stages import StageCost, cut_pieces, even_layers, stages_on, team_problem


@dataclass(frozen=True, slots=True)
class MemberMemory:
    """Bytes of one member of a rank's team at its peak. ``activations`` with the buffers of collectives and of values
    between ranks."""

    weights: int
    gradients: int
    state: int
    activations: int
    capacity: int

    @property
    def tensors(self) -> int:
        return self.weights + self.gradients + self.state + self.activations

    @property
    def peak(self) -> int:
        """With the allocator's slack."""
        return round(self.tensors * (1 + ALLOCATOR_SLACK))

    @property
    def on_device(self) -> int:
        """As the device's driver counts, with what is beside the allocator."""
        return self.peak + RUNTIME_BYTES


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step, means over ranks, which add up to the step: kernels, what collectives of each axis show, the
    optimizer, transfers of the pipeline as far as they lengthen the step, and the rest, the bubble."""

    kernels: float
    axes: dict[Axis, float]
    optimizer: float
    pipeline: float
    bubble: float

    @property
    def total(self) -> float:
        return self.kernels + sum(self.axes.values()) + self.optimizer + self.pipeline + self.bubble


@dataclass(frozen=True)
class TeamResult:
    """An evaluated configuration. ``layers`` per stage; ``flops`` are the model's of one step; ``origins`` counts where
    profiles of segments came from; ``measured``: times of layers were."""

    plan: Plan
    degrees: Degrees
    schedule: str
    layers: tuple[int, ...]
    stages: tuple[StageCost, ...]
    machine: Machine
    global_batch: int
    tokens: int | None
    flops: float
    memory: tuple[MemberMemory, ...]
    times: StepTimes
    origins: dict[str, int] = field(default_factory=dict)
    recompute: tuple[Recompute, ...] = ()
    measured: bool = False

    @property
    def seconds(self) -> float:
        """Of one step."""
        return (self.plan.makespan_ns or 0) / 1e9

    @property
    def tokens_per_s_per_device(self) -> float | None:
        if self.tokens is None:
            return None
        return self.tokens * self.global_batch / self.seconds / self.degrees.devices

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what all devices could do at the peak of the precision."""
        return self.flops / (self.machine.peak * self.degrees.devices * self.seconds)

    @property
    def shortage(self) -> int:
        """Bytes that the fullest member has too few; 0 where all fits."""
        return max(0, *(item.peak - item.capacity for item in self.memory))


def evaluate_teams(pricer: Pricer, degrees: Degrees, global_batch: int, *, layers: Sequence[int] | None = None,
                   schedule: str = "1F1B", recompute: Sequence[Recompute] = (), held: bool = False) -> TeamResult:
    """The result of a configuration; memory is told, not judged.

    Args:
        pricer: of the model on its machine.
        degrees: of the run.
        global_batch: sequences of a step over all copies.
        layers: of every stage; None: as even as they go.
        schedule: a published one by its name (`mipipe compare` lists them).
        recompute: of every piece of the model; empty: the degrees' for all.
        held: reductions over copies run after the last backward, and where a rank has one stage transfers between ranks
            hold the compute streams of both ends (`mipipe.planner.problems.held_transfers`).

    Raises:
        InputError: the model or batch does not divide by the degrees, or the schedule is not known.
        ProblemError: the schedule does not exist for these sizes, or the layers do not add up.
    """
    model, machine = pricer.model, pricer.machine
    check_fits(model, degrees, global_batch)
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    baseline, split = schedule_of(schedule, degrees)
    pattern = baseline.make(degrees.ranks, microbatches, EvenTimes(1, 1, 1))
    count = pattern.num_stages
    even = layers is None
    if layers is None:
        layers = even_layers(len(model.layers), count)
    if len(layers) != count:
        raise InputError(f"--layers-per-stage: {len(layers)} numbers, but {baseline.name} on {degrees.ranks} ranks has"
                         f" {count} stages")
    if split and pricer.measured is not None and any(layer.weights is None for layer in pricer.measured):
        raise InputError(f"--schedule {baseline.name}: divides backwards, which measured times of layers do not; take"
                         " 1f1b or interleaved")
    costs = piece_costs(pricer, degrees, recompute)
    pieces = cut_pieces(model, layers)
    empty = [number for number, members in enumerate(pieces) if not members]
    if empty and even:
        raise InputError(f"--degrees {degrees.text()}: {baseline.name} has {count} stages, but the model has"
                         f" {len(model.layers)} layers, so that stage {empty[0]} would hold nothing; fix fewer ranks or"
                         " chunks")
    if empty:
        raise InputError(f"--layers-per-stage: stage {empty[0]} would hold nothing; give every stage a layer (the first"
                         " has the embedding, the last the head as well)")
    stages = stages_on(costs, pieces, pattern.stage_ranks, pricer.tied(degrees), machine, split=split, held=held)
    problem = team_problem(model, degrees, machine, stages, microbatches)
    if held and count == degrees.ranks:
        problem = hold_transfers(problem)
    with no_collection():  # some 100,000 actions: half the time would go into looking for cycles among them
        found = baseline.plan(problem, split=split)
        instant = baseline.plan(team_problem(model, degrees, machine, stages, microbatches, instant=True), split=split)
        return result_of(pricer, degrees, global_batch, found, stages, baseline.name,
                         tuple(layers), instant.makespan_ns or 0, tuple(recompute))


def piece_costs(pricer: Pricer, degrees: Degrees, recompute: Sequence[Recompute] = ()) -> list[PieceCost]:
    """The cost of every piece, each with its own recomputation where that is given."""
    if not recompute:
        return pricer.costs(degrees)
    by_mode = {mode: pricer.costs(replace(degrees, recompute=mode)) for mode in dict.fromkeys(recompute)}
    return [by_mode[mode][number] for number, mode in enumerate(recompute)]


def schedule_of(name: str, degrees: Degrees) -> tuple[Baseline, bool]:
    """The baseline of a name for these degrees, and whether it splits I from W.

    Raises:
        InputError: no schedule of the name, or one without as many chunks.
    """
    found = baseline_named(name)
    if found.make in (one_f_one_b, interleaved) and degrees.ranks > 1 and degrees.chunks > 1:
        make: Any = partial(interleaved, chunks=degrees.chunks)
        return replace(baseline_named("Interleaved 1F1B"), make=make), False
    if found.make is interleaved and degrees.ranks == 1:
        return baseline_named("1F1B"), False
    if degrees.chunks > 1 and found.make is not interleaved:
        raise InputError(f"--degrees: chunks={degrees.chunks} is for --schedule interleaved; {found.name} has its own"
                         " number of stages")
    return found, "indivisible" not in found.accountings


def result_of(pricer: Pricer, degrees: Degrees, global_batch: int, plan: Plan, stages: Sequence[StageCost],
              schedule: str, layers: tuple[int, ...], instant_ns: int,
              recompute: tuple[Recompute, ...] = ()) -> TeamResult:
    """The result of a plan of stages (its problem's groups, in this order). ``instant_ns``: its makespan where links
    take no time; ``recompute`` as for `evaluate_teams`."""
    took = measure(plan)
    held: list[list[StageCost]] = [[] for _ in range(degrees.ranks)]
    shares: list[list[float]] = [[] for _ in range(degrees.ranks)]
    for stage, route in zip(plan.placement.stages, plan.placement.routes, strict=True):
        for rank in stage.ranks:
            for group in stage.groups:
                held[rank].append(stages[group])
                shares[rank].append(route.count(rank))
    memory = tuple(MemberMemory(sum(stage.weights for stage in own), sum(stage.gradients for stage in own),
                                sum(stage.state for stage in own), peak - resident, pricer.machine.memory_bytes)
                   for own, peak, resident in zip(held, took.peak_bytes, took.resident_bytes, strict=True))

    def mean(axis: Axis | None) -> float:
        return sum(runs * stage.spent(axis) for own, counts in zip(held, shares, strict=True)
                   for stage, runs in zip(own, counts, strict=True)) / degrees.ranks

    optimizer, data = (sum(getattr(stage, name) for own in held for stage in own) / degrees.ranks
                       for name in ("optimizer", "exposed_data"))
    axes: dict[Axis, float] = {axis: mean(axis) + (data if axis == "data" else 0.0) for axis in AXES}
    seconds, kernels = took.makespan_ns / 1e9, mean(None)
    paired = plan.schedule.has_pairs
    hidden = kernels + sum(axes.values()) + optimizer - sum(took.busy_ns) / 1e9 / degrees.ranks if paired else 0.0
    shown = sum(axes.values())
    if hidden > 0 and shown > 0:  # overlapped pairs hide collectives behind kernels; without any it is rounding
        axes = {axis: spent * max(0.0, 1 - hidden / shown) for axis, spent in axes.items()}
    pipeline = max(0.0, seconds - instant_ns / 1e9)
    bubble = seconds - kernels - sum(axes.values()) - optimizer - pipeline
    if bubble < 0:
        pipeline, bubble = max(0.0, pipeline + bubble), 0.0
    if plan.makespan_ns is None:
        raise ProblemError("teams: a plan without a makespan")
    team = team_of(pricer.model, degrees, pricer.machine.kind.name, recompute)
    facts = {"team": {"degrees": degrees.text(), "schedule": schedule, "microbatch": degrees.microbatch,
                      "global_batch": global_batch, "recompute": degrees.recompute, "zero": degrees.zero,
                      "layers": list(layers), "devices": degrees.devices,
                      "branches": branches_of(pricer.model.graph), "modes": pricer.model.own_modes(degrees),
                      "experts": pricer.model.has_experts, "tokens": pricer.model.tokens,
                      "expert_parallel": int(pricer.model.graph.source.get("expert_parallel", 1))}}
    made = replace(plan, provenance={**plan.provenance, **facts}, team=team)
    return TeamResult(made, degrees, schedule, layers, tuple(stages),
                      pricer.machine, global_batch, pricer.model.tokens, pricer.model.flops() * global_batch, memory,
                      StepTimes(kernels, axes, optimizer, pipeline, bubble), dict(pricer.origins), recompute,
                      pricer.measured is not None)
