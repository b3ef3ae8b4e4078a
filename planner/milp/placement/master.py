"""Which device holds how much of a chain, in which order: the master MIP over counted layers.

The chain's blocks are *runs* r of equal blocks (an embedding, 60 layers, a head). It is cut into positions k = 0, 1, ..
that follow each other; n[r,k] counts the blocks of run r in position k, x[k,d] = 1 puts the position on device d. A
device may have several positions. With s copies side by side (twins) the devices are one copy's, D / s, and each copy
takes M / s microbatches: the two directions of a two-way pipeline load and fill their ranks like two twins.

    minimise C + EVEN sum_d e_d,   C >= e_d
    sum_d x[k,d] = 1,  m[r,k,d] <= N_r x[k,d],  sum_d m[r,k,d] = n[r,k]             m: blocks of r in k on d
    sum_k n[r,k] = N_r;  n[r+1,j] > 0 for j <= k only if sum_{j <= k} n[r,j] = N_r  runs in their order
    t[k] >= x[k,d] - x[k+1,d]                                                         a transfer after position k
    start_k = sum_{j<k} (f n[j] + c t[j]),   back_k = all forwards + sum_{j>k} (i n[j]) + transfers there and back
    head_d >= start_k - H (1 - first[k,d]),  return_d >= back_k - H (1 - gradient[k,d]),  last_d >= H' - ...
    e_d >= head_d + M load_d                                                          its first action, its work
    e_d >= start_k + M load_d - M sum_{j<k} f m[.,j,d]   k on d: only forwards of positions before it come sooner
    e_d >= back_k + M sum_{j<=k} (i + w) m[.,j,d]        the same for gradients
    e_d >= head_d + M (its F and I) + end_d      after its last input gradient those of the positions before follow
    e_d >= return_d + M load_d - held_d          until gradients return it runs the forwards its memory holds
    e_d >= return_d + needed_d - held_d + last_d its last forward follows the others and what makes room for it; last_d
                                                 is what comes after it
    sum resident m <= room,  sum saved m <= capacity                                  one microbatch at a time fits

(head, return, last and end take the most favourable of d's positions each; held_d, needed_d as in
`mipipe.planner.bounds.at_placement`, per byte at the best rate of any run.) Equal devices are numbered by their first
position. Cuts: a placement that was scheduled, and with it every renumbering of its devices, need not come again.

Ends left out of the chain are dealt to the devices as s_d, part of their loads: sum_d s_d is their work.

C is a lower bound for every placement with so many positions and copies, where no ends are left out (which could fill
what a device waits); `mipipe.planner.milp.placement.shares` has the model
of units for problems that are no chain of equal devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipipe.planner import clock
from mipipe.planner.gap import BOUND_SLACK
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome
from mipipe.planner.placements.counts import Chain, Cut

NAME = "master MIP"
"""What the formulation is called in a plan's history."""

EVEN = 0.02
"""Weight of the devices' mean end beside the latest: of equal proposals the one that leaves most slack."""


@dataclass(frozen=True, slots=True)
class MasterProposal:
    """What the master proposes: the cut that excludes it later, the value C (ns) and what is proven of C."""

    cut: Cut
    value_ns: float
    bound_ns: float | None
    outcome: SolverOutcome


def propose(chain: Chain, positions: int, cuts: Sequence[Cut] = (), *, time_limit_s: float, seed: int,
            start: Cut | None = None, allowed: Sequence[Sequence[int]] | None = None,
            cutoff_ns: float | None = None) -> tuple[MasterProposal | None, SolverOutcome]:
    """The best placement with so many positions that none of the cuts excludes, and the solve.

    ``start``: a placement to begin with; ``allowed``: the devices that every position may be on, where not all are (its
    neighbourhood, if most positions have one); ``cutoff_ns``: only values below are of interest.
    """
    scale = chain.microbatches * chain.work_ns / chain.devices / 1000
    model = build(chain, positions, cuts, scale, allowed)
    if start is not None:
        _begin(model, chain, start)
    if cutoff_ns is not None:
        model.C.setub(max(0.0, cutoff_ns / scale))
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, gap=1e-3, warm_start=start is not None)
    if not outcome.has_solution:
        return None, outcome
    where = tuple(max((d for j, d in model.x if j == k), key=lambda d: model.x[k, d].value) for k in range(positions))
    counts = tuple(tuple(round(model.n[r, k].value) for k in range(positions)) for r in range(len(chain.runs)))
    bound = None if outcome.bound is None else max(0.0, outcome.bound / (1 + EVEN) - BOUND_SLACK) * scale
    return MasterProposal(Cut(where, counts), model.C.value * scale, bound, outcome), outcome


