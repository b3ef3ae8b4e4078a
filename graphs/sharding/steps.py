"""How one operator runs on a team: by the rule's choice that sends the least, as its arguments lie.

What is chosen, and what follows for the tensors that the operator reads and makes, depends on these tensors alone. A
`Steps` makes every such `OperatorStep` once, so that assignments of a trace that differ in a few tensors, as those that
a search for a recipe tries, cost a look-up for all other operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from mipipe.graphs.errors import GraphError
from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.operator_graph import Operator, Phase, SegmentTrace, TensorSpec
from mipipe.graphs.operators import kernels  # noqa: F401  (registers operators that traces name)
from mipipe.graphs.operators.expert_kernels import ROUTE
from mipipe.graphs.sharding.blocks import blocks_of
from mipipe.graphs.sharding.case import Case, Choice
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part, sent
from mipipe.graphs.sharding.rules_experts import EXPERTS
from mipipe.graphs.sharding.rules_math import MATH, pointwise
from mipipe.graphs.sharding.rules_model import MODEL
from mipipe.graphs.sharding.rules_team import TEAM
from mipipe.graphs.sharding.rules_views import VIEWS, Rule
from mipipe.graphs.trace_rules import CONSTANT, GETITEM
from mipipe.graphs.tracing.operator_kinds import resolve_operator

RULES: dict[str, Rule] = {**VIEWS, **MATH, **MODEL, **EXPERTS, **TEAM}
_POINTWISE = {"aten.clone.default", "aten._to_copy.default", "aten.where.self", "aten.silu_backward.default",
              "aten.gelu_backward.default", "aten.threshold_backward.default"}
_ZEROS = {"aten.new_zeros.default", "aten.zeros.default", "aten.zeros_like.default"}
_SHORT = {"float32", "bfloat16", "float16"}
_PENALTY = 1000.0
"""How much worse it is to gather a parameter, or to scatter its gradient, than activations of its size: a mode divides
parameters so that they stay divided."""

Scatter = Callable[[tuple[int, ...]], Part | None]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """How a tensor lies at some point of a program: its part, and the parts that it was changed to besides, each with
    whether that was a gathering in the backward, of what is divided. States of one `Steps` are the same where they are
    equal."""

    part: Part
    changed: frozenset[tuple[Part, bool]] = frozenset()

    @property
    def gathered_again(self) -> bool:
        """Whether the backward has gathered it, which W reads as well."""
        return (WHOLE, True) in self.changed


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """A change of how a tensor lies: bytes it ``sent`` (an all-reduce counts twice), the state then, its collective
    and that one's bytes, if it has one, and bytes of it that put parts together."""

    sent: float
    state: State
    collective: tuple[CollectiveKind, int] | None
    gathered: float


@dataclass(frozen=True, slots=True)
class OperatorStep:
    """What an operator does: how it runs, how that changes the tensors it reads, and how its (first) result lies.

    ``sent``, ``gathered``, ``flops``, ``collectives``: its part of an `Assignment`'s.
    """

    choice: Choice
    changes: tuple[tuple[str, State], ...]
    made: State | None
    sent: float
    gathered: float
    flops: float
    collectives: tuple[tuple[Phase, CollectiveKind, int, str], ...]


@dataclass(frozen=True, slots=True)
class Site:
    """An operator with the names that it reads; ``of``, ``place``: of one that picks a result, the operator's name and
    which. ``known``: its steps, by the states of what it reads and what else they depend on."""

    operator: Operator
    inputs: tuple[str, ...]
    of: str = ""
    place: int = 0
    known: dict[tuple[object, ...], OperatorStep] = field(default_factory=dict)


def specs_of(trace: SegmentTrace) -> dict[str, TensorSpec]:
    """The spec of every tensor of a trace (of an operator with several results, the first)."""
    return {**{item.name: item.outputs[0] for item in trace.operators if item.outputs}, **trace.specs}


