"""Published runs evaluated by the product: captured on the meta device, priced and simulated, nothing of it ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from predictions.rows import Build, Run

from mipipe.graphs.capture.cached import capture_cached
from mipipe.graphs.cluster import DeviceKind, shipped_kinds, uniform_cluster
from mipipe.graphs.costs.collectives import fabric_of
from mipipe.planner.problems.from_layers import LayerTimes
from mipipe.planner.teams.evaluate import TeamResult, evaluate_teams
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.pieces import ModelPieces, model_pieces
from mipipe.planner.teams.prices.pricing import Pricer


class Builder:
    """Evaluates builds; captures and profiles are kept between them, captures in ``folder`` for later runs as well
    (None: where `mipipe` keeps its own). ``kinds`` replace the shipped device kinds."""

    def __init__(self, kinds: Mapping[str, DeviceKind] | None = None, folder: Path | None = None) -> None:
        self.folder = folder
        self.kinds = {**shipped_kinds(), **(kinds or {})}
        self._models: dict[Any, ModelPieces] = {}
        self._pricers: dict[Any, Pricer] = {}

    def pricer(self, build: Build, kind: DeviceKind | None = None,
               measured: Sequence[LayerTimes] | None = None) -> Pricer:
        """The pricer of a build's model on its machine."""
        kind = kind or self.kinds[build.kind]
        fabric = fabric_of(uniform_cluster(kind, build.devices, build.per_host).topology)
        machine = Machine(kind, fabric, kind.memory_bytes or 0, build.dtype, build.low, build.fused, build.flash,
                          build.cut, build.overlap, build.scatter)
        key = build.model.source, str(build.model.overrides), build.seq
        if key not in self._models:
            options = {"seq": build.seq, "batch": 1, "dtype": "bfloat16", "overrides": build.model.overrides}
            self._models[key] = model_pieces(capture_cached(build.model.source, options, folder=self.folder).graph)
        if (*key, machine.kernels) not in self._pricers:
            self._pricers[*key, machine.kernels] = Pricer(self._models[key], machine)
        return self._pricers[*key, machine.kernels].on(machine, measured)

    def evaluate(self, build: Build, kind: DeviceKind | None = None,
                 measured: Sequence[LayerTimes] | None = None) -> TeamResult:
        """What a build takes and holds, by the product; ``measured``: times of its layers, in place of estimates."""
        return evaluate_teams(self.pricer(build, kind, measured), build.degrees, build.global_batch,
                              layers=build.layers, schedule=build.schedule, held=build.held)


def measured_step(run: Run, builder: Builder) -> float | None:
    """Measured seconds of a step; where only the rate of model FLOPs was published, those of the captured graph by it
    (Megatron-LM counts causal attention in full)."""
    if run.step_s is not None or run.tflops is None or run.build is None:
        return run.step_s
    flops = builder.pricer(run.build).model.flops(full=run.group.startswith("megatron"))
    return flops * run.build.global_batch / (run.tflops * 1e12 * run.build.devices)
