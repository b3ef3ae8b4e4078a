"""OctoPipe's public instance: nemotron-nano-v2-9B on 4 ranks with 8 microbatches (arXiv 2509.23722).

Times per layer and microbatch in ms as the authors published them (guojihu-hana/SimPipe, profiles/nemotron-nano-v2-9B,
pattern of the model: M Mamba, - MLP, * attention), rounded to 0.01 ms; backwards split, transfers take nothing, memory
is unlimited. The embedding (E) runs with the first layer, the head with the loss (L) with the last; every layer is on
one rank. There 1F1B takes 133,121 units of 0.01 ms, OctoPipe 89,870; the work alone is 85,194.
"""

from __future__ import annotations

from mipipe.graphs.topology import Topology
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem

PATTERN = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
MILLISECONDS = {"E": (0.7589, 2.8654, 0.0), "M": (2.6768, 4.2984, 1.7599), "-": (1.8477, 1.909, 1.6866),
                "*": (1.9254, 2.4534, 0.6547), "L": (14.2155, 15.7056, 0.0595)}
"""F, I and W of every kind of layer."""

UNIT_NS = 10_000


def octopipe_problem(ranks: int = 4, microbatches: int = 8) -> PlanningProblem:
    """The instance as a planning problem, in units of 0.01 ms."""
    groups = []
    for n, kind in enumerate(PATTERN):
        kinds = ("E" * (n == 0), kind, "L" * (n == len(PATTERN) - 1))
        f, i, w = (sum(round(100 * MILLISECONDS[one][phase]) for one in kinds if one) for phase in range(3))
        groups.append(Group(f"layer{n}{kind}", {"device": PhaseTimes(f * UNIT_NS, i * UNIT_NS, w * UNIT_NS)},
                            resident_bytes=1, saved_fw_bytes=1, single=True))
    edges = tuple(GroupEdge(n, (n + 1,), value=f"layer{n}.out") for n in range(len(groups) - 1))
    return PlanningProblem("nemotron-nano-v2-9B", tuple(groups), edges,
                           Topology.uniform(ranks, latency_ns=0, kind="device"), microbatches, unit_ns=UNIT_NS)
