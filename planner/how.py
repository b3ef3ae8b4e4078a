"""How a plan came about: who proposed its placement, who made its order, what its bounds rest on, what HiGHS did.

Steps are names. What HiGHS solved is named after its formulation, which ends in "MIP" or "LP" (``placement MIP``,
``windows MIP``); all else is somebody else's: ``shape v``, ``published ZB-V``, ``list``, ``quotas``, ``annealing``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mipipe.graphs.serialize import STRICT, from_data
from mipipe.planner.milp.calls import SolverCalls
from mipipe.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class How:
    """How a plan came about.

    ``placement``: who proposed it, then who changed it. ``order``: the steps that led to it, each from the one before.
    ``bound``: the argument for the plan's ``bound_ns``, ``placement_bound`` that for its ``placement_bound_ns``; empty
    where there is none. ``highs``: all calls of the solve, whether they helped or not.
    """

    __pydantic_config__: ClassVar = STRICT
    placement: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    bound: str = ""
    placement_bound: str = ""
    highs: tuple[SolverCalls, ...] = ()

    @property
    def calls(self) -> int:
        """HiGHS's calls in all."""
        return sum(row.calls for row in self.highs)

    @property
    def seconds(self) -> float:
        """HiGHS's seconds in all."""
        return sum(row.seconds for row in self.highs)

    @property
    def nodes(self) -> int:
        """HiGHS's nodes of branch and bound in all."""
        return sum(row.nodes for row in self.highs)

    @property
    def highs_part(self) -> tuple[str, ...]:
        """In which of the plan's ``placement``, ``order`` and ``bound`` HiGHS took part; the bound at its placement
        does not count."""
        parts = {"placement": self.placement, "order": self.order, "bound": (self.bound,)}
        return tuple(name for name, steps in parts.items() if any(map(by_highs, steps)))


def by_highs(step: str) -> bool:
    """Whether a step, or the argument for a bound, is HiGHS's: it begins with the name of a formulation."""
    return step.split(":")[0].split(" (")[0].endswith((" MIP", " LP"))


def then(steps: tuple[str, ...], step: str) -> tuple[str, ...]:
    """The steps and one more, which is named once where it goes on."""
    return steps if steps[-1:] == (step,) else (*steps, step)


def how_of(plan: Plan) -> How | None:
    """How a plan came about, by its provenance; None for plans that do not say."""
    data = plan.provenance.get("how")
    return None if data is None else from_data(data, How, f"provenance of plan {plan.name}, how")


def how_lines(how: How) -> list[str]:
    """The same in two lines."""
    parts = [f"placement by {', '.join(how.placement) or 'nobody'}", f"order by {', '.join(how.order) or 'nobody'}",
             f"bound by {how.bound}" if how.bound else "no bound"]
    if not how.highs:
        return ["; ".join(parts), "HiGHS was not called; it took no part in this plan"]
    by_formulation = ", ".join(f"{row.formulation} {row.calls}" for row in how.highs)
    calls, nodes = ("call" if how.calls == 1 else "calls"), ("node" if how.nodes == 1 else "nodes")
    part = f"took part in its {' and '.join(how.highs_part)}" if how.highs_part else "took no part in this plan"
    return ["; ".join(parts), f"HiGHS: {how.calls:,} {calls}, {how.seconds:.1f} s, {how.nodes:,} {nodes}"
            f" ({by_formulation}); {part}"]
