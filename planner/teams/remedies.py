"""What would make a configuration fit that does not: the smallest change of one degree, tried in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mipipe.graphs.errors import MipipeError
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.pricing import Pricer


def remedy(pricer: Pricer, result: TeamResult) -> str:
    """A clause that names the first change that fits, or the memory that would do."""
    for degrees, text in changes(result.degrees, pricer.model.recompute):
        try:
            found = evaluate_teams(pricer, degrees, result.global_batch,
                                   schedule="1F1B" if degrees.chunks == 1 else "interleaved")
        except MipipeError:
            continue
        if not found.shortage:
            return f"{text} would fit"
    most = max(item.peak for item in result.memory)
    enough = f"{-(-most // 10**9)}GB" if most > 10**10 else f"{-(-most // 10**6)}MB"
    return f"no single change of a degree would fit; --memory {enough} would"


def changes(degrees: Degrees, ways: Sequence[Recompute]) -> Iterator[tuple[Degrees, str]]:
    """Degrees with one thing changed, the cheapest first; copies make room for what grows. ``ways``: of recomputation
    that there are."""
    if degrees.microbatch > 1:
        yield replace(degrees, microbatch=1), "--microbatch 1"
    if degrees.zero == 0 and degrees.copies * degrees.context > 1:
        yield replace(degrees, zero=1), "zero=1"
    for way in ways if degrees.recompute == "none" else ():
        if way not in ("none", "full"):
            yield replace(degrees, recompute=way), f"--recomputation {way}"
    if degrees.tensor > 1 and not degrees.sequence:
        yield replace(degrees, sequence=True), f"sequence={degrees.tensor} in place of tensor={degrees.tensor}"
    for factor in (2, 4, 8):
        if degrees.copies % factor == 0:
            copies = degrees.copies // factor
            for name in ("tensor", "ranks", "context"):
                size = getattr(degrees, name) * factor
                given = "sequence" if name == "tensor" and degrees.sequence else name
                yield replace(degrees, **{name: size}, copies=copies), f"{given}={size} with copies={copies}"
    if degrees.recompute != "full":
        yield replace(degrees, recompute="full"), "--recomputation full"
    if degrees.zero < 3 and degrees.copies * degrees.context > 1:
        yield replace(degrees, zero=3), "zero=3"
    for factor in (2, 4, 8, 16):
        for name in ("tensor", "ranks"):
            size = getattr(degrees, name) * factor
            yield replace(degrees, **{name: size}), f"{name}={size} on {factor} times the devices"