def build(chain: Chain, positions: int, cuts: Sequence[Cut], scale: float,
          allowed: Sequence[Sequence[int]] | None = None) -> pyo.ConcreteModel:
    """The model of the module docstring, times in units of ``scale`` ns."""
    model = pyo.ConcreteModel(name=NAME)
    ks, ds, rs = range(positions), range(chain.devices), range(len(chain.runs))
    pairs = [(k, d) for k in ks for d in (ds if allowed is None else allowed[k])]
    model.x = pyo.Var(pairs, domain=pyo.Binary)
    model.n = pyo.Var(rs, ks, domain=pyo.NonNegativeIntegers, bounds=lambda _, r, k: (0, chain.runs[r].count))
    model.m = pyo.Var(rs, pairs, bounds=lambda _, r, k, d: (0, chain.runs[r].count))
    model.t = pyo.Var(ks, bounds=(0, 1))
    model.C = pyo.Var(bounds=(0, None))
    model.e = pyo.Var(ds, bounds=(0, None))
    model.s = pyo.Var(ds, bounds=(0, None))
    model.rows = pyo.ConstraintList()
    model.rows.add(sum(model.s[d] for d in ds) == chain.microbatches * chain.spread_ns / scale)
    for k in ks:
        clock.ask()
        own = [d for j, d in pairs if j == k]
        model.rows.add(sum(model.x[k, d] for d in own) == 1)
        for r in rs:
            model.rows.add(sum(model.m[r, k, d] for d in own) == model.n[r, k])
            for d in own:
                model.rows.add(model.m[r, k, d] <= chain.runs[r].count * model.x[k, d])
        for d in own:
            if allowed is None and d:  # equal devices are numbered by their first position
                model.rows.add(model.x[k, d] <= sum(model.x[j, d - 1] for j in range(k)))
            if k + 1 < positions:
                stays = model.x[k + 1, d] if (k + 1, d) in model.x else 0  # noqa: SIM401
                model.rows.add(model.t[k] >= model.x[k, d] - stays)
    _in_order(model, chain, positions)
    _device_rows(model, chain, positions, scale)
    model.goal = pyo.Objective(expr=model.C + EVEN / chain.devices * sum(model.e[d] for d in ds))
    for number, cut in enumerate(cuts):
        if len(cut.devices) == positions:
            _exclude(model, chain, cut, number)
    return model


def _in_order(model: pyo.ConcreteModel, chain: Chain, positions: int) -> None:
    """All blocks are somewhere, runs follow each other, and every position has a block."""
    ks, rs = range(positions), range(len(chain.runs))
    model.done = pyo.Var(rs, ks, domain=pyo.Binary)
    for r in rs:
        model.rows.add(sum(model.n[r, k] for k in ks) == chain.runs[r].count)
        for k in ks:
            so_far = sum(model.n[r, j] for j in range(k + 1))
            model.rows.add(chain.runs[r].count * model.done[r, k] <= so_far)
            if r + 1 < len(chain.runs):
                model.rows.add(sum(model.n[r + 1, j] for j in range(k + 1))
                               <= chain.runs[r + 1].count * model.done[r, k])
    for k in ks:
        model.rows.add(sum(model.n[r, k] for r in rs) >= 1)


def _device_rows(model: pyo.ConcreteModel, chain: Chain, positions: int, scale: float) -> None:
    """Everything that holds on one device."""
    ks, ds, rs, runs = range(positions), range(chain.devices), range(len(chain.runs)), chain.runs
    count = chain.microbatches

    def on(name: str, d: int) -> pyo.Expression:
        return sum(getattr(runs[r], name) * model.m[r, k, d] for r in rs for k in held_by[d])

    held_by = [[k for k in ks if (k, d) in model.x] for d in ds]
    moments, big = _moments(model, chain, positions, scale)
    horizon = big + count / scale * chain.work_ns
    for name in moments:
        model.add_component(name, pyo.Var(list(model.x), domain=pyo.Binary))
    saved = [run for run in runs if run.saved]
    rate = max((run.f / run.saved for run in saved), default=0.0)
    price = min(((run.i + run.w) / run.saved for run in saved), default=0.0)
    for d in ds:
        model.rows.add(model.e[d] <= model.C)
        if not held_by[d]:  # no position is allowed there: the device does nothing
            continue
        load = count / scale * (on("f", d) + on("i", d) + on("w", d)) + model.s[d]
        chosen = _at_some_position(model, moments, d, held_by[d], big)
        model.rows.add(model.e[d] >= chosen["first"] + load)
        model.rows.add(model.e[d] >= chosen["first"] + count / scale * (on("f", d) + on("i", d)) + chosen["end"])
        for at, k in enumerate(held_by[d]):
            before, up_to = held_by[d][:at], held_by[d][:at + 1]
            early = count / scale * sum(runs[r].f * model.m[r, j, d] for r in rs for j in before)
            behind = count / scale * sum((runs[r].i + runs[r].w) * model.m[r, j, d] for r in rs for j in up_to)
            far = horizon * (1 - model.x[k, d])
            model.rows.add(model.e[d] >= moments["first"][k] + load - early - far)
            model.rows.add(model.e[d] >= moments["back"][k] + behind - far)
        model.rows.add(on("resident", d) / max(1, chain.room) <= 1)
        if saved:
            share = on("saved", d) / chain.capacity
            model.rows.add(share <= 1)
            held = chain.capacity * rate / scale
            light = count / scale * sum(run.f * model.m[r, k, d] for r, run in enumerate(runs) if not run.saved
                                        for k in held_by[d])
            model.rows.add(model.e[d] >= chosen["back"] + load - held - light)
            needed = (count / scale * on("f", d)
                      + price / scale * (count * on("saved", d) - chain.capacity))
            model.rows.add(model.e[d] >= chosen["back"] + needed - held - light + chosen["last"])


