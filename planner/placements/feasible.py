"""Why no plan fits: which device lacks how many bytes, and the smallest memory (or change) that would do.

Saved tensors fit at a placement if and only if one microbatch at a time does: its forwards on a rank are all saved
together before its first gradient frees any. So the bytes that a rank lacks for them are exact at a placement, and the
reason names the placement of the allowed shapes that lacks least. What would do is another question: values in flight
take memory beside saved tensors, by the order. So a size is promised only after a plan was found with it (`enough`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from mipipe.graphs.units import exact_bytes
from mipipe.planner import clock
from mipipe.planner.clock import OutOfTimeError
from mipipe.planner.device_memory import memory_for
from mipipe.planner.placements.cuts import units
from mipipe.planner.placements.shapes import all_placements, keeps_single, shapes
from mipipe.planner.placements.shortages import Shortage, fits_no_device, of_ranks, worst
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem

SECONDS = 12.0
"""Most seconds in which `enough` looks for a size that does."""

STEPS = 9
"""Sizes tried above the first, each farther from it: 0.5 % the second, twice that the next, in the end 2.3 times."""

Admits = Callable[[PlanningProblem], bool]
"""Whether a plan is found for a problem."""


def why_infeasible(problem: PlanningProblem, name: str, admits: Admits | None = None, *, proven: bool = False,
                   also: Sequence[str] = ()) -> str:
    """One line: the device, the bytes lacking, and what would do, at the allowed placement that lacks least.

    ``admits``: plans a changed problem, so that a size can be promised; without it none is. ``proven``: no placement
    at all fits, of whatever shape; else the line speaks of those that were tried. ``also``: what else would do.
    """
    alone = fits_no_device(problem)
    if alone is not None:
        return _why_none_alone(problem, name, admits, *alone)
    offered = list(all_placements(problem, name))
    allowed = [placement for placement in offered if keeps_single(problem, placement)]
    if offered and not allowed:
        return (f"placement {name!r} puts groups on several ranks that may have one replica only (their F changes"
                " buffers, such as batch statistics, or they are of expert-parallel layers); choose another placement")
    ranks = _least_lacking(problem, allowed)
    if ranks is None:
        return _why_none(problem, name)
    least, more = worst(ranks), ("use more devices", *also)
    if not least.lacking_bytes:
        return (f"at placement {least.placement} the saved tensors of one microbatch fit, but no order that was"
                " tried leaves room for the values in flight and workspaces beside them;"
                f" {_remedy(problem, ranks, admits, more)}")
    if all(item.activation_bytes <= item.activation_limit for item in ranks) and not _over_memory(ranks):
        more = more[:1]  # running forwards again saves no weights
    at = (f"even at placement {least.placement}, which lacks least" if proven else
          f"at placement {least.placement}, which lacks least of those tried")
    return (f"rank {least.rank} ({problem.topology.devices[least.rank].name}) {least}: {least.lacking_bytes} bytes lack"
            f" {at}; {_remedy(problem, ranks, admits, more)}")


def _why_none_alone(problem: PlanningProblem, name: str, admits: Admits | None, least: Shortage,
                    members: Sequence[int]) -> str:
    """One line on groups that fit no device even alone (`fits_no_device`); what would do is for all groups, where there
    is time to look at placements."""
    ranks: list[Shortage] | None = None
    with contextlib.suppress(OutOfTimeError):
        ranks = _least_lacking(problem, all_placements(problem, name))
    names = ", ".join(problem.groups[g].name for g in members[:4]) + ", ..." * (len(members) > 4)
    what, fits, split = ((f"group {names}", "fits", "split the group") if len(members) == 1 else
                         (f"groups {names}, which stay together,", "fit", "let them part"))
    return (f"{what} {fits} no device: rank {least.rank} ({problem.topology.devices[least.rank].name}), which lacks"
            f" least, {least}: {least.lacking_bytes} bytes lack;"
            f" {_remedy(problem, ranks or [least], admits, (split,))}")


def _least_lacking(problem: PlanningProblem, placements: Iterable[Placement]) -> list[Shortage] | None:
    """The ranks of the placement whose worst lacks least, the first that lacks nothing; None without placements."""
    found: list[Shortage] | None = None
    for placement in placements:
        clock.ask()
        ranks = of_ranks(problem, placement)
        if found is None or worst(ranks).lacking_bytes < worst(found).lacking_bytes:
            found = ranks
        if not worst(found).lacking_bytes:
            break
    return found


def _over_memory(ranks: Sequence[Shortage]) -> list[int]:
    """What ranks need that is more than their memory."""
    return [held for item in ranks if (held := item.resident_bytes + item.activation_bytes) > item.memory_bytes]


@dataclass(frozen=True, slots=True)
class _Raised:
    """A limit or the memory of a problem, the least size of it that a placement needs, and how it is changed."""

    what: str
    least: int
    change: Callable[[PlanningProblem, int], PlanningProblem]
    memory: bool = False


def _remedy(problem: PlanningProblem, ranks: Sequence[Shortage], admits: Admits | None, more: Sequence[str]) -> str:
    """The smallest change found of all that lacks on any rank, and what else may help."""
    raised = _lacking(problem, ranks) or _all_that_limits(problem, ranks)
    first = max(raised[0].least, 1)

    def changed(size: int) -> PlanningProblem:
        made = problem
        for one in raised:
            made = one.change(made, -(-one.least * size // first))
        return made

    size = enough(first, changed, admits)
    most, told = worst(ranks), []
    for one in raised:
        least = one.least if size is None else -(-one.least * size // first)
        given = memory_for(problem.topology.devices[most.rank], least) if one.memory else least
        told.append(exact_bytes(given) if size is not None else f"at least {given}B")
    if [one.memory for one in raised] == [True]:
        equal = len({device.memory_bytes for device in problem.topology.devices}) == 1
        what = "a device memory" if equal else "on devices that have less, a memory"
        text = (f"{what} of {told[0]} would do" if size is not None else
                f"{what} of {told[0]} is needed" if most.lacking_bytes else "more memory may do")
        return "; or ".join((text, *more))
    texts = [f"{one.what} to {given}" if size is not None or most.lacking_bytes else one.what
             for one, given in zip(raised, told, strict=True)]
    return ", or ".join((f"raise {' and '.join(texts)}", *more))


def _lacking(problem: PlanningProblem, ranks: Sequence[Shortage]) -> list[_Raised]:
    """What has to be raised for the ranks to fit."""
    residents = [item.resident_bytes for item in ranks if item.resident_bytes > item.resident_limit]
    activations = [item.activation_bytes for item in ranks if item.activation_bytes > item.activation_limit]
    together = _over_memory(ranks)
    return [_limit(label, max(needs)) for label, needs in (("resident", residents), ("activation", activations))
            if needs] + ([_memory(problem, max(together))] if together else [])


def _all_that_limits(problem: PlanningProblem, ranks: Sequence[Shortage]) -> list[_Raised]:
    """What values in flight and workspaces may lack: the limit on activations where there is one, else the memory."""
    limit = problem.limits.activation_bytes
    if limit is not None and any(item.memory_bytes - item.resident_bytes >= limit for item in ranks):
        return [_limit("activation", limit)]
    return [_memory(problem, min(item.memory_bytes for item in ranks))]


def _limit(label: str, least: int) -> _Raised:
    return _Raised(f"the {label} limit", least, lambda problem, size: problem.replace(
        limits=replace(problem.limits, **{f"{label}_bytes": size})))


def _memory(problem: PlanningProblem, least: int) -> _Raised:
    def change(given: PlanningProblem, size: int) -> PlanningProblem:
        larger = tuple(replace(device, memory_bytes=max(device.memory_bytes, size))
                       for device in given.topology.devices)
        return given.replace(topology=replace(given.topology, devices=larger))

    equal = len({device.memory_bytes for device in problem.topology.devices}) == 1
    return _Raised("the device memory" if equal else "the memory of devices that have less", least, change, True)


def enough(first: int, changed: Callable[[int], PlanningProblem], admits: Admits | None) -> int | None:
    """A size, from ``first`` on, with which a plan was found; None where none was tried or found in time.

    Larger sizes are tried until one does, then those between it and the last that did not.
    """
    if admits is None:
        return None
    ends, known = time.monotonic() + SECONDS, None
    low = first
    with contextlib.suppress(OutOfTimeError), clock.watched(lambda: ends - time.monotonic()):
        for step in range(STEPS + 1):
            size = _round_up(first + (first * 2**step // 400 if step else 0))
            if admits(changed(size)):
                known = size
                break
            low = size
        while known is not None and known - low > max(1, known // 500) and low >= first and known != _round_up(first):
            middle = _round_up((low + known) // 2)
            if middle >= known:
                break
            if admits(changed(middle)):
                known = middle
            else:
                low = middle
    return known


def _round_up(size: int) -> int:
    """The size with four digits, not less: as a person would write it."""
    scale = max(1, 10 ** (len(str(size)) - 4))
    return -(-size // scale) * scale


def _why_none(problem: PlanningProblem, name: str) -> str:
    """One line on a shape that does not exist: for other numbers of ranks only, or for more blocks of groups."""
    ranks, blocks = problem.num_ranks, len(units(problem))
    stages = min((shape.num_stages for shape in shapes(ranks, name)), default=None)
    text = f"placement {name!r} does not exist for {ranks} rank{'s' * (ranks > 1)} and {len(problem.groups)} groups"
    if stages is not None and blocks < stages:
        return f"{text}: it has {stages} stages; split the model into more groups or choose another placement"
    fitting = next((more for more in range(ranks + 1, ranks + 4) if shapes(more, name)), None)
    if stages is None and fitting is not None:
        return f"{text}; use {fitting} ranks or choose another placement"
    return f"{text}; choose another placement"


def with_recomputation(problem: PlanningProblem, placement: Placement) -> list[Placement]:
    """The placement with F run twice: by every stage that may, and by the first half of them only."""
    may = [index for index, stage in enumerate(placement.stages)
           if all(problem.groups[group].recompute_bytes is not None for group in stage.groups)]
    return [_recomputing(placement, chosen) for chosen in (may[:(len(may) + 1) // 2], may) if chosen]


def _recomputing(placement: Placement, chosen: Sequence[int]) -> Placement:
    stages = tuple(replace(stage, recompute=index in set(chosen)) for index, stage in enumerate(placement.stages))
    return replace(placement, stages=stages, name=f"{placement.name}+recompute")
