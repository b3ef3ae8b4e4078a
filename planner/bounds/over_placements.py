"""A lower bound on the makespan over all placements a problem allows, replicas and routes included. No solver.

Sum the devices' time: ``D * makespan >= work + idle``, for each stream. Every device idles at least

- until the first of its groups can start: its *head*, the longest chain of forwards before that group; and
- between its first input gradient, which no device sees before the gradient's *head* (all forwards of one microbatch
  and the gradients behind it), and the forwards its memory lets it run before: ``capacity / (bytes per ns of F)``.

Which group a device meets first is the placement's choice; but D devices meet D different ones unless groups are
replicated, and replicas take resident bytes (and are forbidden where every group is ``single``). So the sum over
devices is at least the sum of the D smallest heads, where as many devices may share the very smallest as replicas fit
into the memory left over. On a chain the first gradients are further apart: no two devices have one of the same group
and microbatch (`mipipe.planner.bounds.first_gradients`); a device that does nothing waits for no gradient, so no moment
beyond the bound counts (`_within`). Groups without resident bytes can be everywhere: they count as
filling idle time with all their work (of every phase), or as sharable, whichever is better. A device's updates come
after all its work, so they count as work, and each at the end of its group's path.

Where a forward and a backward may overlap, work counts at a pair's ratio r (`mipipe.planner.jobs.overlap`), and so does
what fills idle time. A device whose first gradient comes at t and whose first group starts at h does at most t - h of
its work by then, without pairs: it needs ``t + r (work - (t - h))``, so ``(1 - r) t + r h`` counts as idle.

A chain of groups changes devices at least as often as its resident bytes overflow one; every change costs the cheapest
transfer. Beside that sum: one microbatch's critical path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.first_gradients import ChainUnit, chain_units, common_room, least_first_gradients
from mipipe.planner.bounds.loads import forwards_of, least_of, work_of
from mipipe.planner.jobs.memory import activation_room, resident_room
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.problem import Group, PlanningProblem


@dataclass(frozen=True, slots=True)
class Bound:
    """No schedule is shorter than ``ns``; ``what`` says which argument shows it."""

    ns: int
    what: str


@dataclass(frozen=True, slots=True)
class GroupTimes:
    """Per group: least durations over device kinds (0 where a phase does not exist), heads of F and of the gradient.

    Heads and ``longest`` are what paths take at the least, whatever is overlapped.
    """

    f: list[int]
    i: list[int]
    w: list[int]
    head: list[int]
    gradient_head: list[int | None]
    longest: int


def problem_bound(problem: PlanningProblem) -> Bound:
    """The best bound over all placements."""
    facts = facts_of(problem)
    best = [Bound(facts.longest, "one microbatch's critical path")]
    for stream in Stream:
        members = [g for g, group in enumerate(problem.groups) if group.stream is stream]
        if members and stream is not Stream.CHANNEL:
            best.append(_stream_bound(problem, facts, members, stream))
    return max(best, key=lambda bound: bound.ns)


def _stream_bound(problem: PlanningProblem, facts: GroupTimes, members: list[int], stream: Stream) -> Bound:
    devices = problem.num_ranks
    gain = pair_gain(problem)
    work = gain.shared(sum(work_of(problem, problem.groups[g], duration) for g in members
                           for duration in (facts.f[g], facts.i[g], facts.w[g])))
    work += sum(group.update_ns for group in problem.groups)
    start = _idle_before_start(problem, facts, members)
    gradient = 0
    if stream is Stream.COMPUTE:
        known = max(facts.longest, -(-(work + max(0, start)) // devices))
        gradients = _before_gradients(problem, facts, members)
        if gradients is not None:
            gradient, latest = gradients.idle(devices, problem.num_microbatches)
            bound = max(known, -(-(work + gradient) // devices))
            if latest > bound:
                gradient = _within(lambda most: gradients.idle(devices, problem.num_microbatches, most)[0], known,
                                   bound, work, devices)
    alone = _idle_without_pairs(problem, facts, members, gain.ratio) if gain.ratio < 1 else 0
    idle = max(0, start, gradient, alone)
    why = ""
    if idle:
        reason = ("its first group can start" if idle == start else
                  "gradients come back, its memory full of activations" if idle == gradient else
                  "gradients come back and work can overlap")
        why = f", and what each waits before {reason}"
    return Bound(-(-(work + idle) // devices), f"work of the {stream.value} stream over {devices} devices{why}")


def _within(idle: Callable[[int], int], known: int, most: int, work: int, devices: int) -> int:
    """Idle time where first gradients may come later than the bound: devices that do nothing at all wait for none, so
    a moment counts up to the makespan only, which is ``known`` or more and at its bound ``most`` or less.

    That is the least makespan K with ``devices * K >= work + idle(K)``. Idle time grows with K, by at most the devices
    for each nanosecond, so what holds at K holds beyond, and K is found by halving.

    Raises:
        OutOfTimeError: the solve's time is over.
    """
    low, high = known, most
    while low < high:
        clock.ask()
        middle = (low + high) // 2
        if work + idle(middle) <= devices * middle:
            high = middle
        else:
            low = middle + 1
    return idle(low)


def _idle_before_start(problem: PlanningProblem, facts: GroupTimes, members: list[int]) -> int:
    filled = _of_everywhere(problem, facts, members)
    bound = [(facts.head[g], problem.groups[g].resident_bytes) for g in members]
    solid = [(head, size) for head, size in bound if size]
    return max(_spread(problem, bound), _spread(problem, solid) - filled)


def _of_everywhere(problem: PlanningProblem, facts: GroupTimes, members: list[int]) -> int:
    """All work, of every phase, of the groups without resident bytes: any device may do it before its first other."""
    return sum(work_of(problem, problem.groups[g], duration) for g in members
               if not problem.groups[g].resident_bytes for duration in (facts.f[g], facts.i[g], facts.w[g]))


def _idle_without_pairs(problem: PlanningProblem, facts: GroupTimes, members: list[int], ratio: Fraction) -> int:
    """The least idle time with what work before the first gradients takes beyond its share (module docstring)."""
    gradients = [(head, problem.groups[g].resident_bytes) for g in members
                 if (head := facts.gradient_head[g]) is not None]
    if len(gradients) < len(members):
        return 0  # a device of frozen groups alone has no gradient to wait for
    return int((1 - ratio) * _spread(problem, gradients) + ratio * max(0, _idle_before_start(problem, facts, members)))


@dataclass(frozen=True, slots=True)
class _BeforeGradients:
    """What each device waits for its first gradient, less the forwards that fit before it, whatever the makespan.

    ``forwards`` and ``filled``: nanoseconds of all devices; ``spread``: the least sum of heads (`_spread`); ``chain``:
    (units, hop, their room) for `least_first_gradients`, None where the problem is no chain; each of those two over
    all units and over those with resident bytes.
    """

    forwards: int
    filled: int
    spread: tuple[int, int]
    chain: tuple[tuple[list[ChainUnit], int, int] | None, ...]
    relief: Fraction

    def idle(self, devices: int, microbatches: int, most: int | None = None) -> tuple[int, int]:
        """Sum over devices of (first gradient - forwards that fit), which may be negative, and the latest first
        gradient. ``most``: as of `least_first_gradients`."""
        apart = [(0, 0) if chain is None else least_first_gradients(
            chain[0], devices=devices, microbatches=microbatches, room=chain[2], slack=chain[1], relief=self.relief,
            most=most) for chain in self.chain]
        first, first_solid = (max(least, found) for least, (found, _) in zip(self.spread, apart, strict=True))
        return max(first, first_solid - self.filled) - self.forwards, max(latest for _, latest in apart)


def _before_gradients(problem: PlanningProblem, facts: GroupTimes, members: list[int]) -> _BeforeGradients | None:
    """None where forwards may hold nothing: those of frozen groups, and recomputed ones as little as they like."""
    heads = [(head, problem.groups[g].resident_bytes) for g in members
             if (head := facts.gradient_head[g]) is not None]
    if len(heads) < len(members) or any(problem.groups[g].recompute_bytes is not None for g in members):
        return None
    room = sum(activation_room(problem, rank) for rank in range(problem.num_ranks))
    held = {g: _held_before(problem, g) for g in members if not _saved(problem, g)}
    # what saves nothing comes after forwards that do, so many microbatches fit at once; more, as others return bytes
    relief = _relief(problem, facts, held)
    free, per_byte = 0, 0.0
    for g in members:
        group = problem.groups[g]
        rate, light = forwards_of(problem, group, facts.f[g])
        per_byte = max(per_byte, rate)
        if g not in held or relief is None or not held[g] or group.loads:
            free += light
        else:
            free += min(light, facts.f[g] * room // held[g] + 1)
    filled = _of_everywhere(problem, facts, members)
    ratio = pair_gain(problem).ratio
    forwards = int(ratio * (int(room * per_byte) + free + 1)) + 1
    chains = []
    for solid in (False, True):
        units, hop = lightest_units(problem, facts, solid=solid)
        chains.append(None if units is None else (units, hop, room_of_units(problem, units)))
    spread = _spread(problem, heads), _spread(problem, [(head, size) for head, size in heads if size])
    return _BeforeGradients(forwards, int(ratio * filled), spread, tuple(chains), relief or Fraction(0))


def _saved(problem: PlanningProblem, g: int) -> int:
    return problem.groups[g].saved_fi_bytes + problem.groups[g].saved_fw_bytes


def lightest_units(problem: PlanningProblem, facts: GroupTimes, *, solid: bool) -> tuple[list[ChainUnit] | None, int]:
    """(`chain_units` as fast as any microbatch passes them, nanoseconds of the cheapest hop between two); both take no
    time where pairs may hide all of it."""
    plain = pair_gain(problem).ratio == 1
    hop = cheapest_hop(problem) if plain else 0
    durations = [[least_of(group, value) if plain else 0 for value, group in zip(column, problem.groups, strict=True)]
                 for column in (facts.f, facts.i)]
    return chain_units(problem, durations=durations, heads=facts.head, gradient_heads=facts.gradient_head, hop=hop,
                       solid=solid), hop


def room_of_units(problem: PlanningProblem, units: Sequence[ChainUnit]) -> int:
    """Resident bytes of all devices that units and their replicas can fill."""
    if all(group.single for group in problem.groups):
        return sum(unit.size for unit in units)
    rooms = [resident_room(problem, rank) for rank in range(problem.num_ranks)]
    return common_room([unit.size for unit in units], rooms)


def _relief(problem: PlanningProblem, facts: GroupTimes, held: dict[int, int]) -> Fraction | None:
    """Work of forwards without bytes that other devices' gradients make room for, per nanosecond of theirs.

    Until the last device's first gradient each device has returned bytes since its own, at most so many per nanosecond
    of its gradients' work; ``held[g]`` bytes let one more F of g happen. None where that is more than a device gains.
    """
    returned = Fraction(0)
    for g, group in enumerate(problem.groups):
        for load in set(group.loads) or {1}:
            fi, fw, i, w = (round(amount * load) for amount in (group.saved_fi_bytes, group.saved_fw_bytes,
                                                                facts.i[g], facts.w[g]))
            for size, spent in ((fi, i or w), (fi + fw, i + w)):
                if size and (not spent or group.stream is not Stream.COMPUTE):
                    return None
                returned = max(returned, Fraction(size, spent) if size else Fraction(0))
    relief = sum((returned * facts.f[g] / size for g, size in held.items() if size), Fraction(0)) * Fraction(1001, 1000)
    return relief if relief * problem.num_ranks <= 1 else None


def _held_before(problem: PlanningProblem, g: int) -> int:
    """Saved bytes of all groups before ``g`` for one microbatch (of the least load)."""
    before: set[int] = set()
    for edge in sorted(problem.edges, key=lambda edge: -edge.source):
        if any(target == g or target in before for target in edge.targets):
            before.add(edge.source)
    return sum(least_of(group, group.saved_fi_bytes) + least_of(group, group.saved_fw_bytes)
               for group in (problem.groups[p] for p in before))


def _spread(problem: PlanningProblem, heads: Sequence[tuple[int, int]]) -> int:
    """Least sum over devices of the head of their first group; ``heads``: (head, resident bytes) of the groups."""
    if not heads:
        return 0
    devices = problem.num_ranks
    ordered = sorted(head for head, _ in heads)
    if all(group.single for group in problem.groups):
        return sum(ordered[min(k, len(ordered) - 1)] for k in range(devices))
    budget = sum(resident_room(problem, rank) for rank in range(devices)) - sum(size for _, size in heads)
    sizes = [size for _, size in heads]
    if budget < 0:
        return devices * ordered[0]
    extra = devices if min(sizes) == 0 else budget // min(sizes)
    distinct = max(0, devices - extra)
    # devices beyond the distinct ones share the first group; a problem with fewer groups than devices leaves some idle
    own = [ordered[min(k, len(ordered) - 1)] for k in range(distinct)]
    return sum(own) + (devices - distinct) * ordered[0]


def facts_of(problem: PlanningProblem) -> GroupTimes:
    count = len(problem.groups)
    kinds = {device.kind for device in problem.topology.devices}

    def least(name: str, group: Group) -> int:
        return min(getattr(group.times[kind], name) or 0 for kind in kinds)

    f, i, w = ([least(name, group) for group in problem.groups] for name in ("f_ns", "i_ns", "w_ns"))
    light = [[least_of(group, value) for value, group in zip(column, problem.groups, strict=True)]
             for column in (f, i, w)]
    hop = cheapest_hop(problem)
    device_bytes = max(resident_room(problem, rank) for rank in range(problem.num_ranks))

    def hops(size: int) -> int:
        return hop * max(0, -(-size // device_bytes) - 1) if device_bytes else 0

    size = [group.resident_bytes for group in problem.groups]
    forward = [(light[0][g], size[g]) for g in range(count)]  # (longest chain of F to the end of g, its bytes)
    incoming: list[list[int]] = [[] for _ in range(count)]
    backward: list[list[int]] = [[] for _ in range(count)]
    for edge in problem.edges:
        for target in edge.targets:
            incoming[target].append(edge.source)
            if edge.grad_bytes is not None:
                backward[edge.source].append(target)
    head = [0] * count
    for g in range(count):
        if incoming[g]:
            length, held = max(forward[p] for p in incoming[g])
            forward[g] = length + light[0][g], held + size[g]
            head[g] = length + hops(held + size[g])
    gradient_head, longest = _gradient_heads(problem, light, forward, backward, hops)
    gain = pair_gain(problem)
    return GroupTimes(f, i, w, [gain.shortened(path) for path in head],
                      [None if path is None else gain.shortened(path) for path in gradient_head],
                      max(gain.shortened(path) + group.update_ns
                          for path, group in zip(longest, problem.groups, strict=True)))


def _gradient_heads(problem: PlanningProblem, light: list[list[int]], forward: list[tuple[int, int]],
                    backward: list[list[int]], hops: Callable[[int], int]) -> tuple[list[int | None], list[int]]:
    """Per group the earliest moment of its gradient, and the longest path of one microbatch to its end."""
    phases = [next(iter(group.times.values())) for group in problem.groups]
    behind: list[int] = [group.resident_bytes for group in problem.groups]  # bytes of the chain of gradients behind g
    heads: list[int | None] = [None] * len(phases)
    longest = [length + hops(held) for length, held in forward]
    for g in reversed(range(len(phases))):
        if phases[g].i_ns is None and phases[g].w_ns is None:
            continue
        best = forward[g][0] + hops(forward[g][1])
        for target in backward[g]:
            earlier = heads[target]
            if earlier is None or phases[target].i_ns is None:
                continue
            held = behind[target] + problem.groups[g].resident_bytes
            arrival = earlier + light[1][target] + hops(held) - hops(behind[target])
            if arrival > best:
                best, behind[g] = arrival, held
        heads[g] = best
        longest[g] = max(longest[g], best + light[1][g] + light[2][g])
    return heads, longest


def cheapest_hop(problem: PlanningProblem) -> int:
    """No value or gradient of any microbatch moves to another device in less."""
    devices = range(problem.num_ranks)
    sizes = [least_of(problem.groups[edge.source], size) for edge in problem.edges
             for size in (edge.num_bytes, edge.grad_bytes) if size is not None]
    least = min(sizes, default=0)
    return min((problem.topology.transfer_ns(a, b, least) for a in devices for b in devices if a != b), default=0)
