"""How plans and timelines are told: to people on the terminal, as plain data for ``--json``, and into files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mipipe.cli.printing import terminal
from mipipe.cli.printing.output import number
from mipipe.graphs.serialize import to_data
from mipipe.graphs.topology import UNLIMITED_BYTES
from mipipe.graphs.units import format_bytes
from mipipe.planner.execution.estimate import RESERVE, RankMemory, estimate, memory_by_use
from mipipe.planner.execution.steps import quick_period
from mipipe.planner.gap import gap_of
from mipipe.planner.how import How, how_lines, how_of
from mipipe.planner.options import options_of
from mipipe.planner.placements.shapes import proposes_all
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.on_cluster import ModelFacts
from mipipe.planner.problems.uniform import in_activations, in_copies
from mipipe.planner.timeline import Timeline


def capacities(plan: Plan) -> tuple[int | None, ...]:
    """Each device's memory, None where the problem sets no limit."""
    return tuple(None if device.memory_bytes >= UNLIMITED_BYTES else device.memory_bytes
                 for device in plan.problem.topology.devices)


def timeline_data(timeline: Timeline, limits: Sequence[int | None] = ()) -> dict[str, Any]:
    """The figures of a timeline as JSON data; times in the problem's unit (``unit_ns`` nanoseconds)."""
    unit = timeline.unit_ns
    bubbles = timeline.bubbles_ns()
    return {
        "origin": timeline.origin,
        "unit_ns": unit,
        "makespan": number(timeline.makespan_ns / unit),
        "bubble": number(max(bubbles) / unit),
        "bubble_mean": number(sum(bubbles) / len(bubbles) / unit),
        "bubble_ratio": timeline.bubble_ratio,
        "ranks": [{"rank": rank, "busy": number(timeline.busy_ns(rank) / unit),
                   "bubble": number(bubbles[rank] / unit), "peak_bytes": timeline.peak_bytes(rank),
                   "resident_bytes": timeline.resident_bytes[rank] if timeline.resident_bytes else None,
                   "capacity_bytes": limits[rank] if limits else None} for rank in range(timeline.num_ranks)],
    }


def estimate_data(plan: Plan, timeline: Timeline) -> dict[str, Any]:
    """Throughput, utilisation and memory by use as JSON data; nothing for a plan of a bare problem."""
    found = estimate(plan, timeline)
    if found is None:
        return {}
    return {"estimate": {
        "tokens_per_s": found.tokens_per_s, "tokens_per_s_per_device": found.tokens_per_s_per_device,
        "samples_per_s": found.samples_per_s, "model_flop_utilisation": found.utilisation, "dtype": found.dtype,
        "devices": found.devices, "optimizer": found.optimizer, "costs": found.costs, "measured": found.measured,
        "memory": [{"rank": rank, "weights_bytes": part.weights, "gradients_bytes": part.gradients,
                    "optimizer_bytes": part.optimizer, "activations_bytes": part.activations,
                    "share": part.share, "tight": part.tight} for rank, part in enumerate(found.memory)]}}


def plan_data(plan: Plan) -> dict[str, Any]:
    """What a plan says about itself as JSON data."""
    unit = plan.problem.unit_ns
    return {
        "name": plan.name,
        "placement": plan.placement.name,
        "stages": [{"groups": [plan.problem.groups[group].name for group in stage.groups], "ranks": list(stage.ranks),
                    "recompute": stage.recompute} for stage in plan.placement.stages],
        "problem": plan.problem.digest(),
        "microbatches": plan.problem.num_microbatches,
        "bound": None if plan.bound_ns is None else number(plan.bound_ns / unit),
        "placement_bound": None if plan.placement_bound_ns is None else number(plan.placement_bound_ns / unit),
        "gap": gap_of(plan.makespan_ns, plan.bound_ns),
        "period": _period(plan),
        "provenance": plan.provenance,
    }


