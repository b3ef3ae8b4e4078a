"""What a little more would give: one more activation or GB, device, microbatch. Each is the problem solved again.

The solve has a small part of the time, so a gain is what that solve found; what there may be at most is told by its
bound. A plan stays valid with more memory or devices, so neither is ever said to cost time. Microbatches are compared
by the time of each: a longer one says only that so short a solve found nothing better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mipipe.graphs.topology import UNLIMITED_BYTES
from mipipe.graphs.units import GIGABYTE
from mipipe.planner.ladder.objectives import interrupted
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import activation_unit_bytes


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What one more of something would give: the makespan found (None: no plan in time), that of one microbatch
    before and after, and the least it can be (None: no bound in time)."""

    what: str
    makespan_ns: int | None
    each_before_ns: float
    each_ns: float | None
    each_least_ns: float | None
    seconds: float

    @property
    def gain(self) -> float | None:
        """The share of the time of one microbatch that is saved; below 0 where what was found takes longer."""
        return None if self.each_ns is None else 1 - self.each_ns / self.each_before_ns

    @property
    def most(self) -> float | None:
        """The share that any plan can save at most."""
        return None if self.each_least_ns is None else 1 - self.each_least_ns / self.each_before_ns


def what_if(problem: PlanningProblem, options: PlanOptions, makespan_ns: int, solve: Callable[..., Any], *,
            seconds: float) -> list[WhatIf]:
    """What more memory (if any is limited), a device and a microbatch would give, each solved for ``seconds``; those
    from which Ctrl-C came on are left out."""
    share, found = replace(options, time_limit_s=seconds, exact=False), []
    for what, changed in variants(problem):
        result = solve(changed, share)
        if interrupted(result):
            break
        took = result.makespan_ns
        if took is not None and changed.num_microbatches == problem.num_microbatches:
            took = min(took, makespan_ns)
        found.append(WhatIf(what, took, makespan_ns / problem.num_microbatches,
                            None if took is None else took / changed.num_microbatches,
                            None if result.bound_ns is None else result.bound_ns / changed.num_microbatches, seconds))
    return found


def variants(problem: PlanningProblem) -> list[tuple[str, PlanningProblem]]:
    """The problem with a little more of each, and what that is."""
    topology, limits = problem.topology, problem.limits
    more, name = ((round(activation_unit_bytes(problem)), "activation") if problem.unit_ns != 1
                  else (GIGABYTE, "GB on every device"))
    found = []
    limited = limits.activation_bytes is not None or any(device.memory_bytes < UNLIMITED_BYTES
                                                         for device in topology.devices)
    if limited and more:
        devices = tuple(replace(device, memory_bytes=min(device.memory_bytes + more, UNLIMITED_BYTES))
                        for device in topology.devices)
        wider = None if limits.activation_bytes is None else limits.activation_bytes + more
        found.append((f"one more {name}", problem.replace(topology=replace(topology, devices=devices),
                                                         limits=replace(limits, activation_bytes=wider))))
    last = topology.devices[-1]
    found.append(("one more device", problem.replace(topology=replace(
        topology, devices=(*topology.devices, replace(last, name=f"{last.name}+"))))))
    if not any(group.loads for group in problem.groups):
        found.append(("one more microbatch", problem.replace(num_microbatches=problem.num_microbatches + 1)))
    return found
