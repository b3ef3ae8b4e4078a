"""Transfers that hold the compute stream, as those of Megatron-LM's and DeepSpeed's 1F1B do.

There a stage does not go on before what it made is sent and what it needs has come, both in the order of the compute
stream. A planning problem's transfers run beside the compute; so here they become part of the durations: F of a stage
takes its inputs and gives its outputs, I the gradients of both, and the links take no time. A transfer then counts at
both ends, one after the other, so the first microbatch's way through P stages is longer by P - 1 transfers than where
sender and receiver meet at once.
"""

from __future__ import annotations

from dataclasses import replace

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.topology import Link
from mipipe.planner.problem import PhaseTimes, PlanningProblem


def hold_transfers(problem: PlanningProblem) -> PlanningProblem:
    """The problem with its transfers in its durations, for a chain of stages, group g on rank g.

    Raises:
        ProblemError: another number of groups than ranks: then the placement says which values are sent.
    """
    count, topology = len(problem.groups), problem.topology
    if count != problem.num_ranks:
        raise ProblemError(f"problem {problem.name}: {count} groups on {problem.num_ranks} ranks; transfers can hold"
                           " the compute stream where every rank has one group")
    forward, backward = [0] * count, [0] * count
    for edge in problem.edges:
        for target in edge.targets:
            for end in (edge.source, target):
                forward[end] += topology.transfer_ns(edge.source, target, edge.num_bytes)
                if edge.grad_bytes is not None:
                    backward[end] += topology.transfer_ns(target, edge.source, edge.grad_bytes)
    groups = tuple(replace(group, times={kind: _longer(times, forward[number], backward[number])
                                         for kind, times in group.times.items()})
                   for number, group in enumerate(problem.groups))
    instant = replace(topology, within_host=Link(), between_hosts=Link(), overrides={})
    return problem.replace(groups=groups, topology=instant)


def _longer(times: PhaseTimes, forward: int, backward: int) -> PhaseTimes:
    """Gradients are sent in I, or in W where a stage's inputs need none."""
    i_ns, w_ns = times.i_ns, times.w_ns
    if i_ns is not None:
        i_ns += backward
    elif w_ns is not None:
        w_ns += backward
    return PhaseTimes(times.f_ns + forward, i_ns, w_ns)
