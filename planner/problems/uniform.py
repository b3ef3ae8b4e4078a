"""Abstract models with equal layers: the setting of the published schedules and of `mipipe compare`.

What is modelled: a chain of equal layers, each with the same share of one *even stage*'s durations (the even cut gives
every rank ``layers / ranks`` layers), an optional embedding before and head after it, equal devices, equal links that
take ``comm`` for any transfer.

Conventions, stated because every comparison rests on them:

- An activation is held from the start of F to the end of W (as in DualPipe's table): all saved bytes are ``saved_fw``.
  Its unit is one even stage's activation of one microbatch: all saved bytes of the model / ranks.
- Parameters are counted in even shares: all resident bytes of the model / ranks; ``copies`` caps a rank's sum.
- The embedding and the head have durations only: neither parameters nor activations are counted on them.
- Gradient reduction between copies costs nothing (``gradient_bytes`` is 0), values in flight take no memory.
- Durations may be fractions (1.1). ``unit_ns`` is the least multiple of a millisecond that makes all of them whole.
"""

from __future__ import annotations

import math
from fractions import Fraction

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.operator_graph import Role, Tags
from mipipe.graphs.topology import MOST_DEVICES, Topology
from mipipe.graphs.units import MILLISECOND_NS, shown
from mipipe.planner.actions import Stream
from mipipe.planner.problem import Group, GroupEdge, Limits, OverlapRule, PhaseTimes, PlanningProblem
from mipipe.planner.sizes import MOST_COUNT

Number = int | float | str | Fraction

_KIND = "device"
_BYTES = 1000
"""Bytes of ``1 / ranks`` of a layer: fine enough that caps such as 8.5 or 0.75 * 33 activations are whole bytes."""

FINEST = MILLISECOND_NS
"""Numbers are multiples of a fraction no smaller than 1 of so many; what is above 0 and rounds to it is refused."""

MOST_CELLS = 16 * MOST_COUNT
"""Ranks x microbatches: 16 ranks with the most microbatches, for which the published schedules alone take minutes."""


def uniform_problem(*, ranks: int, microbatches: int, f: Number, i: Number, w: Number, comm: Number = 0,
                    fb: Number | None = None, layers: int | None = None, first: Number = 0, last: Number = 0,
                    copies: Number = 2, activations: Number | None = None, name: str = "") -> PlanningProblem:
    """A chain of ``layers`` equal layers (default 2 per rank) on equal devices.

    Args:
        ranks: devices; microbatches: microbatches of one step.
        f, i, w: durations of an even stage's F, I and W, in units.
        comm: duration of each transfer between ranks.
        fb: duration of an overlapped F&B of an even stage; by default F + I + W (no gain).
        first, last: time of the embedding and of the head, each a fraction of an even stage's.
        copies: cap on a rank's parameters, in even shares.
        activations: cap on a rank's activations, in units; by default ranks + 1.

    Raises:
        ProblemError: a size below 1, a negative number, or one above 0 that rounds to it (`FINEST`).
    """
    layers = 2 * ranks if layers is None else layers
    _check_sizes(ranks, microbatches, layers)
    times = [_exact(value, label) for value, label in ((f, "f"), (i, "i"), (w, "w"))]
    share = Fraction(ranks, layers)
    ends = {"embedding": _exact(first, "first"), "head": _exact(last, "last")}
    pause = _exact(comm, "comm")
    shares = [share] * layers
    names = [f"layer{n}" for n in range(layers)]
    roles = [Role.OTHER] * layers
    if ends["embedding"]:
        shares, names, roles = [ends["embedding"], *shares], ["embedding", *names], [Role.EMBEDDING, *roles]
    if ends["head"]:
        shares, names, roles = [*shares, ends["head"]], [*names, "head"], [*roles, Role.HEAD]
    unit_ns = _unit([time * part for time in times for part in {*shares, Fraction(1)}] + [pause])
    groups = []
    for label, part, role in zip(names, shares, roles, strict=True):
        size = _BYTES * ranks if role is Role.OTHER else 0
        f_ns, i_ns, w_ns = (int(time * part * unit_ns) for time in times)
        layer = int(label.removeprefix("layer")) if role is Role.OTHER else None
        groups.append(Group(label, {_KIND: PhaseTimes(f_ns, i_ns, w_ns)}, resident_bytes=size, saved_fw_bytes=size,
                            tags=Tags(layer=layer, role=role)))
    edges = tuple(GroupEdge(n, (n + 1,), value=f"{names[n]}.out") for n in range(len(groups) - 1))
    return PlanningProblem(
        name or f"uniform-{ranks}x{microbatches}", tuple(groups), edges,
        Topology.uniform(ranks, latency_ns=int(pause * unit_ns), kind=_KIND), microbatches,
        limits=_limits(layers, ranks, copies, activations), overlap=_overlap(times, fb), unit_ns=unit_ns)