def _period(plan: Plan) -> float | None:
    found = quick_period(plan)
    return None if found is None else number(found / plan.problem.unit_ns)


def how_data(how: How) -> dict[str, Any]:
    """How a plan came about as JSON data: who proposed and ordered, the bounds' sources, HiGHS's calls and part."""
    return {**to_data(how), "calls": how.calls, "seconds": round(how.seconds, 3), "nodes": how.nodes,
            "highs_part": list(how.highs_part)}


def print_timeline(console: Console, timeline: Timeline, limits: Sequence[int | None] = (),
                   until_ns: int | None = None, explained: bool = True, plan: Plan | None = None) -> None:
    """The drawn timeline, its legend, its figures and the memory of every rank (by use where the plan is given)."""
    console.print(terminal.draw_timeline(timeline, console.width, until_ns), end="")
    if explained:
        console.print(terminal.legend(timeline))
    console.print(terminal.summary(timeline), soft_wrap=True)
    uses = memory_by_use(plan, timeline) if plan is not None else ()
    if plan is not None and is_abstract(plan.problem):
        lines = [f"rank {rank}: peak {memory_text(plan.problem, part.resident, part.peak)} (of even shares)"
                 for rank, part in enumerate(uses)]
    else:
        lines = terminal.memory_lines(timeline, limits or (None,) * timeline.num_ranks, [by_use(part) for part in uses])
    for line in lines:
        console.print(line, soft_wrap=True)


def is_abstract(problem: PlanningProblem) -> bool:
    """Whether people gave durations in a unit of their own: sizes are then shares, not bytes."""
    return problem.unit_ns != 1


def memory_text(problem: PlanningProblem, resident_bytes: int, peak_bytes: int) -> str:
    """A rank's peak memory in the problem's own units: bytes, or even shares of the parameters and activations."""
    if not is_abstract(problem):
        return format_bytes(peak_bytes)
    return ", ".join(f"{amount:.4g} {name if amount == 1 else several}" for amount, name, several in (
        (in_copies(problem, resident_bytes), "copy", "copies"),
        (in_activations(problem, peak_bytes - resident_bytes), "activation", "activations")))


def size_text(problem: PlanningProblem, num_bytes: int) -> str:
    """An amount of activations in the problem's own units."""
    if is_abstract(problem):
        return f"{in_activations(problem, num_bytes):.4g} activations"
    return format_bytes(num_bytes)


def by_use(part: RankMemory) -> str:
    """A rank's memory by what it is used for."""
    if part.weights is None or part.gradients is None or part.optimizer is None:
        return f"resident {format_bytes(part.resident)}, activations {format_bytes(part.activations)}"
    return (f"weights {format_bytes(part.weights)}, gradients {format_bytes(part.gradients)}, optimizer"
            f" {format_bytes(part.optimizer)}, activations {format_bytes(part.activations)}")


def print_plan(console: Console, plan: Plan, timeline: Timeline) -> None:
    """The plan as timeline, with makespan, bound, gap, bubble ratio, memory by use, and throughput."""
    print_placement(console, plan)
    print_timeline(console, timeline, capacities(plan), plan=plan)
    for line in memory_warnings(memory_by_use(plan, timeline)):
        console.print(line, style="bold yellow", soft_wrap=True)
    print_outcome(console, plan)
    for line in estimate_lines(plan, timeline):
        console.print(line, soft_wrap=True)


def print_outcome(console: Console, plan: Plan) -> None:
    """Makespan, bound and gap, and how the plan came about."""
    console.print(bound_line(plan), style="bold", soft_wrap=True)
    period = period_line(plan)
    if period:
        console.print(period, soft_wrap=True)
    how = how_of(plan)
    for line in () if how is None else how_lines(how):
        console.print(line, soft_wrap=True, markup=False)


