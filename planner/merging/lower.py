"""From a merge plan to its `Program`: what every rank reads, measures, merges and writes, portion by portion.

A unit (one tensor of the output) is walked in `MergeStep`s: some rows of one of its pieces, read once. Statistics over
several tensors come first, round by round, each round ended by an ALL_REDUCE of all ranks; then every unit is merged,
its own statistics before it. ::

    LOAD s, LOAD s+1, COMBINE s, FREE s, SAVE s, LOAD s+2, COMBINE s+1, ...          (with one step read ahead)

A stage of the program is a unit's index, a microbatch a step's number within its unit. Tensors whose rows are gathered
(a joined vocabulary, experts to be matched) are read where they are needed, inside MEASURE and COMBINE, and have no
LOAD. How large portions are and how many are read ahead is the plan's choice, made for speed and memory; results do
not depend on it, because tiles do not.

Where a method reads what running the models finds out, CALIBRATE comes first: a stage is then a stream's number, a
microbatch its step (`mipipe.graphs.calibration.streams.ModelStream`), and an ALL_REDUCE ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mipipe.graphs.merging.passes import is_wide, num_rounds
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.merging.calibration import step_name
from mipipe.planner.merging.plan import MergePlan
from mipipe.planner.merging.steps import MergeStep, is_gathered, unit_steps
from mipipe.planner.program import Instruction, Program

CALIBRATED = -1
"""The number of the round in which ranks wait until all models have been run."""


def label(plan: MergePlan, instruction: Instruction) -> str:
    """An instruction in words: ``COMBINE model.norm.weight, step 0``."""
    action = instruction.action
    if action is not None and action.kind is ActionKind.CALIBRATE:
        assert plan.graph.calibration is not None
        stream = plan.graph.calibration.streams[action.stage]
        return (f"{instruction.kind} {' beside '.join(plan.graph.models[item.model].label for item in stream.members)},"
                f" {step_name(stream, action.microbatch, plan.graph.calibration.num_layers)}")
    if action is None and instruction.stage == CALIBRATED:
        return f"{instruction.kind} after calibration"
    if action is None:
        return f"{instruction.kind} of round {instruction.stage}"
    return f"{instruction.kind} {plan.graph.units[action.stage].name}, step {action.microbatch}"


def lower_merge(plan: MergePlan) -> Program:
    """The program of a merge."""
    return Program(tuple(lower_rank(plan, rank) for rank in range(len(plan.ranks))), ())


def lower_rank(plan: MergePlan, rank: int) -> tuple[Instruction, ...]:
    """One rank's instructions."""
    graph = plan.graph
    steps = {index: unit_steps(graph.units[index], graph, plan.portion_entries) for index in plan.ranks[rank]}
    everyone = tuple(range(len(plan.ranks)))
    instructions = _calibrate(plan, rank, everyone)
    for number in range(max((num_rounds(unit) for unit in graph.units if is_wide(unit)), default=0)):
        chosen = [(index, place) for index in plan.ranks[rank] for place, step in enumerate(steps[index])
                  if step.wide and step.round == number]
        instructions += _walk(plan, chosen, steps)
        instructions.append(Instruction(ActionKind.ALL_REDUCE, Stream.COLLECTIVE, stage=number, peers=everyone))
    instructions += _walk(plan, [(index, place) for index in plan.ranks[rank]
                                 for place, step in enumerate(steps[index]) if not step.wide], steps)
    return tuple(instructions)


def _calibrate(plan: MergePlan, rank: int, everyone: tuple[int, ...]) -> list[Instruction]:
    """Running the models, stream by stream and layer by layer; then all ranks wait for each other."""
    calibration = plan.graph.calibration
    if calibration is None:
        return []
    found = [Instruction(ActionKind.CALIBRATE, Stream.COMPUTE, Action(index, ActionKind.CALIBRATE, step))
             for index in plan.streams[rank]
             for step in range(calibration.streams[index].num_steps(calibration.num_layers))]
    return [*found, Instruction(ActionKind.ALL_REDUCE, Stream.COLLECTIVE, stage=CALIBRATED, peers=everyone)]


def _walk(plan: MergePlan, chosen: Sequence[tuple[int, int]],
          steps: dict[int, list[MergeStep]]) -> list[Instruction]:
    """Steps one after another, each read ``plan.ahead`` steps before it is needed."""
    instructions: list[Instruction] = []

    def add(kind: ActionKind, place: int, stream: Stream = Stream.COMPUTE) -> None:
        index, step = chosen[place]
        instructions.append(Instruction(kind, stream, Action(index, kind, step)))

    loaded = [not is_gathered(plan.graph.units[index], plan.graph) for index, _ in chosen]
    for place, (index, number) in enumerate(chosen):
        for other in range(place if place == 0 else place + plan.ahead, min(place + plan.ahead + 1, len(chosen))):
            if loaded[other]:
                add(ActionKind.LOAD, other, Stream.CHANNEL)
        step = steps[index][number]
        copied = plan.graph.units[index].method == "copy"
        if not copied:
            add(step.kind, place)
            if loaded[place]:
                add(ActionKind.FREE, place)
        if step.round is None:
            add(ActionKind.SAVE, place)
        if copied:
            add(ActionKind.FREE, place)
    return instructions
