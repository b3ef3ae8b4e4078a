"""Stages of teams as an ordinary planning problem: a rank is a team, a group is a stage's run of pieces.

The problem is that of one member of every team: all members do the same. Its devices are teams with one member's
memory; the link between two ranks is that of members of equal index. Where the schedule has whole backwards (B), they
run layer by layer, so what stays between I and W is one piece's at a time and counts as workspace. Schedules that put W
off keep it for the whole stage, and of the activations what W reads: the inputs of products, beside the gradients of
their results. The others go piece by piece while I runs, and make room for these gradients. Values on their way between
ranks have a buffer at both ends, collectives one for their largest tensor. Gradients are reduced over copies while the
last microbatch's backward goes on, and updated parameters gathered while the first forward does; the update has what
neither hides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.problem import Group, GroupEdge, OverlapRule, PhaseTimes, PlanningProblem
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.piece_cost import AXES, Axis, PhaseCost, PieceCost
from mipipe.planner.teams.prices.pieces import ModelPieces
from mipipe.planner.teams.prices.tied import TiedParameter, on_ranks

KIND = "team"


@dataclass(frozen=True, slots=True)
class StageCost:
    """A stage's pieces together. ``phases`` holds F, I and W (None where there is none) with the action's overhead in
    their compute; ``kept`` stays from F to the end of I (where that is an action), ``until_w`` from F and ``late`` from
    I to the end of W; ``workspace`` is needed while the backward runs, ``forward_workspace`` while F does;
    ``exposed_data`` is what copies add to the update, ``optimizer`` the update itself (seconds)."""

    pieces: tuple[int, ...]
    phases: tuple[PhaseCost, PhaseCost | None, PhaseCost | None]
    kept: int
    until_w: int
    late: int
    workspace: int
    forward_workspace: int
    weights: int
    gradients: int
    state: int
    exposed_data: float
    optimizer: float

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.state

    def spent(self, axis: Axis | None) -> float:
        """Seconds of one microbatch in an axis's collectives; None: in kernels."""
        return sum(phase.compute if axis is None else phase.talk.get(axis, 0.0) for phase in self.phases if phase)

    @property
    def load(self) -> float:
        """Seconds of one microbatch."""
        return sum(phase.total for phase in self.phases if phase)


