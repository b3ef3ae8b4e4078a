"""A planning problem for people and as data: its groups, values, devices and limits."""

from __future__ import annotations

from typing import Any

from mipipe.cli.printing.output import emit, stdout
from mipipe.cli.printing.tables import print_rows
from mipipe.cli.printing.terminal import format_time
from mipipe.graphs.units import format_bytes
from mipipe.planner.problem import PlanningProblem


def show_problem(problem: PlanningProblem, json_output: bool) -> None:
    """Print a problem."""
    if json_output:
        emit(problem_facts(problem))
        return
    console, devices = stdout(), problem.topology.devices
    memory = sorted({device.memory_bytes for device in devices})
    kinds = sorted({device.kind for device in devices})
    console.print(f"{problem.name}: {len(problem.groups)} groups, {len(problem.edges)} values,"
                  f" {problem.num_microbatches} microbatches on {len(devices)} devices ({', '.join(kinds)})",
                  soft_wrap=True)
    print_rows(console, group_rows(problem))
    print_rows(console, [{"value": edge.value or f"value {number}", "made_by": problem.groups[edge.source].name,
                          "read_by": ", ".join(problem.groups[target].name for target in edge.targets),
                          "size": format_bytes(edge.num_bytes),
                          "gradient": "none" if edge.grad_bytes is None else format_bytes(edge.grad_bytes)}
                         for number, edge in enumerate(problem.edges)])
    told = ["memory " + " to ".join(format_bytes(size) for size in dict.fromkeys((memory[0], memory[-1])))
            if memory[-1] < 2**62 else "memory without limit"]
    for name, link in (("within a host", problem.topology.within_host), ("between hosts",
                                                                           problem.topology.between_hosts)):
        rate = "no size counts" if link.bytes_per_s is None else f"{format_bytes(link.bytes_per_s)}/s"
        told.append(f"{name} {format_time(link.latency_ns, problem.unit_ns)} and {rate}")
    for name, limit in (("weights and state", problem.limits.resident_bytes),
                        ("activations", problem.limits.activation_bytes)):
        told += [] if limit is None else [f"{name} at most {format_bytes(limit)}"]
    console.print("devices: " + "; ".join(told), soft_wrap=True)


def group_rows(problem: PlanningProblem) -> list[dict[str, Any]]:
    """A row for each group and device kind: durations, and bytes with units."""
    rows = []
    for group in problem.groups:
        for kind, times in group.times.items():
            spent = {phase: None if time is None else format_time(time, problem.unit_ns) for phase, time in (
                ("f", times.f_ns), ("i", times.i_ns), ("w", times.w_ns))}
            rows.append({"group": group.name, **({"kind": kind} if len(group.times) > 1 else {}), **spent,
                         "resident": format_bytes(group.resident_bytes),
                         "gradient": format_bytes(group.gradient_bytes),
                         "saved": format_bytes(group.saved_fi_bytes + group.saved_fw_bytes + group.saved_iw_bytes),
                         "workspace": format_bytes(max(group.workspace_bytes, group.forward_workspace))})
    return rows


def problem_facts(problem: PlanningProblem) -> dict[str, Any]:
    """A problem as JSON data, durations in nanoseconds."""
    return {
        "name": problem.name, "digest": problem.digest(), "microbatches": problem.num_microbatches,
        "devices": [{"name": device.name, "kind": device.kind, "memory_bytes": device.memory_bytes}
                    for device in problem.topology.devices],
        "groups": [{"name": group.name, "times": {kind: {"f_ns": times.f_ns, "i_ns": times.i_ns, "w_ns": times.w_ns}
                                                  for kind, times in group.times.items()},
                    "resident_bytes": group.resident_bytes, "gradient_bytes": group.gradient_bytes,
                    "saved_bytes": group.saved_fi_bytes + group.saved_fw_bytes + group.saved_iw_bytes,
                    "workspace_bytes": group.workspace_bytes} for group in problem.groups],
        "values": [{"name": edge.value, "source": edge.source, "targets": list(edge.targets),
                    "bytes": edge.num_bytes, "gradient_bytes": edge.grad_bytes} for edge in problem.edges]}