def period_line(plan: Plan) -> str:
    """The time from step to step without a barrier, and its bound where that was the objective; nothing for plans too
    large for it."""
    unit, noted = plan.problem.unit_ns, plan.provenance.get("period")
    if isinstance(noted, dict) and {"period_ns", "bound_ns"} <= noted.keys():
        missing = gap_of(noted["period_ns"], noted["bound_ns"])
        proven = "proven optimal" if not missing else f"gap {missing:.1%}"
        return (f"from step to step without a barrier {terminal.format_time(noted['period_ns'], unit)}, bound"
                f" {terminal.format_time(noted['bound_ns'], unit)} ({proven})")
    found = quick_period(plan)
    return "" if found is None else f"from step to step without a barrier {terminal.format_time(found, unit)}"


def memory_warnings(uses: Sequence[RankMemory]) -> list[str]:
    """One line that names the ranks with too little memory to spare; none where all have enough."""
    tight = [(part.share or 0.0, rank, part) for rank, part in enumerate(uses) if part.tight]
    if not tight:
        return []
    share, rank, part = max(tight, key=lambda item: item[0])
    names = ("rank " if len(tight) == 1 else "ranks ") + ", ".join(str(number) for _, number, _ in tight)
    most = round((part.nominal or part.capacity or 0) * (1 - RESERVE))
    lacks = ("of what tensors can fill of" if part.nominal else "of the memory of",
             "; sizes are estimates" if part.nominal else "; the framework and fragmentation take some too")
    return [f"warning: {names}: planned to {share:.0%} {lacks[0]} rank {rank}{lacks[1]}: keep {RESERVE:.0%} free"
            f" (--memory {format_bytes(most).replace(' ', '')}, or --recompute)"]


def estimate_lines(plan: Plan, timeline: Timeline) -> list[str]:
    """Tokens per second and device, model FLOP utilisation, and what they rest on."""
    found = estimate(plan, timeline)
    if found is None:
        return []
    parts = []
    each = found.tokens_per_s_per_device
    if each is not None and found.tokens_per_s is not None:
        parts.append(f"{each:,.0f} tokens/s per device ({found.tokens_per_s:,.0f} on {found.devices})")
    elif found.samples_per_s is not None:
        parts.append(f"{found.samples_per_s / found.devices:,.1f} samples/s per device ({found.samples_per_s:,.1f} on"
                     f" {found.devices})")
    if found.utilisation is not None:
        parts.append(f"model FLOP utilisation {found.utilisation:.1%} of the {found.dtype} peak")
    names = {"roofline": "roofline estimates, not measured: real kernels are slower (`mipipe profile` measures them)",
             "profiled": "profiled on this kind of machine", "calibrated": "calibrated by a run", "given": "given"}
    sources = "; ".join(names.get(origin, origin) + ("" if len(found.costs) == 1 else f" ({count} of"
                        f" {sum(found.costs.values())} groups)") for origin, count in found.costs.items())
    return [", ".join(parts), f"costs are {sources}", f"optimizer state as of {found.optimizer}"
            " (--optimizer); the optimizer's step and data loading are not simulated"]


def next_steps(plan_file: Path | None, graph_file: Path | None, facts: ModelFacts | None, source: str) -> list[str]:
    """What a user may run on the plan that was just made; ``source``: what was planned, as it was named."""
    if plan_file is None:
        return ["next: give -o plan.json to keep the plan; --html timeline.html draws it"]
    steps = [f"mipipe show {plan_file} --html timeline.html"]
    if facts is None:
        steps.append(f"mipipe compare --problem {plan_file}")
    else:
        graph = graph_file or "graph.json"
        if facts.costs.keys() & {"roofline"}:
            steps.append(f"mipipe profile {graph} -o costs.json (on the machine; then plan with --costs costs.json)")
        model = "" if ":" not in source or Path(source).exists() else f" --model {source}"
        steps.append(f"mipipe train --plan {plan_file} --graph {graph} --config train.yaml{model}")
    return ["next: " + "\n      ".join(steps)]