@functools.cache
def rule_of(kind: str) -> Rule | None:
    """The rule of an operator kind; None: it runs on whole tensors."""
    if kind in RULES:
        return RULES[kind]
    if kind in (GETITEM, CONSTANT):
        return None
    tags = getattr(resolve_operator(kind), "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    return pointwise if (kind in _POINTWISE or torch.Tag.pointwise in tags) and not random else None


class Steps:
    """The steps of a trace's operators on a team of ``size``; ``scatter``, ``tokens``: see `Case`. ``sites``: the
    operators of every phase, in the trace's order."""

    def __init__(self, trace: SegmentTrace, size: int, scatter: Scatter, tokens: Scatter) -> None:
        self.trace, self.specs = trace, specs_of(trace)
        self._size, self._scatter, self._tokens = size, scatter, tokens
        self._states: dict[tuple[Part, frozenset[tuple[Part, bool]]], State] = {}
        self._changes: dict[tuple[str, State, Part, Phase], LayoutChange | None] = {}
        self._zeros = {item.name for item in trace.operators if item.kind in _ZEROS}
        self._held = {*trace.parameters, *trace.buffers}
        self._grads, self._blocks = set(trace.parameter_grads), blocks_of(trace)
        self.sites: dict[Phase, list[Site]] = {phase: [] for phase in Phase}
        for item in trace.operators:
            picks = item.kind == GETITEM
            site = Site(item, item.inputs, *((item.args[0]["ref"], item.args[1]) if picks else ()))
            self.sites[item.phase].append(site)
            if item.kind in VIEWS and len(site.inputs) == 1 and site.inputs[0] in self._held:
                self._held.add(item.name)

    @functools.cached_property
    def sums(self) -> list[Site]:
        """Those that add two tensors of one shape: to a sum each member may add its share of the other."""
        return [site for sites in self.sites.values() for site in sites
                if site.operator.kind == "aten.add.Tensor" and len(site.inputs) == 2
                and all(self.specs[name] == site.operator.outputs[0] for name in site.inputs)]

    @functools.cached_property
    def products(self) -> list[Site]:
        """Those that multiply two tensors, or cast between floating types of 32 bits or fewer, in any of which sums may
        be made."""
        return [site for sites in self.sites.values() for site in sites
                if (site.operator.kind == "aten.mul.Tensor" and len(site.inputs) == 2)
                or (site.operator.kind == "aten._to_copy.default" and len(site.inputs) == 1
                    and {site.operator.outputs[0].dtype, self.specs[site.inputs[0]].dtype} <= _SHORT)]

    def state(self, part: Part, changed: frozenset[tuple[Part, bool]] = frozenset()) -> State:
        """The state with this part that was changed so."""
        return self._states.setdefault((part, changed), State(part, changed))

    def change(self, name: str, state: State, need: Part, phase: Phase) -> LayoutChange | None:
        """What it takes to have a tensor as needed; None where it cannot be had so. What F gathered is gathered again
        in the backward, but W reads what I has gathered."""
        key = name, state, need, phase
        if key not in self._changes:
            self._changes[key] = self._change(*key)
        return self._changes[key]

    def _change(self, name: str, state: State, need: Part, phase: Phase) -> LayoutChange | None:
        part, size = state.part, self.specs[name].num_bytes
        made = need, phase is not Phase.F and part.kind is Kind.DIVIDED and need == WHOLE
        if part == need:
            return LayoutChange(0.0, state, None, 0.0)
        bytes_sent = 0.0 if made in state.changed else sent(part, need, size)
        if bytes_sent is None:
            return None
        if name in self._held:
            bytes_sent *= _PENALTY
        after = self.state(need, state.changed) if part.kind is Kind.PARTIAL else self.state(
            part, state.changed | {made})  # a sum is there as a sum no more
        gathered = bytes_sent if part.kind is Kind.DIVIDED and phase is not Phase.W else 0.0
        return LayoutChange(bytes_sent, after, _sends(part, need, size, self._size) if bytes_sent else None, gathered)

    def take(self, site: Site, states: Mapping[str, State], goal: Part | None, deferred: bool) -> OperatorStep:
        """The step of an operator whose arguments are in these states. ``goal``: how its result is wanted in the end,
        if known; ``deferred``: see `Layouts`.

        Raises:
            GraphError: it does not run so.
        """
        own = tuple([states[name] for name in site.inputs])
        key = own if goal is None and not deferred else (*own, goal, deferred)
        step = site.known.get(key)
        if step is None:
            step = site.known[key] = self._step(site, states, goal, deferred)
        return step

    def _step(self, site: Site, states: Mapping[str, State], goal: Part | None, deferred: bool) -> OperatorStep:
        op = site.operator
        choice = self._cheapest(op, {name: states[name] for name in site.inputs}, goal, deferred)
        changes: list[tuple[str, State]] = []
        total = gathered = 0.0
        collectives: list[tuple[Phase, CollectiveKind, int, str]] = []
        for name, need in choice.needs.items():
            found = self.change(name, states[name], need, op.phase)
            assert found is not None  # else it was not chosen
            total, gathered = total + found.sent, gathered + found.gathered
            if found.state is not states[name]:
                changes.append((name, found.state))
            if found.collective is not None:
                collectives.append((op.phase, *found.collective, name))
        collectives += [(op.phase, kind, size, op.name) for kind, size in choice.inside]
        made = self.state(choice.gives[0]) if choice.gives else None
        return OperatorStep(choice, tuple(changes), made, total + choice.sent, gathered, op.flops * choice.share,
                            tuple(collectives))

    def _cheapest(self, op: Operator, states: Mapping[str, State], goal: Part | None, deferred: bool) -> Choice:
        """The cheapest choice; among equal ones the one that leaves a member the least to do."""
        best = None
        for number, choice in enumerate(self._offered(op, states, goal, deferred)):
            cost = self._cost(op, choice, states, goal)
            if cost is not None and (best is None or (cost, choice.share, number) < best[0]):
                best = (cost, choice.share, number), choice
        if best is None:
            raise GraphError(self._lost(op))
        return best[1]

    def _cost(self, op: Operator, choice: Choice, states: Mapping[str, State], goal: Part | None) -> float | None:
        """Bytes that a choice sends, with those that the result sends to lie as it is wanted; None where it cannot
        be."""
        total = choice.sent
        for name, need in choice.needs.items():
            found = self.change(name, states[name], need, op.phase)
            if found is None:
                return None
            total += found.sent
        if goal is None or not choice.gives:
            return total
        given = choice.gives[0]
        last = 0.0 if given == goal or (given == PARTIAL and goal == WHOLE) else sent(
            given, goal, op.outputs[0].num_bytes)
        scattered = given == PARTIAL and goal.kind is Kind.DIVIDED and op.name in self._grads
        return total + (float("inf") if last is None else last * _PENALTY if scattered else last)

    def _offered(self, op: Operator, states: Mapping[str, State], goal: Part | None, deferred: bool) -> list[Choice]:
        """The ways to run an operator."""
        case = Case(op, self.specs, {name: state.part for name, state in states.items()}, self._size, self._scatter,
                    self._tokens, self._zeros.__contains__, goal, deferred,
                    lambda length: self._blocks.get(length, ()))
        rule = rule_of(op.kind)
        found = [choice for choice in (rule(case) if rule is not None else ()) if choice is not None]
        return found + ([] if op.kind == ROUTE else [case.whole()])  # members send each token once

    def _lost(self, op: Operator) -> str:
        """Why an operator does not run: what is on its way to experts cannot be had whole, as all else can."""
        if op.kind == ROUTE:
            return (f"{self.specs[op.inputs[0]].shape[0]} tokens do not divide among {self._size} members, each"
                    " of which sends its part to the experts")
        return f"{op.kind} looks at more than a row of what tokens are at their experts, of which members have parts"


def _sends(source: Part, target: Part, num_bytes: int, size: int) -> tuple[CollectiveKind, int]:
    """The collective of a change of layout that sends something, and its bytes."""
    if source.kind is Kind.DIVIDED:
        return (CollectiveKind.ALL_GATHER, num_bytes) if target == WHOLE else (
            CollectiveKind.ALL_TO_ALL, num_bytes // size)
    return CollectiveKind.ALL_REDUCE if target == WHOLE else CollectiveKind.REDUCE_SCATTER, num_bytes
