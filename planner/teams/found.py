"""What a search of degrees found: the best, its bounds, and what makes the others lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mipipe.planner.gap import gap_of
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import TeamResult


@dataclass
class Found:
    """What a search found: the best, what came next and why it loses, and bounds in seconds over all degrees:
    ``bound`` over all placements and orders, ``whole_bound`` over placements with every layer on one rank,
    ``plain_bound`` over those of them without overlapped pairs; ``interrupted``: Ctrl-C ended the search."""

    best: TeamResult
    bound: float
    whole_bound: float
    plain_bound: float
    runners: list[tuple[TeamResult, str]]
    notes: list[str]
    combinations: int
    fitting: int
    solved: int
    seconds: float
    interrupted: bool = False

    @property
    def gap(self) -> float | None:
        """To the bound over all placements; None where there is none."""
        return gap_of(self.best.seconds, self.bound)

    @property
    def whole_gap(self) -> float | None:
        """To the bound over placements with every layer on one rank; None where the best is none of them."""
        one = all(len(stage.ranks) == 1 for stage in self.best.plan.placement.stages)
        return gap_of(self.best.seconds, self.whole_bound) if one else None

    @property
    def plain_gap(self) -> float | None:
        """To the bound without overlapped pairs, too; None where the best has some."""
        if self.whole_gap is None or self.best.plan.schedule.has_pairs:
            return None
        return gap_of(self.best.seconds, self.plain_bound)

    def how(self) -> str:
        """How the best was found, in a few words."""
        return (f"best of {self.combinations:,} combinations of degrees ({self.fitting:,} found that may fit,"
                f" {self.solved} solved) in {self.seconds:.1f} s" + (", interrupted" if self.interrupted else ""))

    def bound_text(self) -> str:
        """Step, bound and gap."""
        told = self.gap
        shown = "no gap to it" if told is None else "proven optimal" if told < 5e-5 else f"gap {told:.1%}"
        text = (f"step {self.best.seconds:.4g} s, bound over all degrees, placements and orders {self.bound:.4g} s"
                f" ({shown})")
        for gap, bound, what in ((self.whole_gap, self.whole_bound, "with every layer on one rank"),
                                 (self.plain_gap, self.plain_bound, "and no overlapped pairs")):
            if gap is not None and told is not None and gap <= told - 5e-4:
                what = what if told != self.gap or what.startswith("with") else f"with every layer on one rank {what}"
                text, told = f"{text}; {what} {bound:.4g} s (gap {gap:.1%})", gap
        return text

    def data(self, told: Callable[[TeamResult], dict[str, Any]]) -> dict[str, Any]:
        """As JSON data, beside the best's own."""
        return {"bound_s": self.bound, "gap": self.gap, "whole_bound_s": self.whole_bound,
                "whole_gap": self.whole_gap, "plain_bound_s": self.plain_bound, "plain_gap": self.plain_gap,
                "combinations": self.combinations, "solved": self.solved,
                "seconds": round(self.seconds, 3), "interrupted": self.interrupted, "notes": self.notes,
                "runners_up": [{**told(result), "loses_by": why} for result, why in self.runners]}


def _axes(result: TeamResult) -> tuple[int, ...]:
    degrees = result.degrees
    return degrees.ranks, degrees.tensor, degrees.context, degrees.expert, degrees.copies


def distinct(results: list[TeamResult]) -> int:
    return len({_axes(item) for item in results})


def runners_of(results: list[TeamResult]) -> list[tuple[TeamResult, str]]:
    """The best of other degrees, each with the parts of a step in which it loses most."""
    top, seen = results[0], {_axes(results[0])}
    found: list[tuple[TeamResult, str]] = []
    for item in results[1:]:
        if _axes(item) in seen or len(found) == EFFORT.told:
            continue
        seen.add(_axes(item))
        found.append((item, why_slower(item, top)))
    return found


def why_slower(item: TeamResult, top: TeamResult) -> str:
    """What one configuration spends more than another, the largest first, and what it saves most."""
    def parts(result: TeamResult) -> dict[str, float]:
        times = result.times
        return {"kernels": times.kernels, **{f"{axis} communication": seconds for axis, seconds in times.axes.items()},
                "pipeline communication": times.pipeline, "bubble": times.bubble, "optimizer": times.optimizer}

    mine, other = parts(item), parts(top)
    more = sorted(((mine[name] - other[name], name) for name in mine), reverse=True)
    worse = [f"{name} +{seconds:.3g} s" for seconds, name in more[:2] if seconds > 0.002 * top.seconds]
    saved = [f"{name} {seconds:.3g} s" for seconds, name in more[-1:] if seconds < -0.002 * top.seconds]
    return ", ".join(worse + saved) or "about equal"


def notes_of(results: list[TeamResult], top: TeamResult) -> list[str]:
    """What the best without a pipeline, or with one, takes; and that with other modes of branches."""
    return [*_pipeline_notes(results, top), *_mode_notes(results, top)]


def _mode_notes(results: list[TeamResult], top: TeamResult) -> list[str]:
    chosen = top.degrees.batch_branches
    item = next((item for item in results if bool(item.degrees.batch_branches) != bool(chosen)), None)
    if item is None:
        return []
    other = "one mode for all branches" if chosen else f"{', '.join(item.degrees.batch_branches)} in batch mode"
    return [f"with {other} the best one tried ({item.degrees.text()}) takes {item.seconds:.4g} s,"
            f" {item.seconds / top.seconds - 1:+.1%}: {why_slower(item, top)}"]


def _pipeline_notes(results: list[TeamResult], top: TeamResult) -> list[str]:
    pipelines = [item for item in results if item.degrees.ranks > 1]
    alone = [item for item in results if item.degrees.ranks == 1]
    if top.degrees.ranks == 1 and pipelines:
        item = pipelines[0]
        return [f"no pipeline: the best one tried ({item.degrees.text()}) takes {item.seconds:.4g} s,"
                f" {item.seconds / top.seconds - 1:+.1%}: {why_slower(item, top)}"]
    if top.degrees.ranks > 1 and alone:
        item = alone[0]
        return [f"a pipeline pays: without one ({item.degrees.text()}) the step takes {item.seconds:.4g} s,"
                f" {item.seconds / top.seconds - 1:+.1%}: {why_slower(item, top)}"]
    return []
