"""Which gradients are summed together, between which processes, and when: decided before the first step.

A parameter's sum starts as soon as nothing more is added to its gradient on this rank: replicas of a stage where the
program says ALL_REDUCE, parameters of this rank alone (summed over the plan's data-parallel copies, and over members of
its team that have parts of the sum; those of shared experts over copies that hold the same ones) after the last W that
adds to them, tied parameters at the end of the step.
Parameters that are ready together share a bucket, one flat tensor of at most about `BUCKET_BYTES`. A set of holders,
their members and copies are one group: one sum does all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mipipe.planner.actions import ActionKind
from mipipe.runtime.engine.compiling.compiled import LocalRank
from mipipe.runtime.engine.compiling.instructions import Ready, Step

BUCKET_BYTES = 25 * 2**20
"""Size of one sum; DistributedDataParallel's default, enough to hide latency."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters of one dtype whose gradients are summed over ``group`` as one flat tensor; ``what`` names them."""

    group: Any
    names: tuple[str, ...]
    what: str


def buckets_of(local: LocalRank, names: Iterable[str], what: str) -> tuple[Bucket, ...]:
    """The buckets of some parameters, by group, dtype and size, in the given order; those nobody else has are left
    out."""
    found: list[Bucket] = []
    filling: dict[tuple[object, ...], tuple[list[str], int]] = {}
    for name in names:
        holders, parameter = local.holders[name], local.weights.summed(name)
        key = (holders if len(holders) > 1 else (), local.sums.get(name, ()), local.apart(name), name in local.banks,
               parameter.dtype)
        members, size = filling.get(key, ([], 0))
        filling[key] = [*members, name], size + parameter.nbytes
        if filling[key][1] >= BUCKET_BYTES:
            found.append(Bucket(local.reduction(name), tuple(filling.pop(key)[0]), what))
    for members, _ in filling.values():
        found.append(Bucket(local.reduction(members[0]), tuple(members), what))
    return tuple(bucket for bucket in found if bucket.group is not None)


def stage_buckets(local: LocalRank, stage: int) -> tuple[Bucket, ...]:
    """What an ALL_REDUCE of a stage sums: its gradients, but not of parameters tied to other stages."""
    graded = set(local.graded)
    names = [name for name in local.stages[stage].parameters
             if name in graded and name in local.exclusive and len(local.holders[name]) > 1]
    return buckets_of(local, names, f"gradients of stage {stage}")


def with_copy_sums(local: LocalRank, resolved: Iterable[Ready]) -> tuple[Ready, ...]:
    """The rank's instructions with an ALL_REDUCE over copies and members behind the action that completes a bucket.

    Buckets fill in the order in which parameters become ready, over several actions where these are small.
    """
    instructions = list(resolved)
    name_of = {id(local.weights.summed(name)): name for name in local.weights.parameters}
    alone = {name for name in local.graded if len(local.holders[name]) == 1
             and local.reduction(name) is not None}
    if not alone:
        return tuple(instructions)
    last: dict[str, int] = {}
    for place, ready in enumerate(instructions):
        for name in gradients_of(ready, name_of):
            if name in alone:
                last[name] = place
    order = sorted(last, key=lambda name: (last[name], name))
    behind: dict[int, list[Bucket]] = {}
    copies, sums = local.mesh.num_copies, any(name in local.sums for name in alone)
    over = " and ".join([f"{copies} copies"] * (copies > 1) + ["members"] * sums)
    for bucket in (*buckets_of(local, [name for name in order if name not in local.banks],
                               f"gradients of the plan's {over}"),
                   *buckets_of(local, [name for name in order if name in local.banks],
                               "gradients of the copies that hold the same experts")):
        place = max(last[name] for name in bucket.names)
        while instructions[place + 1].kind in (ActionKind.SEND, ActionKind.RECV):  # peers' data first
            place += 1
        behind.setdefault(place, []).append(bucket)
    result: list[Ready] = []
    for place, ready in enumerate(instructions):
        result.append(ready)
        if place in behind:
            count = sum(len(bucket.names) for bucket in behind[place])
            result.append(Ready(ActionKind.ALL_REDUCE, tuple(behind[place]),
                                f"ALL_REDUCE of {count} gradients over {over}"))
    return tuple(result)


def gradients_of(ready: Ready, name_of: dict[int, str]) -> set[str]:
    """The parameters to whose gradients an instruction adds."""
    if not isinstance(ready.argument, Step):
        return set()
    return {name_of[id(parameter)] for piece in ready.argument.pieces for call in piece.part.calls
            for _, parameter, _ in call.gradients}
