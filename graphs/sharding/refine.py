"""Sums made later and gradients gathered earlier than an assignment does by itself, where that sends less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mipipe.graphs.operator_graph import SegmentTrace
from mipipe.graphs.sharding.assign import Assignment, Layouts, assign
from mipipe.graphs.sharding.parts import PARTIAL, Kind
from mipipe.graphs.sharding.steps import Site


def refine(trace: SegmentTrace, layouts: Layouts) -> tuple[Layouts, Assignment]:
    """The layouts with those products deferred and those gradients gathered early that make it send less, and their
    assignment.

    Sums over members may shrink before they travel (a token's experts are added up), and gradients grow before they
    are needed whole (each token's for all of its experts).
    """
    steps = layouts.steps_of(trace)
    now, chosen = assign(trace, layouts), layouts
    early = [name for name in trace.output_grads if name is not None and now.born[name].kind is Kind.DIVIDED
             and not now.born[name].routed]

    def better(made: Layouts) -> bool:
        nonlocal now, chosen
        found = assign(trace, made)
        if found.sent < now.sent:
            now, chosen = found, made
            return True
        return False

    for name in early:
        better(replace(chosen, early=chosen.early | {name}))

    def summed(sites: Sequence[Site]) -> frozenset[str]:
        """Those of the operators that read a sum and are not deferred yet."""
        return frozenset(site.operator.name for site in sites
                         if PARTIAL in [now.born[name] for name in site.inputs]) - chosen.deferred

    while any((more := summed(sites)) and better(replace(chosen, deferred=chosen.deferred | more))
              for sites in (steps.sums, steps.products)):
        pass
    for name in sorted(chosen.deferred):
        better(replace(chosen, deferred=chosen.deferred - {name}))
    return chosen, now
