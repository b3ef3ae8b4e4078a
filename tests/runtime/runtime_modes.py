"""Worker side of the tests of modes: each distinct segment of a graph, run by a team and by one process."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import runtime_cases as cases
import torch
import torch.distributed as dist

from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.operators.collectives import part_of, whole_of
from mipipe.graphs.recipes import rows
from mipipe.graphs.serialize import load
from mipipe.graphs.sharding.modes import member_program, settle_shared
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind
from mipipe.graphs.tracing.compose import run_step
from mipipe.graphs.tracing.trace import build_phase, phase_signature
from mipipe.planner.team import Team, TeamMode
from mipipe.runtime.engine.compiling.team import Axis, member_pieces, team_operators
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.comm import Waits


def make_state(graph, seed=0):
    """Random parameters and buffers in the graph's dtypes, by FQN; equal in every process."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for item in graph.parameters:
        if item.tied_to is None:
            shape, dtype = item.spec.shape, getattr(torch, item.spec.dtype)
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + (len(shape) == 1)
            state[item.fqn] = values.to(dtype) if dtype.is_floating_point else torch.arange(
                values.numel()).reshape(shape).to(dtype)
    return state


def make_batch(graph, classes, seed=1):
    """Random inputs: integers below ``classes``, images of noise."""
    generator = torch.Generator().manual_seed(seed)
    values = {value.name: value.spec for value in graph.values}
    batch = {}
    for name in graph.inputs:
        spec = values[name]
        dtype = getattr(torch, spec.dtype)
        batch[name] = (torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(dtype)
                       if dtype.is_floating_point else
                       torch.randint(0, classes, spec.shape, generator=generator).to(dtype))
    return batch


def run_phases(trace, given, operators=None):
    """Run F, I and W on arguments by name, each phase's results joining them."""
    given = dict(given)
    for phase in filter(trace.has, Phase):
        names, results = phase_signature(trace, phase)
        made = build_phase(trace, phase, "cpu", operators)(*[given[name] for name in names])
        given.update(zip(results, made, strict=True))
    return given


def segment_cases(graph, batch):
    """For each trace, the arguments (with output gradients) that its first segment has in a training step."""
    state, values = make_state(graph), dict(batch)
    kept, grads, cases = {}, {}, {}
    for segment in graph.segments:
        trace = graph.trace(segment)
        names = (*trace.inputs, *trace.parameters, *trace.buffers)
        tensors = [values[name] for name in segment.inputs]
        tensors += [state[name] for name in (*segment.parameters, *segment.buffers)]
        kept[segment.name] = given = dict(zip(names, tensors, strict=True))
        arguments, results = phase_signature(trace, Phase.F)
        made = dict(zip(results, build_phase(trace, Phase.F)(*[given[name] for name in arguments]), strict=True))
        result = {**given, **made}
        values.update(zip(segment.outputs, (result[name] for name in trace.outputs), strict=True))
    grads[graph.loss] = torch.ones_like(values[graph.loss])
    for segment in reversed(graph.segments):
        trace, given = graph.trace(segment), kept[segment.name]
        for name, value in zip(trace.output_grads, segment.outputs, strict=True):
            if name is not None:
                given[name] = grads[value]
        made = run_phases(trace, given)
        for name, value in zip(trace.input_grads, segment.inputs, strict=True):
            if name is not None:
                grads[value] = grads.get(value, 0) + made[name]
        cases[trace.digest] = segment.name, given, made
    return cases


def compare_modes(path, modes, batch=None, classes=64):
    """The largest relative error of outputs and gradients of every segment in every mode: {(mode, segment): error}.

    ``batch``: a file of inputs by name; None: random ones, integers below ``classes``.
    """
    graph = load(path, OperatorGraph)
    inputs = make_batch(graph, classes) if batch is None else torch.load(batch, weights_only=True)
    size, member = dist.get_world_size(), dist.get_rank()
    axes = {name: Axis.of(name, dist.group.WORLD, Waits(timedelta(seconds=30), True))
            for name in ("tensor", "batch", "expert", "context")}
    operators = team_operators(axes)
    cases = segment_cases(graph, inputs)
    errors = {}
    for mode in modes:
        settled = settle_shared(graph, mode, size)
        for digest, (name, given, whole) in cases.items():
            trace = graph.trace(next(item for item in graph.segments if item.trace == digest))
            program = member_program(graph, trace, mode, size, settled.get(digest))
            local = {key: part_of(tensor, member, size, part.dim, part.sections).contiguous()
                     if (part := program.given.get(key, WHOLE)).kind is Kind.DIVIDED else tensor
                     for key, tensor in given.items()}
            made = run_phases(program.trace, local, operators)
            errors[mode, name] = max(_errors(program, trace, made, whole, axes["tensor"]), default=0.0)
    return errors


def compare_step(path, modes, batch=None, classes=64):
    """The largest relative errors of the loss and of any gradient of a whole training step: {mode: error}."""
    graph = load(path, OperatorGraph)
    inputs = make_batch(graph, classes) if batch is None else torch.load(batch, weights_only=True)
    state, errors = make_state(graph), {}
    weight = rows.statistics(graph, [inputs])[0]
    right = run_step(graph, state, inputs, scale=1.0 / weight)  # models round to float32 inside: the same scale
    plan = cases.plan_of(cases.problem_of(graph, 1, 1, [[segment.name for segment in graph.segments]]), [([0], [0])],
                         [[0]], ["0F0 0I0 0W0"])
    for mode in modes:
        name = "context" if mode == "context" else "tensor"
        team = Team({name: dist.get_world_size()}, modes=(TeamMode(name, mode),))
        engine = Engine(replace(plan, team=team), graph, state)
        loss = engine.step(inputs)
        pieces = member_pieces(engine.compiled, graph, engine.mesh)
        gradients = {fqn: item.grad for fqn, item in engine.named_parameters() if item.grad is not None}
        assert gradients.keys() == right.gradients.keys()
        wanted = float(right.outputs[graph.loss]) / weight
        found = [abs(loss - wanted) / wanted]
        least = 1e-3 * max(float(grad.norm()) for grad in right.gradients.values())
        for fqn, whole in right.gradients.items():
            expected = pieces[fqn].cut(whole) if fqn in pieces else whole
            found.append(float((gradients[fqn] - expected).norm()) / max(float(whole.norm()), least))
        errors[mode] = max(found)
    return errors


def _errors(program, trace, made, whole, axis):
    """Errors of each result, put together from all members, relative to its norm.

    Gradients that are zero but for rounding (a key bias: softmax does not see it) are held against the others.
    """
    ours = (*program.trace.outputs, *program.trace.input_grads, *program.trace.parameter_grads,
            *program.trace.buffer_updates.values())
    theirs = (*trace.outputs, *trace.input_grads, *trace.parameter_grads, *trace.buffer_updates.values())
    least = 1e-3 * max((float(whole[name].double().norm()) for name in theirs if name is not None), default=0.0)
    for name, expected in zip(ours, theirs, strict=True):
        assert (name is None) == (expected is None)
        if name is None:
            continue
        part, tensor, right = program.ends[expected], made[name], whole[expected]
        if part == PARTIAL:
            tensor = axis.all_reduce(tensor, "sum")
        elif part.kind is Kind.DIVIDED:
            tensor = whole_of(axis.gather(tensor), part.dim, part.sections)
        assert tensor.shape == right.shape and tensor.dtype == right.dtype
        yield float((tensor.double() - right.double()).norm()) / max(float(right.double().norm()), least, 1e-30)
