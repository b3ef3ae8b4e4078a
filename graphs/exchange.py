"""Expert parallelism as the planner sees it: what all-to-alls move, and what a rank holds and computes.

A graph captured with ``expert_parallel`` = G has dispatch and combine segments whose operators move rows between the G
ranks that share the experts (form (b) of a MoE layer); these ranks are one plan rank in each of G copies of
the plan. Rank d holds the d-th G-th of the experts. With ``expert_loads`` (tokens per layer and expert, measured) the
busiest rank decides: it gets ``share * G`` times the rows of an even split. All peers' messages of an all-to-all are
under way at once, through one link per rank. Left out: contention between links, and replicas of busy experts.

Legend: G ranks, E experts, T tokens, k experts per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mipipe.graphs.errors import InputError, ProblemError
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role, SegmentTrace
from mipipe.graphs.topology import Link, Topology

MOVES = ("mipipe.all_to_all_send", "mipipe.all_to_all_return")
"""Operators that move rows between ranks; `all_to_all_route` only says where they go."""

Loads = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Share:
    """What the busiest of ``ranks`` ranks does in one MoE layer, relative to an even split.

    ``work``: rows its experts compute, 1.0 when even. ``wire``: the part of T*k rows that crosses its link in the
    busier direction of one all-to-all, (G-1)/G when even.
    """

    ranks: int
    work: float
    wire: float


def exchanges(graph: OperatorGraph) -> bool:
    """Whether tokens travel to their experts: the graph was captured with ``expert_parallel``."""
    return any(item.kind.startswith(MOVES) for trace in graph.traces for item in trace.operators)


def expert_shares(graph: OperatorGraph) -> dict[str, Share]:
    """The share of each dispatch, expert and combine segment by name; empty where nothing is exchanged."""
    ranks = int(graph.source.get("expert_parallel", 1))
    if ranks < 2:
        return {}
    loads: Loads | None = graph.source.get("expert_loads")
    layers: dict[str, int] = {}
    found: dict[str, Share] = {}
    for segment in graph.segments:
        if segment.tags.role in (Role.DISPATCH, Role.EXPERTS, Role.COMBINE):
            number = layers.setdefault(segment.name.rpartition(".")[0], len(layers))
            found[segment.name] = share_of(ranks, None if loads is None else loads[number])
    return found


def share_of(ranks: int, loads: Sequence[float] | None) -> Share:
    """The busiest rank's share in a layer with these tokens per expert; None: all equal."""
    if loads is None or not sum(loads):
        return Share(ranks, 1.0, (ranks - 1) / ranks)
    size, total = len(loads) // ranks, sum(loads)
    parts = [sum(loads[rank * size:(rank + 1) * size]) / total for rank in range(ranks)]
    return Share(ranks, max(parts) * ranks, max(max((ranks - 1) * part, 1 - part) for part in parts))


def check_exchange(source: Mapping[str, Any], found: Sequence[int]) -> None:
    """Raise `InputError` unless the ranks and loads that a capture was asked for fit its layers' numbers of experts."""
    ranks, loads = int(source.get("expert_parallel", 1)), source.get("expert_loads")
    layers, experts = len(found), max(found, default=0)
    if ranks > 1 and not layers:
        raise InputError(f"expert parallel: found no experts to share among {ranks} ranks; MoE models of transformers"
                         " have them")
    if ranks > 1 and experts % ranks:
        raise InputError(f"expert parallel: found {ranks} ranks, expected a divisor of the {experts} experts")
    if loads is not None and (len(loads) != layers or any(len(row) != experts for row in loads)):
        raise InputError(f"expert loads: found {len(loads)} layers of {len(loads[0])} experts, expected {layers} of"
                         f" {experts}")


def slowest_link(topology: Topology) -> Link | None:
    """The link that every all-to-all is charged: the slowest between two devices, or what the file says of links.

    None where it says nothing. (The ranks that share experts may be copies of a plan for a single device.)
    """
    hosts = [device.host for device in topology.devices]
    same = sum(count * (count - 1) for count in Counter(hosts).values())
    other = len(hosts) * (len(hosts) - 1) - same  # pairs, counted: a cluster has millions of them
    links = set()
    for key, link in topology.overrides.items():
        a, b = (int(end) for end in key.split("->"))
        if a != b:
            links.add(link)
            same, other = (same - 1, other) if hosts[a] == hosts[b] else (same, other - 1)
    links |= ({topology.within_host} if same else set()) | ({topology.between_hosts} if other else set())
    if not links:
        links = {link for link in (topology.within_host, topology.between_hosts) if link.bytes_per_s is not None}
    return max(links, key=lambda link: (link.transfer_ns(10**6), link.latency_ns), default=None)


def exchange_ns(trace: SegmentTrace, phase: Phase, share: Share, link: Link | None) -> int:
    """Nanoseconds that a phase's rows take on the wire.

    Raises:
        ProblemError: there are rows to move and no link.
    """
    size = moved_bytes(trace, phase, share)
    if size and link is None:
        raise ProblemError("costs: the graph has all-to-alls, so they need a link to be charged to; add one to the"
                           " cluster file (links.within_host, or links.between_hosts)")
    return link.transfer_ns(size) if size and link is not None else 0


def moved_bytes(trace: SegmentTrace, phase: Phase, share: Share) -> int:
    """Bytes that cross the busiest rank's link, in one direction, in a phase's all-to-alls."""
    rows = sum(item.outputs[0].num_bytes for item in trace.phase_operators(phase) if item.kind.startswith(MOVES))
    return round(rows * share.wire)


def exchange_note(shares: Mapping[str, Share], link: Link) -> str:
    """How all-to-alls were charged, for a table's notes."""
    share = next(iter(shares.values()))
    worst = max(item.work for item in shares.values())
    rate = "no limit" if link.bytes_per_s is None else f"{link.bytes_per_s / 1e9:g} GB/s"
    return f"{share.ranks} ranks, {link.latency_ns} ns and {rate}, busiest rank {worst:.3g} x an even share"
