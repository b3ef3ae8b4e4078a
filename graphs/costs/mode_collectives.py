"""The collectives of a team's members in every phase of a segment, by its shapes: those of the published recipes.

- ``tensor``, ``sequence``, ``context``: those of the members' programs (`TeamShare`), where these are known;
- experts: tokens sent to their experts and back, forward and backward (Lepikhin et al., "GShard", ICLR 2021); every
  member sends its part of the sequence, whatever the mode, and rows are even over experts; in ``tensor`` mode what
  comes back, and its gradient, is gathered;
- ``batch``: none within a segment;
- else ``context``: keys and values gathered before attention, their gradients reduced and scattered (Dubey et al.,
  "The Llama 3 herd of models", 2024, section 3.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mipipe.graphs.costs.products import ATTENTION
from mipipe.graphs.costs.team_share import TeamShare
from mipipe.graphs.costs.trace_facts import TeamSplit, TraceFacts, heads_of
from mipipe.graphs.modes import Collective, CollectiveKind
from mipipe.graphs.operator_graph import Operator, Phase, SegmentTrace


@dataclass(frozen=True, slots=True)
class ModeCollectives:
    """What the collectives of a segment depend on."""

    trace: SegmentTrace
    facts: TraceFacts
    split: TeamSplit
    shares: Sequence[TeamShare]

    def by_phase(self, phases: Iterable[Phase]) -> dict[Phase, list[Collective]]:
        """The collectives of every one of these phases."""
        split = self.split
        work: dict[Phase, list[Collective]] = {phase: [] for phase in phases}
        known = {share.axis for share in self.shares}
        for share in self.shares:
            others = [other for other in self.shares if other is not share]
            for phase, items in share.collectives.items():
                for item, name in items:
                    parts = split.batch * (1 if "context" in known else split.context) * math.prod(
                        other.parts(name) for other in others)
                    work[phase].append(replace(item, num_bytes=-(-item.num_bytes // parts)))
        if split.tensor > 1 and "tensor" not in known and not split.sequence and self._routes():
            for phase in (Phase.F, Phase.I):
                if phase in work:
                    work[phase].append(Collective(CollectiveKind.ALL_GATHER, "tensor", self._between()))
        if split.context > 1 and "context" not in known and heads_of(self.trace) is not None:
            self._context(work)
        if split.expert > 1 and self.facts.banks:
            for operator in self.trace.operators:
                if operator.phase is not Phase.F or self.facts.products.get(operator.name) not in self.facts.banks:
                    continue
                specs = {item.name: item.outputs[0] for item in self.trace.operators} | self.trace.specs
                first = operator is self._banks()[0]
                spec = specs[operator.inputs[0]] if first else operator.outputs[0]
                size = -(-spec.num_bytes // (split.samples_and_positions * split.tensor))
                if first or operator is self._banks()[-1]:
                    for phase in (Phase.F, Phase.I):
                        if phase in work:
                            work[phase].append(Collective(CollectiveKind.ALL_TO_ALL, "expert", size))
        return work

    def _banks(self) -> list[Operator]:
        """The products of the forward with banks of experts."""
        return [item for item in self.trace.phase_operators(Phase.F)
                if self.facts.products.get(item.name) in self.facts.banks]

    def _routes(self) -> bool:
        """Whether tokens come in, and go to the segment's experts: not rows that another segment has sent."""
        made = {item.name: item.inputs for item in self.trace.phase_operators(Phase.F)}
        rows = next((item.inputs[0] for item in self._banks()), None)
        while rows is not None and len(made.get(rows, ())) == 1:
            rows, = made[rows]
        return rows is not None and rows not in self.trace.inputs

    def _between(self) -> int:
        """Bytes of the activation between blocks, on one member of the context axis."""
        floats = [self.trace.specs[name].num_bytes for name in self.trace.outputs
                  if name in self.trace.specs and self.trace.specs[name].shape]
        return -(-max(floats, default=0) // self.split.context)

    def _context(self, work: dict[Phase, list[Collective]]) -> None:
        specs = {item.name: item.outputs[0] for item in self.trace.operators} | self.trace.specs
        found = next(item for item in self.trace.phase_operators(Phase.F) if item.kind.startswith(ATTENTION))
        size = -(-sum(specs[name].num_bytes for name in found.inputs[1:3]) // self.split.batch)
        size = -(-size // (1 if specs[found.inputs[1]].shape[1] % self.split.tensor else self.split.tensor))
        work[Phase.F].append(Collective(CollectiveKind.ALL_GATHER, "context", size))
        if Phase.I in work:
            work[Phase.I] += [Collective(CollectiveKind.ALL_GATHER, "context", size),
                                          Collective(CollectiveKind.REDUCE_SCATTER, "context", size)]
