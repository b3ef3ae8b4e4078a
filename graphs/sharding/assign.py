"""How every operator of a trace runs on a team: by the rule's choice that sends the least.

Operators are taken in the trace's order. A tensor that lies otherwise than an operator needs it is changed once and
kept; what F has gathered is gathered again in the backward, so that a member keeps its part and not the whole between
them, but W reads what I has gathered. Where no rule offers anything, every member runs the operator on whole tensors:
slower, and right.
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
from mipipe.graphs.operators.collectives import Sections
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
_PENALTY = 1000.0
"""How much worse it is to gather a parameter, or to scatter its gradient, than activations of its size: a mode divides
parameters so that they stay divided."""

def _sends(source: Part, target: Part, num_bytes: int, size: int) -> tuple[CollectiveKind, int]:
    """The collective of a change of layout that sends something, and its bytes."""
    if source.kind is Kind.DIVIDED:
        return (CollectiveKind.ALL_GATHER, num_bytes) if target == WHOLE else (
            CollectiveKind.ALL_TO_ALL, num_bytes // size)
    return CollectiveKind.ALL_REDUCE if target == WHOLE else CollectiveKind.REDUCE_SCATTER, num_bytes


Scatter = Callable[[tuple[int, ...]], Part | None]


def no_scatter(shape: tuple[int, ...]) -> Part | None:
    """Sums over members arrive on every member."""
    return None


@dataclass(frozen=True)
class Layouts:
    """How what a trace is given and returns lies on a team of ``size`` members along one axis.

    ``given``: inputs, parameters, buffers and output gradients that are not whole. ``wanted``: outputs and input
    gradients, by name, that are not whole. ``scatter``, ``tokens``: see `Case`. ``deferred``: products of a sum over
    members and a whole tensor, and casts of sums, by the operator's name, that are made of the members' parts and
    summed later. ``early``: gradients of outputs that are gathered as soon as they arrive. ``offers``: what rules gave
    operators to choose from before; layouts made of these by `dataclasses.replace` share it.
    """

    size: int
    given: Mapping[str, Part]
    wanted: Mapping[str, Part] = field(default_factory=dict)
    scatter: Scatter = no_scatter
    tokens: Scatter = no_scatter
    deferred: frozenset[str] = frozenset()
    early: frozenset[str] = frozenset()
    offers: dict[object, tuple[Operator, tuple[str, ...], dict[object, list[Choice]]]] = field(
        default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Assignment:
    """A choice for each operator (by name), how tensors lie when they are made, and what that costs one member.

    ``sent``: bytes, an all-reduce counted twice, without what puts gradients of whole parameters together (a recipe
    divides such parameters); ``gathered``: those of them that put parts together in F and I.
    ``ends``: how outputs, updates and gradients are to leave. ``collectives``: of every one its phase, kind, bytes as
    `mipipe.graphs.modes.Collective` has them, and the tensor (an operator's own are its result's).
    """

    choices: dict[str, Choice]
    born: dict[str, Part]
    ends: dict[str, Part]
    sent: float
    gathered: float
    flops: float
    collectives: tuple[tuple[Phase, CollectiveKind, int, str], ...]


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


class _Pass:
    """One run over the operators of a trace."""

    def __init__(self, trace: SegmentTrace, layouts: Layouts, specs: Mapping[str, TensorSpec]) -> None:
        self.trace, self.layouts, self.specs = trace, layouts, specs
        names = (*trace.inputs, *trace.parameters, *trace.buffers, *(name for name in trace.output_grads if name))
        self.parts: dict[str, Part] = {name: layouts.given.get(name, WHOLE) for name in names}
        self.born = dict(self.parts)
        self.held = set(trace.parameters) | set(trace.buffers)
        self.kinds: dict[str, str] = {}
        self.results: dict[str, tuple[Part, ...]] = {}
        self.have: set[tuple[str, Part, bool]] = set()
        self.sent = self.gathered = self.flops = self.last = 0.0
        self.collectives: list[tuple[Phase, CollectiveKind, int, str]] = []

    @functools.cached_property
    def blocks(self) -> dict[int, tuple[Sections, ...]]:
        """See `blocks_of`."""
        return blocks_of(self.trace)

    def _change(self, name: str, need: Part, backward: bool) -> tuple[str, Part, bool]:
        """A change of layout; what F gathered is gathered again in the backward."""
        return name, need, backward and self.parts[name].kind is Kind.DIVIDED and need == WHOLE

    def price(self, name: str, need: Part, backward: bool) -> float | None:
        """What it sends to have a tensor as needed; None where it cannot be had so."""
        part = self.parts[name]
        if part == need or self._change(name, need, backward) in self.have:
            return 0.0
        bytes_sent = sent(part, need, self.specs[name].num_bytes)
        return bytes_sent if bytes_sent is None or name not in self.held else bytes_sent * _PENALTY

    def cost(self, choice: Choice, backward: bool) -> float | None:
        total = choice.sent
        for name, need in choice.needs.items():
            price = self.price(name, need, backward)
            if price is None:
                return None
            total += price
        return total

    def take(self, op: Operator, goal: Part | None) -> Choice:
        """The cheapest choice for an operator; among equal ones the one that leaves a member the least to do."""
        backward, best = op.phase is not Phase.F, None
        for number, choice in enumerate(self._offered(op, goal)):
            cost = self.cost(choice, backward)
            if cost is None:
                continue
            if goal is not None and choice.gives:
                last = 0.0 if choice.gives[0] == goal or (choice.gives[0] == PARTIAL and goal == WHOLE) else sent(
                    choice.gives[0], goal, op.outputs[0].num_bytes)
                scattered = (choice.gives[0] == PARTIAL and goal.kind is Kind.DIVIDED
                             and op.name in self.trace.parameter_grads)
                cost += float("inf") if last is None else last * _PENALTY if scattered else last
            rank = (cost, choice.share, number)
            if best is None or rank < best[0]:
                best = rank, choice
        if best is None:
            raise GraphError(self._lost(op))
        return best[1]

    def _offered(self, op: Operator, goal: Part | None) -> list[Choice]:
        """The ways to run an operator: a search for a recipe meets most with their arguments lying as before."""
        layouts = self.layouts
        if id(op) not in layouts.offers:
            layouts.offers[id(op)] = op, op.inputs, {}
        _, inputs, known = layouts.offers[id(op)]
        key = (goal, op.name in layouts.deferred, layouts.size, layouts.scatter, layouts.tokens,
               *(self.parts.get(name) for name in inputs))
        if key not in known:
            case = Case(op, self.specs, self.parts, layouts.size, layouts.scatter, layouts.tokens,
                        lambda name: self.kinds.get(name) in _ZEROS, goal, op.name in layouts.deferred,
                        lambda length: self.blocks.get(length, ()))
            rule = rule_of(op.kind)
            found = [choice for choice in (rule(case) if rule is not None else ()) if choice is not None]
            known[key] = found + ([] if op.kind == ROUTE else [case.whole()])  # members send each token once
        return known[key]

    def _lost(self, op: Operator) -> str:
        """Why an operator does not run: what is on its way to experts cannot be had whole, as all else can."""
        if op.kind == ROUTE:
            return (f"{self.specs[op.inputs[0]].shape[0]} tokens do not divide among {self.layouts.size} members, each"
                    " of which sends its part to the experts")
        return f"{op.kind} looks at more than a row of what tokens are at their experts, of which members have parts"

    def use(self, name: str, need: Part, phase: Phase) -> None:
        """Count a change of layout once."""
        backward = phase is not Phase.F
        self.last = price = self.price(name, need, backward) or 0.0
        self.sent += price
        if price:
            self.collectives.append((phase, *_sends(self.parts[name], need, self.specs[name].num_bytes,
                                                    self.layouts.size), name))
        if self.parts[name].kind is Kind.DIVIDED and phase is not Phase.W:
            self.gathered += price
        if self.parts[name].kind is Kind.PARTIAL:  # from now on it is there as a sum
            self.parts[name] = need
        elif self.parts[name] != need:
            self.have.add(self._change(name, need, backward))

    def begin(self, phase: Phase) -> None:
        """Before the backward gradients are gathered that are to be so early; in W what I has gathered stays so."""
        for name in sorted(self.layouts.early) if phase is first_backward(self.trace) else ():
            self.use(name, WHOLE, phase)
            self.parts[name] = WHOLE
        for name, need, again in self.have if phase is Phase.W else ():
            if again and need == WHOLE:
                self.parts[name] = WHOLE

    def lie(self, name: str, part: Part) -> None:
        """Note how a new tensor lies."""
        self.parts[name] = self.born[name] = part


def assign(trace: SegmentTrace, layouts: Layouts, specs: Mapping[str, TensorSpec] | None = None) -> Assignment:
    """The assignment of a trace under the layouts of what it is given and returns."""
    run = _Pass(trace, layouts, specs or specs_of(trace))
    ends = _ends(trace, layouts)
    choices: dict[str, Choice] = {}
    leaving: dict[str, Part] = {}
    for phase, names in results_of(trace):
        run.begin(phase)
        for op in trace.phase_operators(phase):
            _step(run, op, choices, ends)
        for name in filter(None, names):
            keep = run.parts[name] == PARTIAL and ends[name] == WHOLE and _is_parameter_grad(trace, name)
            leaving[name] = PARTIAL if keep else ends[name]
            if not keep:
                run.use(name, ends[name], phase)
                run.sent -= run.last if phase is Phase.W else 0.0
    return Assignment(choices, run.born, leaving, run.sent, run.gathered, run.flops, tuple(run.collectives))


def forward_parts(trace: SegmentTrace, layouts: Layouts) -> dict[str, Part]:
    """How the outputs of a trace lie as F makes them, whatever is wanted of them."""
    run, choices = _Pass(trace, layouts, specs_of(trace)), dict[str, Choice]()
    for op in trace.phase_operators(Phase.F):
        _step(run, op, choices, {})
    return {name: run.parts[name] for name in trace.outputs}


def first_backward(trace: SegmentTrace) -> Phase:
    """The phase in which the backward begins."""
    return Phase.I if trace.has(Phase.I) else Phase.W


def results_of(trace: SegmentTrace) -> tuple[tuple[Phase, tuple[str | None, ...]], ...]:
    """The results of each phase: outputs and updates; input gradients; parameter gradients."""
    return ((Phase.F, (*trace.outputs, *trace.buffer_updates.values())), (Phase.I, trace.input_grads),
            (Phase.W, trace.parameter_grads))


def _step(run: _Pass, op: Operator, choices: dict[str, Choice], ends: Mapping[str, Part]) -> None:
    """Choose for one operator."""
    run.kinds[op.name] = op.kind
    if op.kind == GETITEM:
        source, place = op.args[0]["ref"], op.args[1]
        gives = run.results[source]
        run.lie(op.name, gives[place] if place < len(gives) else gives[-1])
        return
    choice = choices[op.name] = run.take(op, ends.get(op.name))
    for name, need in choice.needs.items():
        run.use(name, need, op.phase)
    run.sent += choice.sent
    run.collectives += [(op.phase, kind, size, op.name) for kind, size in choice.inside]
    run.flops += op.flops * choice.share
    run.results[op.name] = choice.gives
    if choice.gives:
        run.lie(op.name, choice.gives[0])
    if op.kind in VIEWS and len(op.inputs) == 1 and op.inputs[0] in run.held:
        run.held.add(op.name)


def _ends(trace: SegmentTrace, layouts: Layouts) -> dict[str, Part]:
    """How results are to leave: gradients of parameters as the parameters lie, updates as the buffers do."""
    ends = {name: layouts.wanted.get(name, WHOLE) for name in (*trace.outputs, *trace.input_grads) if name is not None}
    for name, grad in zip(trace.parameters, trace.parameter_grads, strict=True):
        if grad is not None:
            ends[grad] = layouts.given.get(name, WHOLE)
    for name, update in trace.buffer_updates.items():
        ends[update] = layouts.given.get(name, WHOLE)
    return ends


def _is_parameter_grad(trace: SegmentTrace, name: str) -> bool:
    """Whether a result is a parameter's gradient and nothing else: it may stay a sum over members until the step's
    end."""
    return name in trace.parameter_grads and name not in (*trace.outputs, *trace.input_grads)