def cut_pieces(model: ModelPieces, layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Pieces of every stage, from how many layers each has; what comes before and after goes to the ends.

    Raises:
        ProblemError: the numbers do not add up to the model's layers.
    """
    total = len(model.layers)
    if sum(layers) != total or min(layers) < 0:
        raise ProblemError(f"--layers-per-stage: {sum(layers)} layers in {len(layers)} stages, but the model has"
                           f" {total}")
    found: list[list[int]] = [[] for _ in layers]
    stage, room = 0, layers[0]
    for number, piece in enumerate(model.pieces):
        if piece.layer is not None:
            while not room:
                stage += 1
                room = layers[stage]
            room -= 1
        elif total and number > model.layers[-1]:
            stage = len(layers) - 1
        found[stage].append(number)
    return [tuple(members) for members in found]


def even_layers(layers: int, stages: int) -> list[int]:
    """Layers of every stage, as even as they go, fewer at the ends, which have the embedding and the head as well."""
    base, more = divmod(layers, stages)
    order = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage == stages - 1, stage))
    return [base + (stage in order[:more]) for stage in range(stages)]


def stage_cost(costs: Sequence[PieceCost], pieces: Sequence[int], machine: Machine, *, split: bool,
               first_chunk: bool = True, held: bool = False) -> StageCost:
    """A stage of these pieces.

    Args:
        costs: of every piece of the model.
        pieces: the stage's.
        machine: for the overhead of an action.
        split: I and W are actions of their own.
        first_chunk: the last of its rank's stages to end its backward: only there is the reduction seen.
        held: reductions and gathers over copies run beside nothing.
    """
    own = [costs[piece] for piece in pieces]
    overhead = PhaseCost(machine.kind.achieved.action_ns * 1e-9)
    phases: list[PhaseCost | None] = []
    for name in ("f", "i", "w"):
        there = [phase for cost in own if (phase := getattr(cost, name)) is not None]
        total = PhaseCost()
        for phase in there:
            total = total.plus(phase)
        paid = name == "f" or split or (name == "i" or not any(cost.i for cost in own))
        phases.append(total.plus(overhead) if there and paid else total if there or name == "f" else None)
    assert phases[0] is not None
    workspace = max((replace(cost, late=0).while_running if split else cost.while_running for cost in own), default=0)
    ahead = max((cost.forward_space for cost in own), default=0)
    held_bytes = kept_apart(own) if split else (0, sum(cost.kept for cost in own), 0)
    return StageCost(tuple(pieces), (phases[0], phases[1], phases[2]), *held_bytes, workspace, ahead,
                     sum(cost.weights for cost in own), sum(cost.gradients for cost in own),
                     sum(cost.state for cost in own),
                     sum(cost.reduce + cost.gather for cost in own) if held else
                     exposed_reduction(own) + exposed_gather(own) if first_chunk else 0.0,
                     sum(cost.optimizer for cost in own))


def stages_on(costs: Sequence[PieceCost], cuts: Sequence[Sequence[int]], ranks: Sequence[Collection[int]],
              tied: Sequence[TiedParameter], machine: Machine, *, split: bool, held: bool = False) -> list[StageCost]:
    """The stages of these pieces on these ranks (`stage_cost`); what several pieces read is on a rank once.

    Args:
        costs: of every piece of the model, of what several read in the first one's.
        cuts: the pieces of every stage.
        ranks: the ranks that have every stage.
        tied: what several pieces read.
        machine, split, held: as for `stage_cost`.
    """
    own, spent = on_ranks(costs, cuts, ranks, tied)
    first = len({rank for here in ranks for rank in here})
    found = [stage_cost(own, pieces, machine, split=split, first_chunk=number < first, held=held)
             for number, pieces in enumerate(cuts)]
    return [replace(stage, exposed_data=stage.exposed_data + more) for stage, more in zip(found, spent, strict=True)]


def kept_apart(own: Sequence[PieceCost]) -> tuple[int, int, int]:
    """Bytes of a stage from F to I, from F to W and from I to W. I frees a piece's activations that W does not read
    before it makes the next one's gradients: what takes their place counts as held from F to W."""
    rest = [cost.kept if cost.again else cost.kept - cost.until_w for cost in own]
    read = [0 if cost.again else cost.until_w for cost in own]
    late = [cost.late + (cost.until_w if cost.again else 0) for cost in own]
    most = max((sum(rest[:number + 1]) + sum(late[number:]) for number in range(len(own))), default=0)
    reused = sum(rest) + sum(late) - most
    return sum(rest) - reused, sum(read) + reused, sum(late) - reused


def exposed_reduction(own: Sequence[PieceCost]) -> float:
    """Seconds that reductions go on after the last backward: each piece's starts when its backward has ended."""
    clock = busy = 0.0
    for cost in reversed(own):
        clock += cost.backward
        busy = max(busy, clock) + cost.reduce
    return max(0.0, busy - clock)


def exposed_gather(own: Sequence[PieceCost]) -> float:
    """Seconds that the first forward waits for parameters, which come piece by piece."""
    clock = come = waited = 0.0
    for cost in own:
        come += cost.gather
        waited += max(0.0, come - clock)
        clock = max(clock, come) + cost.f.total
    return waited


def team_problem(model: ModelPieces, degrees: Degrees, machine: Machine, stages: Sequence[StageCost],
                 num_microbatches: int, *, instant: bool = False) -> PlanningProblem:
    """The planning problem of stages on teams; ``instant``: with links that take no time, to see what they cost.

    Raises:
        ProblemError: the numbers are beyond what a problem holds.
    """
    count = degrees.ranks
    edges = tuple(_edges(model, degrees, stages, machine.scatter))
    passing, ahead = [0] * len(stages), [0] * len(stages)
    for edge in edges:
        for end in (edge.source, *edge.targets):
            passing[end] += edge.num_bytes + (edge.grad_bytes or 0)
            ahead[end] += edge.num_bytes
    groups = []
    for number, stage in enumerate(stages):
        names = [model.pieces[piece].name for piece in (stage.pieces[0], stage.pieces[-1])] if stage.pieces else []
        segments = tuple(model.graph.segments[member].name for piece in stage.pieces
                         for member in model.pieces[piece].members)
        f, i, w = ((None if phase is None else _ns(phase.total)) for phase in stage.phases)
        groups.append(Group(f"stage {number}: " + (names[0] if len(set(names)) < 2 else " .. ".join(names)),
                            {KIND: PhaseTimes(f or 0, i, w)}, resident_bytes=stage.resident,
                            gradient_bytes=stage.gradients, saved_fi_bytes=stage.kept, saved_fw_bytes=stage.until_w,
                            saved_iw_bytes=stage.late,
                            workspace_bytes=stage.workspace + passing[number], segments=segments,
                            update_ns=_ns(stage.exposed_data + stage.optimizer),
                            forward_workspace_bytes=stage.forward_workspace + ahead[number]))
    devices = tuple(Device(f"team{rank}", KIND, machine.usable_bytes, f"host{rank}") for rank in range(count))
    stride = degrees.team * degrees.copies
    link = Link() if instant else machine.fabric.link(stride).link
    name = f"{model.graph.model} on {degrees.devices} devices"
    return PlanningProblem(name, tuple(groups), edges,
                           Topology(devices, link, link), num_microbatches, overlap=overlap_rule(stages))


def overlap_rule(stages: Sequence[StageCost]) -> OverlapRule:
    """An overlapped forward and backward take the longer of their kernels and their collectives, as DualPipe hides one
    behind the other. One ratio for all stages, that of the whole model: stages with fewer collectives gain less."""
    kernels = sum(stage.spent(None) for stage in stages)
    talk = sum(stage.spent(axis) for stage in stages for axis in AXES)
    return OverlapRule(round(max(kernels, talk) / (kernels + talk) * 10**6), 10**6) if kernels else OverlapRule()


def _edges(model: ModelPieces, degrees: Degrees, stages: Sequence[StageCost], scatter: bool) -> list[GroupEdge]:
    """Values between stages, one member's part of each. ``scatter``: where tensor members all have the value, each
    sends a part; that receivers gather it over fast links is left out (Narayanan et al., SC 2021, section 4.1)."""
    stage_of = {member: number for number, stage in enumerate(stages) for piece in stage.pieces
                for member in model.pieces[piece].members}
    scale = degrees.microbatch / model.sequences
    found = []
    for value in model.graph.values:
        source = model.index.source[value.name]
        if source < 0:
            continue
        home = stage_of[source]
        targets = tuple(sorted({stage_of[reader] for reader in model.index.readers[value.name]} - {home}))
        if targets:
            parts = degrees.team if scatter else model.parts_between(source, degrees)
            size = round(model.index.num_bytes[value.name] * scale / parts)
            back = size if value.name in model.index.returns_grad else None
            found.append(GroupEdge(home, targets, size, back, value.name))
    return found


def _ns(seconds: float) -> int:
    if not 0 <= seconds < 1e9:
        raise ProblemError(f"teams: a phase of {seconds:g} s; expected rates and sizes of real devices")
    return round(seconds * 1e9)
