"""Experts in a training run: routing counted step by step, loads written for `mipipe experts`, maps changed on the way.

Counting costs one small sum over all ranks per step; a run without an ``experts`` section does none of it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import save, write_text
from mipipe.graphs.topology import Topology
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap, slots_for
from mipipe.planner.experts.files import read_map
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.exchange import check_map
from mipipe.runtime.experts.layers import RoutedLayer, expert_layers, routed_layers
from mipipe.runtime.ranks.processes import world
from mipipe.runtime.train.config import ExpertsConfig, ReplanConfig, TrainConfig
from mipipe.runtime.train.metrics import Record
from mipipe.runtime.train.optim import local_optimizer


def read_maps(config: TrainConfig, graph: OperatorGraph, sharing: int) -> dict[int, ExpertMap]:
    """The expert maps of a run by the step after which each is used (0: from the start), read and found to fit the
    ``sharing`` devices of a rank that share experts; each such group follows them.

    Raises:
        InputError: a file is no map, or is for another model or number of devices, or the run cannot follow it.
    """
    settings = config.experts
    files = {} if settings is None else {**({0: settings.map} if settings.map else {}), **settings.moves}
    if not files:
        return {}
    layers = expert_layers(graph)
    if not layers:
        raise InputError("train config: experts.map and experts.moves need a graph with expert-parallel layers; capture"
                         " the model with --expert-parallel")
    maps = {step: read_map(Path(file), layers[0].num_experts, sharing) for step, file in files.items()}
    for expert_map in maps.values():
        check_map(expert_map, layers, sharing)
    return maps


class ExpertRun:
    """What a training run does about its experts after every step: `after`, on all ranks."""

    def __init__(self, engine: Engine, config: ExpertsConfig | None, maps: Mapping[int, ExpertMap],
                 optimizer: torch.optim.Optimizer | None, last: int) -> None:
        self._engine, self._maps, self._optimizer, self._last = engine, dict(maps), optimizer, last
        self._config = config
        self.fault = ""  # why its files could not be written
        self._layers = routed_layers(engine.graph) if config is not None else ()
        self._repeats = _repeats(engine) if config is not None else []
        self._first = engine.mesh.first
        if config is None:
            return
        self._window: deque[torch.Tensor] = deque(maxlen=config.window)
        if (config.loads or config.history) and not self._layers:
            raise InputError("train config: experts.loads counts the choices of routers, but this graph shows none;"
                             " capture a MoE model with --granularity block")
        sizes = {layer.num_experts for layer in self._layers}
        if len(sizes) > 1:
            raise InputError(f"train config: experts.loads needs equally many experts in all layers; found {sizes}")
        if config.replan is not None and engine.compiled.experts is None:
            raise InputError("train config: experts.replan moves experts between devices that share them, but this"
                             " run has none; capture with --expert-parallel, and start several copies or plan teams")
        if config.replan is not None and engine.compiled.experts is not None:
            replan_sizes(config.replan, self._layers[0].num_experts, engine.compiled.experts.size)
        if config.history and self._first:
            Path(config.history).parent.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Take the place the experts have after ``step`` steps, where a map says so; and forget what is undone."""
        earlier = [number for number in self._maps if number <= step]
        if earlier and self._engine.compiled.experts is not None and max(earlier):
            self._engine.place_experts(self._maps[max(earlier)], self._optimizer)
        if self._config is not None and self._config.history and self._first:
            path = Path(self._config.history)
            lines = path.read_text().splitlines() if step and path.is_file() else []
            write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def after(self, step: int) -> Record:
        """Count, write, move. What goes into the step's record; ``step`` steps are done."""
        if self._config is None:
            return {}
        record: Record = {}
        if self._layers:
            record = self._count(step, self._config)
        target = self._maps.get(step) or self._replanned(step, self._config)
        if target is not None:
            moved = self._engine.place_experts(target, self._optimizer)
            record |= {"experts/moved": moved.experts, "experts/moved_bytes": moved.num_bytes,
                       "experts/moving(s)": moved.seconds}
        return record

    def _replanned(self, step: int, config: ExpertsConfig) -> ExpertMap | None:
        """The map planned from the last window's loads by the first rank, where it is time and it differs."""
        exchange, replan = self._engine.compiled.experts, config.replan
        if exchange is None or replan is None or step % replan.every or step == self._last:
            return None
        found: list[ExpertMap | None] = [replan_map(self.loads(), exchange.map, replan) if self._first else None]
        dist.broadcast_object_list(found, src=self._engine.mesh.places[0, 0, 0])
        changed = found[0] is not None and found[0].physical_to_logical != exchange.map.physical_to_logical
        return found[0] if changed else None

    def _count(self, step: int, config: ExpertsConfig) -> Record:
        counts = self.counts()
        self._window.append(counts)
        if self._first:
            self._write(step, counts, config)
        mean = counts.double().mean(dim=1).clamp(min=1e-9)
        record = {"experts/max_over_mean": float((counts.max(dim=1).values / mean).max())}
        exchange = self._engine.compiled.experts
        if exchange is not None:
            shares = [rank_loads(counts[number], exchange.map, number) for number in range(len(self._layers))]
            record["experts/rank_max_over_mean"] = max(float(load.max() / load.mean().clamp(min=1e-9))
                                                       for load in shares)
        return record

    def _write(self, step: int, counts: torch.Tensor, config: ExpertsConfig) -> None:
        """The files of a step; what is wrong with them is left for the training loop to end with."""
        try:
            if config.history:
                with Path(config.history).open("w" if step == 1 else "a") as stream:
                    stream.write(json.dumps({"step": step, "counts": counts.tolist()}) + "\n")
            if config.loads and (step == self._last or step % config.window == 0):
                save(self.loads(), config.loads)
        except (OSError, InputError) as error:
            self.fault = f"experts: {error}"

    def counts(self) -> torch.Tensor:
        """Tokens of the last step by layer and expert, over all ranks and copies [layers, experts]; each once, however
        many members of a team see it."""
        total = torch.zeros(len(self._layers), self._layers[0].num_experts, dtype=torch.int64)
        for number, counter in self._engine.routing_counts().items():
            total[number] = counter
        if world() > 1:
            dist.all_reduce(total)
        return total // torch.tensor(self._repeats)[:, None]

    def loads(self) -> ExpertLoads:
        """Tokens per step and expert, the mean of the last window, as `mipipe experts` takes them: of a group of
        devices that shares experts, where there are several the mean over them."""
        exchange, mesh = self._engine.compiled.experts, self._engine.mesh
        groups = 1 if exchange is None else mesh.num_copies * mesh.team.members // exchange.size
        mean = torch.stack(list(self._window)).double().mean(dim=0) / groups
        layer: RoutedLayer = self._layers[0]
        return ExpertLoads(tuple(tuple(row) for row in mean.tolist()), self._engine.graph.model,
                           token_bytes=layer.token_bytes, expert_bytes=round(layer.expert_bytes * self._state_factor()))

    def _state_factor(self) -> float:
        """Bytes of a parameter with its optimizer state, over those of the parameter."""
        if self._optimizer is None:
            return 1.0
        for parameter, state in local_optimizer(self._optimizer).state.items():
            kept = sum(item.nbytes for item in state.values() if isinstance(item, torch.Tensor) and item.dim())
            return 1.0 + kept / parameter.nbytes
        return 1.0