def two_stream_problem(*, ranks: int, microbatches: int, layers: int | None = None, comm: Number = 2,
                       fb: Number | None = 60, copies: Number = 2, activations: Number | None = None,
                       attention: tuple[Number, Number, Number] = (10, 13, 7),
                       dispatch: tuple[Number, Number] = (8, 8),
                       experts: tuple[Number, Number, Number] = (10, 10, 10),
                       combine: tuple[Number, Number] = (8, 8), name: str = "") -> PlanningProblem:
    """A chain of MoE layers (default one per rank), each attention, dispatch, experts, combine on one rank.

    Attention and experts compute; dispatch and combine are all-to-alls on the collective stream, without W. The numbers
    are an even stage's (F, I, W) of each operator; ``fb`` is the overlapped F&B of a whole even stage, for schedules
    that count it as one block. Parameters and activations are half the attention's and half the experts', each half
    held from its own F's start to its own W's end, which is never longer than the whole stage would hold it.

    Raises:
        ProblemError: as `uniform_problem`.
    """
    layers = ranks if layers is None else layers
    _check_sizes(ranks, microbatches, layers)
    share = Fraction(ranks, layers)
    operators = {"attention": attention, "dispatch": dispatch, "experts": experts, "combine": combine}
    times = {label: [_exact(value, label) for value in values] for label, values in operators.items()}
    pause = _exact(comm, "comm")
    unit_ns = _unit([time * part for values in times.values() for time in values for part in (share, Fraction(1))]
                    + [pause])
    roles = {"attention": Role.ATTENTION, "dispatch": Role.DISPATCH, "experts": Role.EXPERTS, "combine": Role.COMBINE}
    groups = []
    for layer in range(layers):
        for label, values in times.items():
            f_ns, i_ns, *w_ns = (int(time * share * unit_ns) for time in values)
            size = _BYTES * ranks // 2 if w_ns else 0
            groups.append(Group(
                f"layer{layer}.{label}", {_KIND: PhaseTimes(f_ns, i_ns, w_ns[0] if w_ns else None)},
                stream=Stream.COMPUTE if w_ns else Stream.COLLECTIVE, resident_bytes=size, saved_fw_bytes=size,
                tags=Tags(layer=layer, role=roles[label])))
    edges = tuple(GroupEdge(n, (n + 1,), value=f"{groups[n].name}.out") for n in range(len(groups) - 1))
    totals = [sum((values[phase] for values in times.values() if phase < len(values)), Fraction(0))
              for phase in range(3)]
    return PlanningProblem(
        name or f"two-stream-{ranks}x{microbatches}", tuple(groups), edges,
        Topology.uniform(ranks, latency_ns=int(pause * unit_ns), kind=_KIND), microbatches,
        limits=_limits(layers, ranks, copies, activations),
        colocate=tuple(tuple(range(4 * layer, 4 * layer + 4)) for layer in range(layers)),
        overlap=_overlap(totals, fb), unit_ns=unit_ns)


def parameter_share_bytes(problem: PlanningProblem) -> Fraction:
    """Resident bytes of one rank if the model were cut evenly: the unit of ``parameter_copies``."""
    return Fraction(sum(group.resident_bytes for group in problem.groups), problem.num_ranks)


def activation_unit_bytes(problem: PlanningProblem) -> Fraction:
    """One even stage's activation of one microbatch (of load 1.0): the unit of ``peak_activations``."""
    saved = sum(group.saved_fi_bytes + group.saved_fw_bytes for group in problem.groups)
    return Fraction(saved, problem.num_ranks)


def in_copies(problem: PlanningProblem, resident_bytes: int) -> float:
    """A rank's resident bytes in even shares of the model; 0.0 where the problem counts no parameters."""
    share = parameter_share_bytes(problem)
    return float(resident_bytes / share) if share else 0.0


def in_activations(problem: PlanningProblem, num_bytes: int) -> float:
    """A rank's activation bytes in units of `activation_unit_bytes`; 0.0 where the problem counts none."""
    unit = activation_unit_bytes(problem)
    return float(num_bytes / unit) if unit else 0.0


def in_units(problem: PlanningProblem, time_ns: int | Fraction) -> float:
    """A duration in the unit people gave the problem's durations in."""
    return float(Fraction(time_ns) / problem.unit_ns)


def _exact(value: Number, label: str) -> Fraction:
    """The number meant: the nearest fraction with a denominator up to `FINEST`, so 1.1 is 11/10, not its float."""
    try:
        meant = Fraction(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ProblemError(f"{label}: found {value!r}, expected a number") from None
    if meant < 0:
        raise ProblemError(f"{label}: found {value}, expected no number below 0")
    exact = meant.limit_denominator(FINEST)
    if meant and not exact:
        raise ProblemError(f"{label}: found {value}, expected 0 or at least 1/{FINEST:,}; give all numbers in a"
                           " smaller unit")
    return exact


def _unit(times: list[Fraction]) -> int:
    return math.lcm(MILLISECOND_NS, *(time.denominator for time in times))


def _check_sizes(ranks: int, microbatches: int, layers: int) -> None:
    for label, value in (("ranks", ranks), ("microbatches", microbatches), ("layers", layers)):
        most = MOST_DEVICES if label == "ranks" else MOST_COUNT
        if not 1 <= value <= most:
            raise ProblemError(f"{label}: found {shown(value)}, expected at least 1 and at most {most}")
    if ranks * microbatches > MOST_CELLS:
        raise ProblemError(f"ranks x microbatches: found {ranks} x {microbatches}, expected at most {MOST_CELLS:,} in"
                           " all")


def _limits(layers: int, ranks: int, copies: Number, activations: Number | None) -> Limits:
    cap = Fraction(ranks + 1) if activations is None else _exact(activations, "activations")
    unit = layers * _BYTES
    return Limits(resident_bytes=int(_exact(copies, "copies") * unit), activation_bytes=int(cap * unit))


def _overlap(times: list[Fraction], fb: Number | None) -> OverlapRule:
    """The rule that gives an even stage's F&B the duration ``fb``."""
    total = sum(times, Fraction(0))
    if fb is None or not total:
        return OverlapRule()
    ratio = _exact(fb, "fb") / total
    if not ratio:
        raise ProblemError(f"fb: found {fb}, expected a duration above 0")
    if max(ratio.numerator, ratio.denominator) > 2**31:
        raise ProblemError(f"fb: found {fb}, expected a duration near F + I + W = {float(total):g}")
    return OverlapRule(ratio.numerator, ratio.denominator)
