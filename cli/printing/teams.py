"""How a plan of teams is told: degrees, times, memory and what the figures rest on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mipipe.cli.printing.report import branch_modes
from mipipe.graphs.serialize import to_data
from mipipe.graphs.units import format_bytes

if TYPE_CHECKING:
    from mipipe.graphs.efficiency import Achieved
    from mipipe.planner.teams.evaluate import TeamResult
    from mipipe.planner.teams.found import Found
    from mipipe.planner.teams.prices.degrees import Degrees

AXIS_NAMES = {"tensor": "tensor", "context": "context", "expert": "expert", "data": "data"}


def print_team(console: Console, result: TeamResult, how: str, refused: str | None) -> None:
    """Everything about one configuration; ``refused``: why `mipipe train` does not run it
    (`mipipe.planner.teams.refusal`)."""
    degrees = result.degrees
    say = _Say(console)
    say(f"{result.plan.problem.name}: {how}")
    say(f"degrees: {degrees.text()} (mesh, fastest axis first: {mesh(result)}); microbatch {degrees.microbatch},"
        f" {result.plan.problem.num_microbatches} microbatches; {zero_text(degrees)};"
        f" recomputation {recompute_text(result)}")
    modes = branch_modes(result.plan)
    if modes:
        say(f"modes of branches: {modes}" + (" (chosen)" if degrees.batch_branches else ""))
    say(f"stages: {len(result.layers)} on {degrees.ranks} rank{'s' * (degrees.ranks > 1)}, {result.schedule}; layers"
        f" per stage {layers_text(result.layers)}")
    rate = result.tokens_per_s_per_device
    say(f"step {result.seconds:.4g} s" + ("" if rate is None else f", {rate:,.0f} tokens/s per device")
        + f", model FLOP utilisation {result.utilisation:.1%} of the {precision(result)} peak")
    say("time of a step, mean over ranks: " + ", ".join(f"{name} {seconds:.3g} s ({seconds / result.seconds:.0%})"
                                                        for name, seconds in time_rows(result)
                                                        if seconds > 0.0005 * result.seconds))
    for line in memory_rows(result):
        say(line)
    for line in basis(result, refused):
        say(line)


class _Say:
    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)


def mesh(result: TeamResult) -> str:
    """The axes by the distance of neighbours, those of one device left out."""
    degrees = result.degrees
    axes = [("sequence" if degrees.sequence else "tensor", degrees.tensor), ("context", degrees.context),
            ("copies", degrees.copies), ("ranks", degrees.ranks)]
    text = " x ".join(f"{name} {size}" for name, size in axes if size > 1) or "one device"
    return text + (f"; experts over {degrees.expert} neighbours" if degrees.expert > 1 else "")


def recompute_text(result: TeamResult) -> str:
    """What runs again, with the layers of each kind where these differ."""
    pieces = Counter(result.recompute)
    if len(pieces) < 2:
        return result.degrees.recompute
    return ", ".join(f"{mode} in {count}" for mode, count in pieces.most_common()) + " pieces"


def zero_text(degrees: Degrees) -> str:
    """What devices that hold the same divide among them."""
    zero = degrees.zero
    if zero and degrees.alike == 1:
        return "one copy, so " + ("nothing sharded" if degrees.expert == 1 or degrees.alike_experts == 1 else
                                  "optimizer state of experts alone sharded")
    over = " and ".join(["copies"] * (degrees.copies > 1 or degrees.context == 1)
                        + ["context members"] * (degrees.context > 1))
    return (f"nothing sharded over {over}", f"optimizer state sharded over {over} (ZeRO-1)",
            f"optimizer state and gradients sharded over {over} (ZeRO-2)",
            f"parameters, gradients and optimizer state sharded over {over} (ZeRO-3)")[zero]


def layers_text(layers: Sequence[int]) -> str:
    """``9,9,8`` with runs of equal numbers counted where there are many."""
    if len(layers) <= 16:
        return ",".join(map(str, layers))
    runs: list[list[int]] = []
    for size in layers:
        if runs and runs[-1][0] == size:
            runs[-1][1] += 1
        else:
            runs.append([size, 1])
    return ",".join(f"{size} x {count}" if count > 1 else str(size) for size, count in runs)


def precision(result: TeamResult) -> str:
    """The precision whose peak utilisation is counted against."""
    return result.machine.low or result.machine.dtype


def time_rows(result: TeamResult) -> list[tuple[str, float]]:
    """What a step is made of, in seconds that add up to it."""
    times = result.times
    return [("kernels", times.kernels), *((f"{AXIS_NAMES[axis]} communication", seconds)
                                          for axis, seconds in times.axes.items()),
            ("pipeline communication", times.pipeline), ("bubble", times.bubble), ("optimizer", times.optimizer)]


def memory_rows(result: TeamResult, most: int = 8) -> list[str]:
    """Peak memory of one member per rank, equal ranks joined."""
    runs: list[tuple[int, int, Any]] = []
    for rank, item in enumerate(result.memory):
        text = (f"peak {format_bytes(item.peak)} of {format_bytes(item.capacity)} ({item.peak / item.capacity:.0%}):"
                f" weights {format_bytes(item.weights)}, gradients {format_bytes(item.gradients)}, optimizer"
                f" {format_bytes(item.state)}, activations {format_bytes(item.activations)}, allocator's slack"
                f" {format_bytes(item.peak - item.tensors)}")
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], rank, text)
        else:
            runs.append((rank, rank, text))
    shown = runs if len(runs) <= most else [*runs[:most // 2], *runs[-most // 2:]]
    lines = [f"rank {first if first == last else f'{first} to {last}'}: {text}" for first, last, text in shown]
    if len(shown) < len(runs):
        lines.insert(most // 2, f"... {len(runs) - len(shown)} more")
    return lines


_KEPT = {"adamw_mixed": "AdamW in mixed precision", "adamw": "AdamW", "adam": "Adam", "momentum": "SGD with momentum",
         "sgd": "SGD", "none": "no optimizer"}


def basis(result: TeamResult, refused: str | None) -> list[str]:
    """What is measured, fitted, estimated or assumed; ``refused`` as for `print_team`."""
    machine, achieved = result.machine, result.machine.kind.achieved
    origins = ", ".join(sorted(result.origins)) if len(result.origins) < 2 else ", ".join(
        f"{name} ({count} profiles)" for name, count in sorted(result.origins.items()))
    kernels = "elementwise kernels fused" if machine.fused else "kernels as the runtime starts them, one per operator"
    return [
        "times of layers: measured" if result.measured else f"work and bytes: {origins}; {kernels}",
        f"efficiencies of {machine.kind.name}: {achieved_text(achieved)};"
        f" links: {achieved.origin if achieved.link != 1 else 'as given'}",
        "assumed: reductions over copies overlap with the last backward, gathered parameters with the first forward;"
        f" collectives of other axes are not hidden; {_KEPT[machine.keeps]},"
        f" float{8 * machine.gradient_bytes} gradients",
        "`mipipe train` runs this plan" if refused is None else f"`mipipe train` refuses this plan: {refused}"]


def achieved_text(achieved: Achieved) -> str:
    """Where a device kind's efficiencies come from, and how far predictions by them were off."""
    known = achieved.evidence
    if known is None:
        return f"{achieved.origin} ({achieved.source or 'as the cluster file says'})"
    return (f"{achieved.origin} on {known.runs} published runs, cross-validated error {known.error:.1%}"
            f" ({achieved.source})")


