"""What joining groups into stages may save: values between the same two stages travel as one transfer.

A stage receives a value once, however many of its groups read it, and what several values take is rounded up once. So
schedules of groups that are stages of their own bound those of joined ones only where no bytes can be saved that way;
and, where transfers queue in the order in which they become ready, only in a chain: a joined stage sends all that it
makes at its end, so that what was made later may go first.
"""

from __future__ import annotations

from dataclasses import replace

from mipipe.planner.problem import PlanningProblem


def without_joint_bytes(problem: PlanningProblem) -> PlanningProblem:
    """The problem whose values have no bytes where joining stages may save some; the problem itself where none may."""
    links = (problem.topology.within_host, problem.topology.between_hosts, *problem.topology.overrides.values())
    rates = {link.bytes_per_s for link in links if link.bytes_per_s is not None}
    if not rates or problem.num_ranks < 2:
        return problem
    chain = is_chain(problem)
    rounded = any((size or 0) * 10**9 % rate for edge in problem.edges for size in (edge.num_bytes, edge.grad_bytes)
                  for rate in rates) or any(group.loads for group in problem.groups)

    def saves(targets: tuple[int, ...], size: int) -> bool:
        return size > 0 and (len(set(targets)) > 1 or (rounded and not chain))

    edges = tuple(replace(edge, num_bytes=0, grad_bytes=None if edge.grad_bytes is None else 0)
                  if saves(edge.targets, max(edge.num_bytes, edge.grad_bytes or 0)) else edge for edge in problem.edges)
    return problem if edges == problem.edges else problem.replace(edges=edges)


def is_chain(problem: PlanningProblem) -> bool:
    """Whether every group reads at most one other's value, and at most one reads its own."""
    pairs = [(edge.source, target) for edge in problem.edges for target in set(edge.targets)]
    return len({source for source, _ in pairs}) == len(pairs) == len({target for _, target in pairs})
