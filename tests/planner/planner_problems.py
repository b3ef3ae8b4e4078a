"""Random planning problems for the planner's property tests: chains and branches, bytes, loads, odd phases."""

from __future__ import annotations

from hypothesis import strategies as st

from mipipe.graphs.operator_graph import Tags
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem


@st.composite
def problems(draw: st.DrawFn, *, max_groups: int = 6, max_ranks: int = 3, max_microbatches: int = 5,
             tight: bool = False) -> PlanningProblem:
    """Problems with small integers; with ``tight`` the activation limit holds one to two microbatches of everything."""
    count = draw(st.integers(1, max_groups))
    microbatches = draw(st.integers(1, max_microbatches))
    vary = draw(st.booleans())
    groups = []
    for number in range(count):
        first_frozen = number == 0 and draw(st.booleans())
        times = PhaseTimes(draw(st.integers(1, 9)), None if first_frozen else draw(st.integers(1, 9)),
                           None if draw(st.booleans()) and first_frozen else draw(st.integers(1, 9)))
        loads: tuple[float, ...] = ()
        if vary and number < 2:
            loads = tuple(draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(microbatches))
        groups.append(Group(f"g{number}", {"d": times}, resident_bytes=draw(st.integers(0, 5)),
                            gradient_bytes=draw(st.integers(0, 3)), saved_fi_bytes=draw(st.integers(0, 4)),
                            saved_fw_bytes=draw(st.integers(0, 4)), saved_iw_bytes=draw(st.integers(0, 6)),
                            workspace_bytes=draw(st.integers(0, 2)), loads=loads,
                            recompute_bytes=draw(st.sampled_from([None, 1])),
                            forward_workspace_bytes=draw(st.sampled_from([None, 0, 3]))))
    edges = []
    for number in range(1, count):
        sources = {draw(st.integers(0, number - 1))} | ({number - 1} if draw(st.booleans()) else set())
        for source in sorted(sources):
            times = groups[source].times["d"]
            gradient = None if times.i_ns is None and times.w_ns is None else 2
            edges.append(GroupEdge(source, (number,), draw(st.integers(0, 3)), gradient, f"v{source}.{number}"))
    saved = sum(4 * (g.saved_fi_bytes + g.saved_fw_bytes + g.saved_iw_bytes
                     + max(g.workspace_bytes, g.forward_workspace)) + 12 for g in groups)
    limits = Limits(activation_bytes=draw(st.integers(saved // 4, saved))) if tight else Limits()
    ranks = draw(st.integers(1, max_ranks))
    link = Link(draw(st.integers(0, 3)), draw(st.sampled_from([None, 10**9])))
    topology = Topology(tuple(Device(f"d{r}", "d", 10**6, local_rank=r) for r in range(ranks)), link, link)
    return PlanningProblem("random", tuple(groups), tuple(edges), topology, microbatches, limits=limits)


def multimodal_problem(*, ranks: int = 4, microbatches: int = 6, layers: int = 8, encoder_layers: int = 4,
                       images: tuple[float, ...] = (), activation_bytes: int | None = None,
                       **details: object) -> PlanningProblem:
    """A text embedding and an image encoder with its projector that meet before the language model's layers."""
    groups, edges = [], []

    def add(name: str, branch: str, work: int, layer: int | None = None) -> int:
        size = 40 * work
        loads = images if branch != "text" else ()
        groups.append(Group(name, {"d": PhaseTimes(work, work, work)}, resident_bytes=size, gradient_bytes=size // 4,
                            saved_fi_bytes=work, saved_fw_bytes=work, saved_iw_bytes=work // 2, loads=loads,
                            recompute_bytes=1, tags=Tags(layer=layer, branch=branch)))
        return len(groups) - 1

    def link(source: int, target: int) -> None:
        edges.append(GroupEdge(source, (target,), 2, 2, f"v{source}.{target}"))

    words = add("embed", "text", 1)
    last = add("patches", "vision", 1)
    for layer in range(encoder_layers):
        last, before = add(f"vision{layer}", "vision", 3, layer), last
        link(before, last)
    last, before = add("projector", "projector", 1), last
    link(before, last)
    for layer in range(layers):
        last, before = add(f"layer{layer}", "text", 10, layer), last
        link(before, last)
        if layer == 0:
            link(words, last)
    last, before = add("head", "text", 6), last
    link(before, last)
    link_ = Link(1, None)
    topology = Topology(tuple(Device(f"d{r}", "d", 10**6, local_rank=r) for r in range(ranks)), link_, link_)
    return PlanningProblem("multimodal", tuple(groups), tuple(edges), topology, microbatches,
                           limits=Limits(activation_bytes=activation_bytes), **details)  # type: ignore[arg-type]