def _moments(model: pyo.ConcreteModel, chain: Chain, positions: int, scale: float) -> tuple[
        dict[str, list[pyo.Expression]], float]:
    """Per position of the first microbatch: when it comes (``first``) and its gradient does (``back``); what follows
    its forward (``last``) and its gradient (``end``) elsewhere. And a number above all of them."""
    ks, runs, hop = range(positions), chain.runs, chain.hop_ns / scale

    def of(name: str, k: int) -> pyo.Expression:
        return sum(getattr(run, name) / scale * model.n[r, k] for r, run in enumerate(runs))

    forth = (sum(run.f * run.count for run in runs) + sum(chain.spread_f_ns)) / scale
    back = sum(run.i * run.count for run in runs) / scale
    crossings = hop * sum(model.t[k] for k in range(positions - 1))
    return {
        "first": [chain.spread_f_ns[0] / scale + sum(of("f", j) + hop * model.t[j] for j in range(k)) for k in ks],
        "back": [forth + crossings + sum(of("i", j) + hop * model.t[j - 1] for j in range(k + 1, positions))
                 for k in ks],
        "last": [sum(of("f", j) for j in range(k + 1, positions))
                 + hop * sum(model.t[j] for j in range(k, positions - 1)) + back + crossings for k in ks],
        "end": [sum(of("i", j) + hop * model.t[j] for j in range(k)) for k in ks]}, forth + back + 2 * hop * positions


def _at_some_position(model: pyo.ConcreteModel, moments: Mapping[str, Sequence[pyo.Expression]], d: int,
                      held: Sequence[int], big: float) -> dict[str, pyo.Var]:
    """Each moment of a device at one of the positions it has, whichever the solver finds best."""
    chosen = {}
    for name, values in moments.items():
        pick, value = model.component(name), pyo.Var(bounds=(0, None))
        model.add_component(f"{name}_{d}", value)
        chosen[name] = value
        model.rows.add(sum(pick[k, d] for k in held) == 1)
        for k in held:
            model.rows.add(pick[k, d] <= model.x[k, d])
            model.rows.add(value >= values[k] - big * (1 - pick[k, d]))
    return chosen


def _exclude(model: pyo.ConcreteModel, chain: Chain, cut: Cut, number: int) -> None:
    """Another order of devices, or two blocks at another place."""
    positions = len(cut.devices)
    moved = pyo.Var(range(positions), bounds=(0, None))
    model.add_component(f"moved_{number}", moved)
    other = positions - sum(model.x[k, d] for k, d in enumerate(cut.devices) if (k, d) in model.x)
    sides = pyo.Var(range(positions), domain=pyo.Binary)
    model.add_component(f"side_{number}", sides)
    total = sum(run.count for run in chain.runs)
    for k in range(positions):  # moved_k <= |blocks up to k - those of the cut|
        up_to = sum(model.n[r, j] for r in range(len(chain.runs)) for j in range(k + 1))
        known = sum(sum(row[:k + 1]) for row in cut.counts)
        model.rows.add(moved[k] <= up_to - known + 2 * total * (1 - sides[k]))
        model.rows.add(moved[k] <= known - up_to + 2 * total * sides[k])
    model.rows.add(sum(moved[k] for k in range(positions)) + other >= 1)


def _begin(model: pyo.ConcreteModel, chain: Chain, start: Cut) -> None:
    """Give x and n the values of a placement; HiGHS completes the rest."""
    for k, device in enumerate(start.devices):
        own = [d for j, d in model.x if j == k]
        for d in own:
            model.x[k, d].set_value(float(device == d), skip_validation=True)
        for r in range(len(chain.runs)):
            model.n[r, k].set_value(start.counts[r][k], skip_validation=True)
            for d in own:
                model.m[r, k, d].set_value(start.counts[r][k] * float(device == d), skip_validation=True)
