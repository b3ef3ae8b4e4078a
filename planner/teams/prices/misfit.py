"""Whether a model and a batch divide by degrees: why not and what would do, and what stays whole all the same."""

from __future__ import annotations

from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import Role
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import ModelPieces


def misfit(model: ModelPieces, degrees: Degrees, global_batch: int) -> str | None:
    """Why a model and batch do not divide by the degrees, in one line with what would do; None where they do."""
    count = len(model.pieces)
    if degrees.ranks * degrees.chunks > count:
        return (f"ranks={degrees.ranks}" + (f" x chunks={degrees.chunks}" if degrees.chunks > 1 else "")
                + f" stages, but the model has {count} pieces that can be apart; at most {count} stages")
    each, left = divmod(global_batch, degrees.copies)
    if left or each % degrees.microbatch:
        return (f"--global-batch {global_batch} does not divide into copies={degrees.copies} x --microbatch"
                f" {degrees.microbatch} sequences; {_near(global_batch, degrees.copies * degrees.microbatch)} would")
    for segment in {piece.members: piece for piece in model.kinds}:
        for member in segment:
            reason = _member_misfit(model, member, degrees)
            if reason is not None:
                return reason
    parts = degrees.context * (degrees.tensor if degrees.sequence else 1)
    if model.tokens is not None and model.tokens % parts:
        return (f"sequences of {model.tokens} tokens do not divide into context={degrees.context}"
                + (f" x sequence={degrees.tensor}" if degrees.sequence else "")
                + f" parts; {_divisors(model.tokens, parts)} parts would, or {_near(model.tokens, parts)} tokens")
    if degrees.team * degrees.copies % degrees.expert:
        every = degrees.team * degrees.copies
        return (f"expert={degrees.expert} does not divide the {every} devices of a rank over all copies (tensor x"
                f" context x copies); {_divisors(every, every)} would")
    return None


def samples_misfit(model: ModelPieces, degrees: Degrees) -> str | None:
    """Why a microbatch does not divide among members that have samples each, in one line; None where it does."""
    named = ",".join(f"{branch}={mode}" for branch, mode in model.own_modes(degrees).items() if mode == "batch")
    if not named or not degrees.microbatch % degrees.tensor:
        return None
    return (f"--modes {named}: microbatches of {degrees.microbatch} samples do not divide among the {degrees.tensor}"
            f" members of the tensor axis; --microbatch {_near(degrees.microbatch, degrees.tensor)} would")


def _member_misfit(model: ModelPieces, member: int, degrees: Degrees) -> str | None:
    heads, banks = model.heads_and_banks[model.graph.segments[member].trace]
    name, mode = model.graph.segments[member].name, model.mode(member, degrees)
    if heads is not None and heads[0] % degrees.tensor and mode != "batch":
        return (f"tensor={degrees.tensor} does not divide the {heads[0]} heads of {name};"
                f" {_divisors(heads[0], heads[0])} would")
    if degrees.expert > 1 and model.graph.segments[member].tags.role is Role.EXPERTS:
        if mode == "batch" and not model.exchanges:
            return (f"expert={degrees.expert} divides the experts of {name} along the tensor axis, where --modes gives"
                    " their branch the mode batch; leave one of both out")
        wrong = [size for size in banks if size % degrees.expert]
        if wrong:
            return (f"expert={degrees.expert} does not divide the {wrong[0]} experts of {name};"
                    f" {_divisors(wrong[0], wrong[0])} would")
    return None


_SMALL = (Role.ROUTER, Role.DISPATCH, Role.COMBINE)


def indivisible_of(model: ModelPieces, degrees: Degrees) -> tuple[str, ...]:
    """What every member of the tensor or the context axis has in whole: a line for each reason, but of single matrices
    of a segment that are cheaper so, of routers, and of what has no products."""
    found: dict[str, list[str]] = {}
    for piece in model.kinds if degrees.team > 1 else ():
        for member in piece.members:
            segment, trace = model.graph.segments[member], model.index.traces[member]
            apart = segment.tags.role is Role.EXPERTS and degrees.expert > 1  # these have experts of their own
            counts = segment.tags.role not in _SMALL and not apart and any(item.flops for item in trace.operators)
            for share in model.shares(member, degrees) if counts else ():
                for reason in share.whole:
                    if not (share.dims and "would send more" in reason):
                        found.setdefault(reason, []).append(segment.name)
    return tuple(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in found.items())


def _divisors(value: int, most: int) -> str:
    """The numbers up to ``most`` that divide a value."""
    return ", ".join(str(size) for size in range(1, most + 1) if value % size == 0)


def _near(value: int, step: int) -> str:
    low = value // step * step
    return f"{low} or {low + step}" if low else str(step)


def check_fits(model: ModelPieces, degrees: Degrees, global_batch: int) -> None:
    """Raise `InputError` with the one line of `misfit`."""
    reason = misfit(model, degrees, global_batch)
    if reason is not None:
        raise InputError(f"--degrees: {reason}")
    reason = samples_misfit(model, degrees)
    if reason is not None:
        raise InputError(reason)
    if degrees.expert > 1 and not model.has_experts:
        raise InputError(f"--degrees: expert={degrees.expert}, but the model has no experts to divide")
