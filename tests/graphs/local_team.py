"""A team of threads in one process: runs members' programs without process groups."""

import threading

import torch

from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.operators.collectives import part_of, whole_of
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind
from mipipe.graphs.tracing.trace import build_phase, phase_signature


class LocalTeam:
    """``size`` threads whose collectives meet at a barrier."""

    def __init__(self, size):
        self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=20), [None] * size

    def gather(self, member, x):
        self.slots[member] = x
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def operators(self, member):
        def all_reduce(x, op, size, axis):
            found = torch.stack(self.gather(member, x))
            return found.sum(0).to(x.dtype) if op == "sum" else found.amax(0)

        def all_gather(x, dim, sections, size, axis):
            return whole_of(self.gather(member, x), dim, sections)

        def take_part(x, dim, sections, size, axis):
            return part_of(x, member, size, dim, sections).clone()

        def reduce_scatter(x, dim, sections, size, axis):
            return take_part(all_reduce(x, "sum", size, axis), dim, sections, size, axis)

        def exchange_parts(x, source, target, size, axis):
            return take_part(all_gather(x, *source, size, axis), *target, size, axis)

        named = {"all_reduce": all_reduce, "all_gather": all_gather, "take_part": take_part,
                 "reduce_scatter": reduce_scatter, "exchange_parts": exchange_parts}
        return {f"mipipe.{name}.default": function for name, function in named.items()}

    def run(self, trace, arguments):
        """The results of a program by name, for every member, from each member's arguments by name."""
        results, errors = [None] * self.size, []

        def work(member):
            try:
                results[member] = run_phases(trace, arguments[member], self.operators(member))
            except BaseException as error:  # the others wait at the barrier
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(member,)) for member in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return results


def run_phases(trace, given, operators=None):
    """Run F, I and W on arguments by name, each phase's results joining them."""
    given = dict(given)
    for phase in filter(trace.has, Phase):
        names, results = phase_signature(trace, phase)
        made = build_phase(trace, phase, "cpu", operators)(*[given[name] for name in names])
        given.update(zip(results, made, strict=True))
    return given


def largest_error(trace, program, given, ends, arguments, size):
    """The largest error of a member's program against the whole trace, relative to each result's norm.

    ``given``, ``ends``: how arguments and results lie; ``arguments``: the whole ones, by name.
    """
    whole = run_phases(trace, arguments)
    local = [{name: part_of(tensor, member, size, part.dim, part.sections).clone()
              if (part := given.get(name, WHOLE)).kind is Kind.DIVIDED else tensor
              for name, tensor in arguments.items()} for member in range(size)]
    made = LocalTeam(size).run(program, local)
    ours = (*program.outputs, *program.input_grads, *program.parameter_grads)
    theirs = (*trace.outputs, *trace.input_grads, *trace.parameter_grads)
    scale = max(float(whole[name].double().norm()) for name in theirs if name is not None)
    errors = [0.0]
    for name, expected in zip(ours, theirs, strict=True):
        if name is None:
            continue
        parts, part, right = [item[name] for item in made], ends[expected], whole[expected]
        if part.kind is Kind.DIVIDED:
            found = [whole_of(parts, part.dim, part.sections)]
        else:
            found = [torch.stack(parts).sum(0)] if part == PARTIAL else parts
        for tensor in found:
            assert tensor.shape == right.shape and tensor.dtype == right.dtype
            errors.append(float((tensor.double() - right.double()).norm()) / max(float(right.double().norm()),
                                                                                 1e-3 * scale, 1e-30))
    return max(errors)