def _repeats(engine: Engine) -> list[int]:
    """How many members of a team see the same tokens, of every MoE layer."""
    whole, own = ({layer.name: _tokens(graph, layer) for layer in routed_layers(graph)}
                  for graph in (engine.graph, engine.compiled.graph))
    return [engine.mesh.team.members * own[name] // tokens for name, tokens in whole.items()]


def _tokens(graph: OperatorGraph, layer: RoutedLayer) -> int:
    return next(value.spec.shape[0] for value in graph.values if value.name == layer.index)


def replan_map(loads: ExpertLoads, current: ExpertMap, replan: ReplanConfig) -> ExpertMap:
    """A map for these loads, away from ``current`` where that pays off; another number of slots is always moved to."""
    from mipipe.planner.experts.plan import ExpertOptions, plan_experts  # late: most runs do not plan

    topology, slots = replan_sizes(replan, loads.num_experts, current.num_devices)
    alike = all(len(row) == slots * current.num_devices for row in current.physical_to_logical)
    options = ExpertOptions(replan.replicas, polish=False, horizon=replan.horizon or float(replan.every))
    return plan_experts(loads, topology, options, current=current if alike else None).map


def replan_sizes(replan: ReplanConfig, num_experts: int, sharing: int) -> tuple[Topology, int]:
    """The devices to plan for, one for each of ``sharing`` that share experts, and the slots of each.

    Raises:
        InputError: the cluster has another number of devices.
        InfeasibleError: the replicas do not divide over them.
    """
    topology = Topology.uniform(sharing) if replan.cluster is None else load_cluster(replan.cluster).topology
    if topology.num_devices != sharing:
        raise InputError(f"{replan.cluster}: has {topology.num_devices} devices, but {sharing} devices of the run share"
                         " the experts; expected one device for each")
    return topology, slots_for(num_experts, replan.replicas, sharing)


def rank_loads(counts: torch.Tensor, expert_map: ExpertMap, layer: int) -> torch.Tensor:
    """Rows that each rank of a group gets under a map, when replicas share evenly [ranks]."""
    devices = torch.from_numpy(expert_map.devices(layer))
    replicas = torch.bincount(devices.flatten(), minlength=len(counts))
    return (counts / replicas)[devices].sum(dim=1)