def branch_modes(plan: Plan) -> str:
    """The branches of a plan of teams that have a mode of their own, with it."""
    facts = plan.provenance.get("team")
    modes = facts.get("modes") if isinstance(facts, dict) else None
    return ", ".join(f"{branch} {mode}" for branch, mode in modes.items()) if isinstance(modes, dict) else ""


def print_placement(console: Console, plan: Plan) -> None:
    """Which groups every rank holds."""
    problem = plan.problem
    team = "" if plan.team is None else (f", each a team of {plan.team.members} ({plan.team.text()}),"
                                         f" {plan.team.copies} cop{'y' if plan.team.copies == 1 else 'ies'}")
    team += f", modes of branches: {branch_modes(plan)}" if branch_modes(plan) else ""
    console.print(f"{plan.name}: {len(problem.groups)} groups in {len(plan.placement.stages)} stages, placement"
                  f" {plan.placement.name}, {problem.num_microbatches} microbatches, {problem.num_ranks} ranks{team}",
                  soft_wrap=True)
    for rank, device in enumerate(problem.topology.devices):
        held = [f"{index}: {group_names(plan, stage.groups)}{' (recomputed)' if stage.recompute else ''}"
                for index, stage in enumerate(plan.placement.stages) if rank in stage.ranks]
        console.print(f"  rank {rank} ({device.name}): " + ("stages " + "; ".join(held) if held else "nothing"),
                      soft_wrap=True)


def group_names(plan: Plan, groups: Sequence[int]) -> str:
    """A stage in words: its first and last group and how many there are."""
    names = [plan.problem.groups[group].name.removeprefix("model.") for group in groups]
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"


def bound_line(plan: Plan) -> str:
    """Makespan, bound and gap in one line, and over which placements the bound holds."""
    unit = plan.problem.unit_ns
    if plan.makespan_ns is None:
        return "no makespan recorded"
    parts = [f"makespan {terminal.format_time(plan.makespan_ns, unit)}"]
    options = options_of(plan)
    over = ("bound over placements with one replica of each group" if options.exact else
            f"bound over placements of shape {options.placement}" if proposes_all(plan.problem, options.placement) else
            "bound over all placements")
    for name, bound in ((over, plan.bound_ns),
                        ("bound at this placement", plan.placement_bound_ns)):
        if bound is not None:
            missing = gap_of(plan.makespan_ns, bound)
            shown = "proven optimal" if not missing else f"gap {missing:.1%}"
            parts.append(f"{name} {terminal.format_time(bound, unit)} ({shown})")
    return ", ".join(parts)


def report_tiles(plan: Plan, timeline: Timeline) -> list[tuple[str, str]]:
    """The tiles of the HTML report."""
    unit = timeline.unit_ns
    tiles = [("makespan", terminal.format_time(timeline.makespan_ns, unit)),
             ("bubble ratio", f"{timeline.bubble_ratio:.1%}"),
             ("largest bubble", terminal.format_time(max(timeline.bubbles_ns()), unit)),
             ("placement", plan.placement.name), ("ranks", str(plan.problem.num_ranks)),
             ("microbatches", str(plan.problem.num_microbatches))]
    tiles += [("modes of branches", branch_modes(plan))] if branch_modes(plan) else []
    missing = gap_of(plan.makespan_ns, plan.bound_ns)
    if plan.bound_ns is not None and missing is not None:
        tiles += [("bound", terminal.format_time(plan.bound_ns, unit)), ("gap", f"{missing:.1%}")]
    found = estimate(plan, timeline)
    if found is not None and found.tokens_per_s_per_device is not None:
        tiles.append(("tokens/s per device", f"{found.tokens_per_s_per_device:,.0f}"))
    if found is not None and found.utilisation is not None:
        tiles.append(("model FLOP utilisation", f"{found.utilisation:.1%}"))
    if found is not None:
        tiles.append(("costs", "measured" if found.measured else "estimated"))
    return tiles
