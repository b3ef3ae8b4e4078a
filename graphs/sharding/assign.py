"""How every operator of a trace runs on a team: each as costs least where it stands (`mipipe.graphs.sharding.steps`).

Operators are taken in the trace's order. A tensor that lies otherwise than an operator needs it is changed once and
kept; what F has gathered is gathered again in the backward, so that a member keeps its part and not the whole between
them, but W reads what I has gathered. Where no rule offers anything, every member runs the operator on whole tensors:
slower, and right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.operator_graph import Phase, SegmentTrace
from mipipe.graphs.sharding.case import Choice
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Part
from mipipe.graphs.sharding.steps import Scatter, State, Steps


def no_scatter(shape: tuple[int, ...]) -> Part | None:
    """Sums over members arrive on every member."""
    return None


@dataclass(frozen=True)
class Layouts:
    """How what a trace is given and returns lies on a team of ``size`` members along one axis.

    ``given``: inputs, parameters, buffers and output gradients that are not whole. ``wanted``: outputs and input
    gradients, by name, that are not whole. ``scatter``, ``tokens``: see `Case`. ``deferred``: products of a sum over
    members and a whole tensor, and casts of sums, by the operator's name, that are made of the members' parts and
    summed later. ``early``: gradients of outputs that are gathered as soon as they arrive. ``known``: the steps of
    traces' operators; layouts made of these by `dataclasses.replace` share them.
    """

    size: int
    given: Mapping[str, Part]
    wanted: Mapping[str, Part] = field(default_factory=dict)
    scatter: Scatter = no_scatter
    tokens: Scatter = no_scatter
    deferred: frozenset[str] = frozenset()
    early: frozenset[str] = frozenset()
    known: dict[object, Steps] = field(default_factory=dict, repr=False, compare=False)

    def steps_of(self, trace: SegmentTrace) -> Steps:
        """The steps of a trace's operators."""
        key = id(trace), self.size, self.scatter, self.tokens
        if key not in self.known:
            self.known[key] = Steps(trace, self.size, self.scatter, self.tokens)
        return self.known[key]


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


class _Pass:
    """One run over the operators of a trace."""

    def __init__(self, trace: SegmentTrace, layouts: Layouts) -> None:
        self.trace, self.layouts, self.steps = trace, layouts, layouts.steps_of(trace)
        names = (*trace.inputs, *trace.parameters, *trace.buffers, *(name for name in trace.output_grads if name))
        self.born: dict[str, Part] = {name: layouts.given.get(name, WHOLE) for name in names}
        self.states: dict[str, State] = {name: self.steps.state(part) for name, part in self.born.items()}
        self.choices: dict[str, Choice] = {}
        self.sent = self.gathered = self.flops = 0.0
        self.collectives: list[tuple[Phase, CollectiveKind, int, str]] = []

    def run(self, phase: Phase, ends: Mapping[str, Part]) -> None:
        """Choose for every operator of a phase."""
        states, deferred = self.states, self.layouts.deferred
        for site in self.steps.sites[phase]:
            name = site.operator.name
            if site.of:
                gives = self.choices[site.of].gives
                self.born[name] = part = gives[site.place] if site.place < len(gives) else gives[-1]
                states[name] = self.steps.state(part)
                continue
            step = self.steps.take(site, states, ends.get(name), name in deferred)
            self.choices[name] = step.choice
            states.update(step.changes)
            self.sent += step.sent
            self.gathered += step.gathered
            self.flops += step.flops
            self.collectives += step.collectives
            if step.made is not None:
                states[name], self.born[name] = step.made, step.made.part

    def use(self, name: str, need: Part, phase: Phase, *, counts: bool = True) -> None:
        """Change how a tensor lies, once."""
        found = self.steps.change(name, self.states[name], need, phase)
        if found is None:
            return
        self.states[name] = found.state
        self.sent += found.sent if counts else 0.0
        self.gathered += found.gathered
        if found.collective is not None:
            self.collectives.append((phase, *found.collective, name))

    def begin(self, phase: Phase) -> None:
        """Before the backward gradients are gathered that are to be so early; in W what I has gathered stays so."""
        for name in sorted(self.layouts.early) if phase is first_backward(self.trace) else ():
            self.use(name, WHOLE, phase)
            self.states[name] = self.steps.state(WHOLE, self.states[name].changed)
        for name, state in list(self.states.items()) if phase is Phase.W else ():
            if state.gathered_again:
                self.states[name] = self.steps.state(WHOLE, state.changed)


def assign(trace: SegmentTrace, layouts: Layouts) -> Assignment:
    """The assignment of a trace under the layouts of what it is given and returns."""
    run = _Pass(trace, layouts)
    ends = _ends(trace, layouts)
    leaving: dict[str, Part] = {}
    for phase, names in results_of(trace):
        run.begin(phase)
        run.run(phase, ends)
        for name in filter(None, names):
            keep = run.states[name].part == PARTIAL and ends[name] == WHOLE and _is_parameter_grad(trace, name)
            leaving[name] = PARTIAL if keep else ends[name]
            if not keep:
                run.use(name, ends[name], phase, counts=phase is not Phase.W)
    return Assignment(run.choices, run.born, leaving, run.sent, run.gathered, run.flops, tuple(run.collectives))


def forward_parts(trace: SegmentTrace, layouts: Layouts) -> dict[str, Part]:
    """How the outputs of a trace lie as F makes them, whatever is wanted of them."""
    run = _Pass(trace, layouts)
    run.run(Phase.F, {})
    return {name: run.states[name].part for name in trace.outputs}


def first_backward(trace: SegmentTrace) -> Phase:
    """The phase in which the backward begins."""
    return Phase.I if trace.has(Phase.I) else Phase.W


def results_of(trace: SegmentTrace) -> tuple[tuple[Phase, tuple[str | None, ...]], ...]:
    """The results of each phase: outputs and updates; input gradients; parameter gradients."""
    return ((Phase.F, (*trace.outputs, *trace.buffer_updates.values())), (Phase.I, trace.input_grads),
            (Phase.W, trace.parameter_grads))


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
