"""The collectives of a team's members in every phase of a segment, by its shapes: those of the published recipes.

- ``tensor``: one all-reduce of the result after the products by rows, one of the input's gradient (Shoeybi et al.,
  2019);
- ``sequence``: an all-gather and a reduce-scatter in their place, and activations between blocks in parts (Korthikanti
  et al., "Reducing activation recomputation in large transformer models", MLSys 2023);
- experts: tokens sent to their experts and back, forward and backward (Lepikhin et al., "GShard", ICLR 2021); every
  member sends its part of the sequence, whatever the mode, and rows are even over experts; in ``tensor`` mode what
  comes back, and its gradient, is gathered;
- ``batch``: none within a segment;
- context: keys and values gathered before attention, their gradients reduced and scattered (Dubey et al., "The Llama 3
  herd of models", 2024, section 3.3.2).

Left out: the second all-gather of ``sequence`` before weight gradients (it runs beside the input gradient's product).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mipipe.graphs.costs.split_rules import ATTENTION, SplitRules
from mipipe.graphs.costs.trace_facts import TeamSplit, heads_of
from mipipe.graphs.modes import Collective, CollectiveKind
from mipipe.graphs.operator_graph import Operator, Phase, Role, SegmentTrace


@dataclass(frozen=True, slots=True)
class ModeCollectives:
    """What the collectives of a segment depend on."""

    trace: SegmentTrace
    role: Role
    rules: SplitRules
    split: TeamSplit

    def by_phase(self, phases: Iterable[Phase]) -> dict[Phase, list[Collective]]:
        """The collectives of every one of these phases."""
        split = self.split
        work: dict[Phase, list[Collective]] = {phase: [] for phase in phases}
        if split.tensor > 1:
            self._tensor(work)
        if split.context > 1 and heads_of(self.trace) is not None:
            self._context(work)
        if split.expert > 1 and self.rules.has("bank"):
            for operator in self.trace.operators:
                parameter = self.rules.products.get(operator.name)
                if parameter is None or operator.phase is not Phase.F or self.rules.cuts[parameter] != "bank":
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
                if self.rules.cuts.get(self.rules.products.get(item.name, ""), "") == "bank"]

    def _tensor(self, work: dict[Phase, list[Collective]]) -> None:
        rows, columns = self.rules.has("rows"), self.rules.has("columns")
        size = self._between()
        kinds = CollectiveKind
        back = work.get(Phase.I, work[Phase.F])
        if self.split.sequence:
            if columns:
                work[Phase.F].append(Collective(kinds.ALL_GATHER, "tensor", size))
                back.append(Collective(kinds.REDUCE_SCATTER, "tensor", size))
            if rows:
                work[Phase.F].append(Collective(kinds.REDUCE_SCATTER, "tensor", size))
                work.get(Phase.I, work.get(Phase.W, work[Phase.F])).append(
                    Collective(kinds.ALL_GATHER, "tensor", size))
        else:
            if rows:
                work[Phase.F].append(Collective(kinds.ALL_REDUCE, "tensor", size))
            if columns and Phase.I in work:
                back.append(Collective(kinds.ALL_REDUCE, "tensor", size))
            size = self._tokens() if self.role is Role.DISPATCH else size if self._routes() else 0
            if size:
                work[Phase.F].append(Collective(kinds.ALL_GATHER, "tensor", size))
                back.append(Collective(kinds.ALL_GATHER, "tensor", size))

    def _routes(self) -> bool:
        """Whether tokens come in, and go to the segment's experts: not rows that another segment has sent."""
        made = {item.name: item.inputs for item in self.trace.phase_operators(Phase.F)}
        rows = next((item.inputs[0] for item in self._banks()), None)
        while rows is not None and len(made.get(rows, ())) == 1:
            rows, = made[rows]
        return rows is not None and rows not in self.trace.inputs

    def _tokens(self) -> int:
        """Bytes of the tokens that a segment sends to experts, on one member of the context axis."""
        floats = [self.trace.specs[name].num_bytes for name in self.trace.inputs
                  if "float" in self.trace.specs[name].dtype]
        return -(-max(floats, default=0) // self.split.context)

    def _between(self) -> int:
        """Bytes of the activation between blocks, on one member of the context axis."""
        floats = [self.trace.specs[name].num_bytes for name in self.trace.outputs
                  if name in self.trace.specs and self.trace.specs[name].shape]
        if self.role is Role.HEAD:
            floats = [self.trace.specs[name].num_bytes for name in self.trace.inputs
                      if "float" in self.trace.specs[name].dtype]
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
