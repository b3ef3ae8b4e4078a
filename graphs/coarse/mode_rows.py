"""What modes of a graph's blocks compute, send and keep, as plain rows for a terminal or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.modes import CollectiveKind, Layout, ModeProfile, PhaseWork
from mipipe.graphs.operator_graph import OperatorGraph, Phase, SegmentTrace

_SHORT = {CollectiveKind.ALL_REDUCE: "AR", CollectiveKind.ALL_GATHER: "AG", CollectiveKind.REDUCE_SCATTER: "RS",
          CollectiveKind.ALL_TO_ALL: "A2A"}
LEGEND = ("flops, sent (whole tensors of each collective) and kept bytes are those of one member and one microbatch;"
          " AR all-reduce, AG all-gather, RS reduce-scatter, A2A all-to-all, n x: so many of a kind")


def mode_rows(graph: OperatorGraph, members: int) -> list[dict[str, Any]]:
    """One row for each distinct block and mode on teams of ``members``, after the block on one device.

    Keys: ``block`` (the first of its kind), ``alike`` (how many there are), ``mode``, ``F_gflop``, ``I_gflop``,
    ``W_gflop``, ``F_sends``, ``I_sends``, ``W_sends``, ``resident_mb``, ``saved_mb``, ``takes``, ``gives``.

    Raises:
        InputError: the graph has no profile for teams of this size.
    """
    profiles = _profiles(graph, members)
    counts = Counter(segment.trace for segment in graph.segments)
    rows: list[dict[str, Any]] = []
    for trace in graph.traces:
        name = next(segment.name for segment in graph.segments if segment.trace == trace.digest)
        rows.append(_whole_row(graph, trace, name, counts[trace.digest]))
        for profile in profiles:
            if profile.trace == trace.digest:
                rows.append(_row(profile))
    return rows


def undivided(graph: OperatorGraph, members: int) -> list[str]:
    """What modes leave whole on every member, and why: ``block, mode: reason``, each reason once."""
    first = {segment.trace: segment.name for segment in reversed(graph.segments)}
    return list(dict.fromkeys(f"{first[profile.trace]}, {profile.mode}: {reason}"
                              for profile in _profiles(graph, members) for reason in profile.whole))


def _profiles(graph: OperatorGraph, members: int) -> list[ModeProfile]:
    known = graph.modes.profiles if graph.modes is not None else ()
    found = [profile for profile in known if profile.members == members]
    if not found:
        sizes = sorted({profile.members for profile in known})
        has = f"those for {', '.join(map(str, sizes))} members" if sizes else "none"
        raise InputError(f"modes of {graph.model} for {members} members: found {has} in the graph; add them with"
                         f" mipipe capture GRAPH.json --modes tensor,sequence,batch --team {members} -o GRAPH.json")
    return found


def _row(profile: ModeProfile) -> dict[str, Any]:
    resident = profile.resident.dense + profile.resident.experts
    return {"block": "", "alike": None, "mode": profile.mode,
            **{f"{phase}_gflop": _gflop(profile.phases, phase) for phase in Phase},
            **{f"{phase}_sends": sends(profile.phases.get(phase)) for phase in Phase},
            "resident_mb": resident / 1e6, "saved_mb": (profile.kept.fi + profile.kept.fw) / 1e6,
            "takes": _layouts(profile.inputs), "gives": _layouts(profile.outputs)}


def _whole_row(graph: OperatorGraph, trace: SegmentTrace, name: str, count: int) -> dict[str, Any]:
    """The block on one device."""
    resident = sum(trace.specs[item].num_bytes for item in (*trace.parameters, *trace.buffers))
    saved = sum(item.num_bytes for item in trace.saved if item.source is Phase.F)
    return {"block": name, "alike": count, "mode": "one device",
            **{f"{phase}_gflop": trace.flops(phase) / 1e9 if trace.has(phase) else None for phase in Phase},
            **{f"{phase}_sends": "" for phase in Phase}, "resident_mb": resident / 1e6, "saved_mb": saved / 1e6,
            "takes": "", "gives": ""}


def _gflop(phases: dict[Phase, PhaseWork], phase: Phase) -> float | None:
    return phases[phase].flops / 1e9 if phase in phases else None


def sends(work: PhaseWork | None) -> str:
    """``AR 0.52 MB, 2x AG 1.05 MB``."""
    if work is None:
        return ""
    return ", ".join((f"{item.count}x " if item.count > 1 else "") + f"{_SHORT[item.kind]} {_size(item.num_bytes)}"
                     for item in work.collectives)


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


def _layouts(layouts: Sequence[Layout]) -> str:
    """The layouts of a block's inputs or outputs that differ, in order."""
    return ", ".join(dict.fromkeys(layout.value for layout in layouts))