def team_data(result: TeamResult) -> dict[str, Any]:
    """One configuration as JSON data."""
    degrees, times = result.degrees, result.times
    return {
        "degrees": to_data(degrees), "modes": result.plan.provenance["team"]["modes"],
        "mesh": mesh(result), "schedule": result.schedule, "layers_per_stage": list(result.layers),
        "microbatches": result.plan.problem.num_microbatches, "global_batch": result.global_batch,
        "step_s": result.seconds, "tokens_per_s_per_device": result.tokens_per_s_per_device,
        "model_flop_utilisation": result.utilisation, "precision": precision(result), "model_flops": result.flops,
        "times": {"kernels": times.kernels,
                  **{f"{axis}_communication": seconds for axis, seconds in times.axes.items()},
                  "pipeline_communication": times.pipeline, "bubble": times.bubble, "optimizer": times.optimizer},
        "memory": [{"rank": rank, "weights_bytes": item.weights, "gradients_bytes": item.gradients,
                    "optimizer_bytes": item.state, "activations_bytes": item.activations, "peak_bytes": item.peak,
                    "device_bytes": item.on_device,
                    "capacity_bytes": item.capacity} for rank, item in enumerate(result.memory)],
        "fits": result.shortage == 0,
        "basis": {"profiles": result.origins, "efficiencies": result.machine.kind.achieved.origin,
                  "source": result.machine.kind.achieved.source,
                  "evidence": to_data(result.machine.kind.achieved.evidence), "layers_measured": result.measured,
                  "fused": result.machine.fused}}


def print_runners(console: Console, found: Found) -> None:
    """The bound, and the configurations that came next with what makes them lose."""
    say = _Say(console)
    say(found.bound_text())
    for result, why in found.runners:
        modes = branch_modes(result.plan)
        say(f"next: {result.degrees.text()}, microbatch {result.degrees.microbatch},"
            f"{f' modes of branches {modes},' if modes else ''} recomputation {recompute_text(result)}:"
            f" {result.seconds:.4g} s ({result.seconds / found.best.seconds - 1:+.1%}): {why}")
    for line in found.notes:
        say(line)
