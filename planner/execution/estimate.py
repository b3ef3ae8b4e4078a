"""What a plan promises in the user's terms: tokens per second, model FLOP utilisation, each device's memory by use.

Utilisation is the step's products, each counted once, over what all chips could do at their vendor's peak meanwhile
(Chowdhery et al., "PaLM", JMLR 2023, appendix B). Memory is that of the simulated timeline; what the framework, the
allocator's fragmentation and communication buffers take is not in it, hence `RESERVE`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mipipe.graphs.serialize import from_data
from mipipe.graphs.topology import UNLIMITED_BYTES
from mipipe.planner.plan import Plan
from mipipe.planner.problems.on_cluster import ModelFacts
from mipipe.planner.timeline import Timeline

RESERVE = 0.05
"""The share of a device's memory that a plan had better leave free: CUDA's context (0.5 to 1 GB of 80) and
fragmentation."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """A rank's bytes by use at its peak; ``capacity`` is None where the problem sets no limit, ``nominal`` the device's
    memory as a cluster file says it, where tensors cannot fill all of it.

    ``resident`` is weights, gradients and optimizer together; the three are None where the plan does not say which
    optimizer it counts with. ``activations`` is everything else: saved tensors, workspace, values in flight.
    """

    resident: int
    activations: int
    capacity: int | None
    weights: int | None = None
    gradients: int | None = None
    optimizer: int | None = None
    nominal: int | None = None

    @property
    def peak(self) -> int:
        return self.resident + self.activations

    @property
    def share(self) -> float | None:
        """Of the device's memory."""
        return None if not self.capacity else self.peak / self.capacity

    @property
    def tight(self) -> bool:
        """Whether less than `RESERVE` of the device's memory stays free."""
        return self.share is not None and self.share >= 1 - RESERVE


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a step of a plan promises. Rates are None where the model has no such dimension or no peak is known.

    ``measured``: whether every cost was profiled or calibrated; else some are roofline estimates.
    """

    tokens_per_s: float | None
    samples_per_s: float | None
    devices: int
    utilisation: float | None
    dtype: str
    optimizer: str
    costs: dict[str, int]
    memory: tuple[RankMemory, ...]

    @property
    def tokens_per_s_per_device(self) -> float | None:
        return None if self.tokens_per_s is None else self.tokens_per_s / self.devices

    @property
    def measured(self) -> bool:
        return not set(self.costs) & {"roofline", "given"}


def facts_of(plan: Plan) -> ModelFacts | None:
    """The facts of the model that a plan was made for; None for a plan of a bare problem."""
    data = plan.provenance.get("model")
    return None if data is None else from_data(data, ModelFacts, f"model of plan {plan.name}")


def estimate(plan: Plan, timeline: Timeline) -> Estimate | None:
    """Throughput, utilisation and memory of a plan, by its simulated or measured timeline.

    None for a plan that does not say what model it is for (one of a bare problem).
    """
    facts, seconds = facts_of(plan), timeline.makespan_ns / 1e9
    if facts is None or not seconds:
        return None
    tokens, samples = (None if count is None else count / seconds for count in (facts.tokens, facts.samples))
    utilisation = facts.flops / (facts.peak_flops * seconds) if facts.peak_flops else None
    return Estimate(tokens, samples, facts.devices, utilisation, facts.dtype, facts.optimizer, facts.costs,
                    memory_by_use(plan, timeline))


def memory_by_use(plan: Plan, timeline: Timeline) -> tuple[RankMemory, ...]:
    """Every rank's memory by use; empty where the timeline has none."""
    if not timeline.memory or not timeline.resident_bytes:
        return ()
    facts, found = facts_of(plan), []
    for rank, device in enumerate(plan.problem.topology.devices):
        resident = timeline.resident_bytes[rank]
        capacity = None if device.memory_bytes >= UNLIMITED_BYTES else device.memory_bytes
        activations = timeline.peak_bytes(rank) - resident
        if facts is None:
            found.append(RankMemory(resident, activations, capacity, nominal=device.nominal_bytes))
            continue
        held = [plan.problem.groups[group] for stage in plan.placement.stages if rank in stage.ranks
                for group in stage.groups]
        gradients = sum(group.gradient_bytes for group in held)
        kept = sum(round(group.gradient_bytes * facts.state_bytes) for group in held)
        found.append(RankMemory(resident, activations, capacity, resident - gradients - kept, gradients, kept,
                                device.nominal_bytes))
    return tuple(found)
