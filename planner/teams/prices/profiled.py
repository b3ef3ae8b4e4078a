"""A cost table of `mipipe profile` as measured times of a model's layers: profile on one device, predict the cluster.

The table is of the graph that is planned, measured whole on one device (`profile` measures layers that are equal once),
and has F, I and W apart, so schedules that divide backwards can be predicted, too. The update of parameters and
everything between devices is not in it: these stay estimates.
"""

from __future__ import annotations

from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import Phase
from mipipe.planner.problems.from_layers import LayerTimes
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import ModelPieces


def profiled_layers(table: CostTable, model: ModelPieces, degrees: Degrees, where: str,
                    kind: str | None = None) -> tuple[LayerTimes, ...]:
    """The times of every piece of a model by a profile of its graph.

    Args:
        table: of the same graph.
        model: the pieces of the graph.
        degrees: of the plan; layers are whole on a device, the microbatch is the graph's.
        where: the table's file, for messages.
        kind: the device kind's name in the table (None: it has one).

    Raises:
        InputError: another graph, estimates, several kinds and none named, degrees that divide layers, another
            microbatch, or groups that are coarser than layers.
    """
    groups, granularity = (table.notes.get(name) for name in ("groups", "granularity"))
    coarse = coarsen(model.graph, num_groups=int(groups) if groups else None,
                     granularity=granularity)  # type: ignore[arg-type]
    if table.graph_digest != coarse.graph_digest:
        raise InputError(f"{where}: was measured on another graph ({table.graph_digest}; this one is"
                         f" {coarse.graph_digest}); run `mipipe profile` on the graph that you plan")
    if degrees.tensor * degrees.context * degrees.expert > 1:
        raise InputError(f"{where}: times of whole layers on one device, but the plan divides layers"
                         f" ({degrees.text()}); give a table by tensor degree, or --degrees of ranks and copies alone")
    if degrees.microbatch != model.sequences:
        raise InputError(f"{where}: was measured with {model.sequences} sequences a microbatch, but the plan has"
                         f" {degrees.microbatch}; capture with --batch {degrees.microbatch} and profile that graph")
    known = sorted({entry.device_kind for entry in table.entries})
    if kind not in known and (kind is not None or len(known) != 1):
        raise InputError(f"{where}: --layer-entry {'is missing' if kind is None else repr(kind)}; expected one of"
                         f" {', '.join(known)}")
    entries = {entry.group: entry for entry in table.entries if entry.device_kind == (kind or known[0])}
    if any(entry.origin == "roofline" for entry in entries.values()):
        raise InputError(f"{where}: holds estimates, not measurements; run `mipipe profile`, or leave --layer-times"
                         " out")
    piece_of = {member: number for number, piece in enumerate(model.pieces) for member in piece.members}
    numbers = {segment.name: number for number, segment in enumerate(model.graph.segments)}
    times: list[dict[Phase, float]] = [{} for _ in model.pieces]
    for group in coarse.groups:
        homes = {piece_of[numbers[name]] for name in group.segments}
        if len(homes) > 1 or group.name not in entries:
            raise InputError(f"{where}: group {group.name} is no part of one layer; profile with --granularity layer")
        own = times[homes.pop()]
        for phase, spent in entries[group.name].times_ns.items():
            own[phase] = own.get(phase, 0.0) + spent * 1e-9
    return tuple(LayerTimes(own.get(Phase.F, 0.0), own.get(Phase.I, 0.0), None, own.get(Phase.W, 0.0)) for own in times)
