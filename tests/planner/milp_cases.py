"""Small random problems and their optimum by exhaustive search, shared by the tests of the formulations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.jobs.job_shop import Jobs, elementary_actions, job_shop
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem


@st.composite
def problems(draw, max_groups: int = 3, max_microbatches: int = 2, max_jobs: int = 14) -> PlanningProblem:
    """A DAG of a few groups on two devices: integer durations, transfers, and memory for at least one microbatch."""
    count = draw(st.integers(2, max_groups))
    microbatches = draw(st.integers(1, max(1, min(max_microbatches, max_jobs // (3 * count)))))
    durations = st.integers(1, 4)
    groups = []
    for g in range(count):
        phases = PhaseTimes(draw(durations), draw(durations), draw(st.sampled_from([None, 1, 2, 3])))
        groups.append(Group(f"g{g}", {"device": phases}, saved_fi_bytes=draw(st.integers(0, 2)),
                            saved_fw_bytes=draw(st.integers(0, 2)), saved_iw_bytes=draw(st.integers(0, 1)),
                            resident_bytes=1, workspace_bytes=draw(st.integers(0, 1)),
                            forward_workspace_bytes=draw(st.sampled_from([None, 0, 2]))))
    pairs = [(a, b) for a, b in itertools.combinations(range(count), 2) if b == a + 1 or draw(st.booleans())]
    size = draw(st.sampled_from([0, 0, 1, 2]))  # bytes occupy a channel, latency does not
    edges = tuple(GroupEdge(a, (b,), size, size, value=f"v{a}.{b}") for a, b in pairs)
    one = sum(group.saved_fi_bytes + group.saved_fw_bytes + group.saved_iw_bytes
              + max(group.workspace_bytes, group.forward_workspace) for group in groups)
    cap = draw(st.one_of(st.none(), st.integers(one, 2 * one + 1)))
    topology = Topology.uniform(2, latency_ns=draw(st.integers(0, 2)), bytes_per_s=10**9)
    return PlanningProblem("random", tuple(groups), edges, topology, microbatches, limits=Limits(activation_bytes=cap))


def may_queue(problem: PlanningProblem) -> bool:
    """Whether a transfer may have to wait for another one."""
    return any(edge.num_bytes for edge in problem.edges)


def at(problem: PlanningProblem, ranks: tuple[int, ...]) -> StageView:
    """The problem with every group a stage of its own on the given rank."""
    return view(problem, Placement(tuple(Stage((g,), (rank,)) for g, rank in enumerate(ranks)),
                                   tuple((rank,) * problem.num_microbatches for rank in ranks)))


def placements(problem: PlanningProblem) -> list[StageView]:
    """Every placement with one replica of each group, up to the names of the (equal) devices."""
    return [at(problem, (0, *rest)) for rest in itertools.product(range(problem.num_ranks),
                                                                  repeat=len(problem.groups) - 1)]


def with_pairs(stage_view: StageView) -> Iterator[list[Action]]:
    """The actions of a placement with every choice of forwards and backwards of one rank as overlapped pairs."""
    actions = elementary_actions(stage_view)
    backs = [action for action in actions if action.kind is ActionKind.I and stage_view.w_ns[action.stage] is not None]

    def choose(forwards: list[Action], free: list[Action]) -> Iterator[list[Action]]:
        if not forwards:
            yield []
            return
        first, *rest = forwards
        yield from choose(rest, free)
        rank = stage_view.rank(first.stage, first.microbatch)
        for back in free:
            if back.microbatch != first.microbatch and stage_view.rank(back.stage, back.microbatch) == rank:
                pair = Action(first.stage, ActionKind.OVERLAP_F_B, first.microbatch, (back.stage, back.microbatch))
                for others in choose(rest, [other for other in free if other != back]):
                    yield [pair, *others]

    for pairs in choose([action for action in actions if action.kind is ActionKind.F], backs):
        paired = {part for pair in pairs for part in pair.parts()}
        yield [*pairs, *(action for action in actions if action.parts()[0] not in paired)]


def optimum(stage_view: StageView, best: int = 1 << 60, actions: list[Action] | None = None) -> int:
    """The shortest makespan over all orders, by branch and bound without any of the planner's arguments.

    Actions are taken in the order of their starts; memory by the order on a rank; transfers by the channel's queue.
    """
    jobs = job_shop(stage_view, actions, fifo=False)
    tails = _tails(jobs)
    waits = [0] * jobs.count
    for releases in jobs.compiled.releases:
        for consumer, *_ in releases:
            waits[consumer] += 1
    state = {"best": best}
    ranks, updates = stage_view.problem.num_ranks, stage_view.updates_ns()

    def go(now: int, done: frozenset[int], ready: dict[int, int], left: dict[int, int], free_at: tuple[int, ...],
           held: tuple[int, ...], queue: dict[int, int], makespan: int) -> None:
        if len(done) == jobs.count:
            state["best"] = min(state["best"], makespan)
            return
        for job in range(jobs.count):
            rank = jobs.machine[job] // 2
            if job in done or left[job]:
                continue
            start = max(ready[job], free_at[rank])
            if start < now or start + tails[job] >= state["best"]:
                continue
            if held[rank] + jobs.alloc[job] + jobs.workspace[job] > jobs.capacity[rank]:
                continue
            end = start + jobs.durations[job]
            later, open_, channels = dict(ready), dict(left), dict(queue)
            for consumer, channel, duration, _, _, occupied in jobs.compiled.releases[job]:
                arrival = end
                if channel >= 0:
                    begin = max(end, channels.get(channel, 0))
                    channels[channel] = begin + occupied
                    arrival = begin + duration
                later[consumer] = max(later[consumer], arrival)
                open_[consumer] -= 1
            go(start, done | {job}, later, open_, (*free_at[:rank], end, *free_at[rank + 1:]),
               (*held[:rank], held[rank] + jobs.alloc[job] - jobs.free[job], *held[rank + 1:]), channels,
               max(makespan, end + updates[rank]))

    go(0, frozenset(), dict.fromkeys(range(jobs.count), 0), dict(enumerate(waits)), (0,) * ranks, (0,) * ranks, {}, 0)
    return state["best"]


def _tails(jobs: Jobs) -> list[int]:
    """Longest data path from the start of every job; 1 << 60 for jobs that wait for themselves."""
    compiled = jobs.compiled
    tails: dict[int, int] = {}

    def tail(job: int) -> int:
        if job not in tails:
            tails[job] = 1 << 60
            after = [tail(consumer) for consumer, *_ in compiled.releases[job]]
            tails[job] = jobs.durations[job] + max(after, default=0)
        return tails[job]

    return [tail(job) for job in range(jobs.count)]
