"""`Engine`: one rank of a planned run, with what a training loop needs; its steps are run by the executor beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import BatchError, DataEnd, RunError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes import rows
from mipipe.planner.experts.balance.maps import ExpertMap
from mipipe.planner.plan import Plan
from mipipe.planner.program import Program
from mipipe.runtime.engine.batches import Batch, move_batch, split_batch
from mipipe.runtime.engine.clock import clock_for
from mipipe.runtime.engine.compiling.compile import compile_rank
from mipipe.runtime.engine.compiling.compiled import Compiled
from mipipe.runtime.engine.compiling.instructions import Step
from mipipe.runtime.engine.executor import Executor
from mipipe.runtime.engine.record import StepRecord
from mipipe.runtime.experts.moves import Moved, move_experts
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks.mesh import Mesh
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.ranks.processes import world
from mipipe.runtime.weights.weights import Weights, WeightSource


class Engine:
    """One rank of a planned run, usable in any training loop.

    ``engine.step(batch)`` runs forward and backward of all microbatches and returns the loss; gradients are then on
    ``engine.parameters()``, ordinary parameters for any torch optimizer, already summed over replicas and ties.
    ``on_update`` is called at the program's OPTIMIZER_STEP, when gradients are complete. ``record`` is what the last
    step or evaluation left: times and, where it is tracked, memory. ``notice`` is asked at the end of every step, and
    ``noticed`` says whether it was true on any rank: it travels with the loss (``share_loss``). Where a device runs
    behind the host, a step records when that worked only while ``measuring``, at the price of some launches. Without a
    barrier (`EngineOptions`) loss and ``noticed`` are those of the step before; `finish` waits for the last ones. Where
    ranks are teams, parameters are this member's parts (``compiled.divisions``), and ``graph`` is still the whole one.
    """

    def __init__(self, plan: Plan, graph: OperatorGraph, weights: WeightSource, *, program: Program | None = None,
                 mesh: Mesh | None = None, options: EngineOptions | None = None,
                 on_update: Callable[[], None] | None = None, device: torch.device | str = "cpu") -> None:
        self.options = options or EngineOptions()
        self.on_update = on_update
        self.notice: Callable[[], bool] = lambda: False
        self.noticed = False
        self.steps_done = 0
        self.measuring = False
        self.compiled: Compiled = compile_rank(plan, graph, weights, program, mesh, torch.device(device), self.options)
        self.plan, self.graph, self.mesh = plan, graph, self.compiled.mesh
        self.weights: Weights = self.compiled.weights
        self.record = StepRecord()
        self.carried = 0.0
        self._carrying: torch.Tensor | None = None
        self._summing: tuple[Any, torch.Tensor, float] | None = None
        self._inputs = {name for ready in self.compiled.instructions if isinstance(ready.argument, Step)
                        for piece in ready.argument.pieces for _, name in piece.batch}
        self._executor = Executor(self.compiled, self.options)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters of this rank."""
        return [parameter for parameter in self.weights.parameters.values() if parameter.requires_grad]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters of this rank with their canonical names."""
        return [(name, item) for name, item in self.weights.parameters.items() if item.requires_grad]

    def step(self, batch: Batch | BatchError) -> float | None:
        """The loss of one step: the sum of all microbatches' losses over the global number of valid labels.

        ``batch``: tensors by the graph's input names, split along their first dimension, or a list of microbatches; or
        why there is none, which is raised on every copy of the plan.
        Gradients are added to what ``.grad`` holds. None where the loss is not known to this rank (``share_loss``), or
        not yet: without a barrier it is that of the step before.

        Raises:
            BatchError: the batch does not fit, or has no labels, here or on another copy of the plan; nothing is done.
            DataEnd: there is no batch, here or on another copy, because its data ended.
            RunError: an instruction failed or a peer kept this rank waiting for too long.
        """
        microbatches, weight = self._prepare(batch)
        self.compiled.loss_gradient.fill_(1.0 / weight)
        self.record = self._executor.run(microbatches, self.steps_done, self.on_update,
                                         clock_for(self.mesh.device, self.measuring))
        self.steps_done += 1
        if self.options.barrier:
            return self._share(self.record.losses, 1.0 / weight)
        before, self._summing = self._summing, self._begin_sum(self.record.losses, 1.0 / weight)
        return self._end_sum(before)

    def finish(self) -> float | None:
        """Wait for the loss of the last step, where steps do not wait for theirs; None where there is none."""
        before, self._summing = self._summing, None
        return self._end_sum(before)

    def carry(self, number: torch.Tensor) -> None:
        """Bring a number of this step (a tensor on its device) to the host with its loss, as ``carried``: called while
        a step updates, so that the host waits for the device once."""
        self._carrying = number

    def evaluate(self, batch: Batch) -> float | None:
        """The loss of a batch without gradients; ``engine.outputs`` then has this rank's outputs by microbatch."""
        microbatches, weight = self._prepare(batch)
        self.record = self._executor.evaluate(microbatches, self.steps_done)
        return self._share(self.record.losses, 1.0 / weight)

    @property
    def outputs(self) -> dict[str, dict[int, torch.Tensor]]:
        """The outputs of the last evaluation on this rank, by value and microbatch."""
        return self.record.outputs

    def _prepare(self, batch: Batch | BatchError) -> tuple[list[dict[str, torch.Tensor]], float]:
        """The microbatches, and what the losses are divided by, over all copies of the plan; raises as `step`."""
        microbatches: list[dict[str, torch.Tensor]] = []
        sums, weight, fault = [0.0] * rows.STATISTICS, 0.0, ""
        try:  # before the batch is on a device that it would wait for
            if isinstance(batch, BatchError):
                raise batch
            microbatches = split_batch(self.graph, batch, self.plan.problem.num_microbatches)
            own = rows.statistics(self.graph, microbatches)
            sums[:len(own)] = own
        except BatchError as error:
            fault = str(error)
        faults, ends = int(bool(fault)), int(isinstance(batch, DataEnd))
        if self.mesh.copy_control is not None:
            total = torch.tensor([*sums, faults, ends], dtype=torch.float64)
            dist.all_reduce(total, group=self.mesh.copy_control)
            *sums, faults, ends = total.tolist()
        if ends:
            fault = fault or "the data of another copy of the plan has no next batch"
        elif faults:
            fault = fault or "another copy of the plan got a batch that does not fit"
        else:
            fault = self._groups_fault(microbatches)
            microbatches, weight = rows.complete(self.graph, microbatches, sums)
            if not fault and weight <= 0:
                fault = "the batch has no valid label; every label is ignored"
        if fault:
            raise (DataEnd if ends else BatchError)(f"step {self.steps_done + 1}: {fault}")
        return move_batch(microbatches, self.mesh.device, self._inputs), weight

    def _groups_fault(self, microbatches: list[dict[str, torch.Tensor]]) -> str:
        """What is wrong with groups of responses that several copies of the plan have; the same on all of them."""
        own = rows.groups_of(self.graph, microbatches)
        if own is None or self.mesh.copy_control is None:
            return ""
        every = [torch.empty_like(own) for _ in range(self.mesh.num_copies)]
        dist.all_gather(every, own, group=self.mesh.copy_control)
        try:
            rows.check_apart(self.graph.source["loss"]["name"], every)
        except BatchError as error:
            return str(error)
        return ""

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.weights.parameters.values():
            parameter.grad = None

    def routing_counts(self) -> dict[int, torch.Tensor]:
        """How often each expert was chosen in the last step: counts [experts] by the number of the MoE layer in the
        graph, for the layers of this rank and the tokens of this copy."""
        return self.compiled.counters

    def place_experts(self, expert_map: ExpertMap, optimizer: torch.optim.Optimizer | None = None) -> Moved:
        """Move this rank's experts to where the map wants them, with gradients and the optimizer's state.

        Between steps, on all ranks. The mathematics does not change: every later step is what it would have been.
        """
        if self.compiled.experts is None:
            raise RunError("place_experts: this run has no expert-parallel group; capture the model with"
                           " --expert-parallel and start several copies of the plan")
        return move_experts(self.compiled.experts, self.weights, expert_map, optimizer)

    def _share(self, losses: dict[int, torch.Tensor], scale: float) -> float | None:
        return self._end_sum(self._begin_sum(losses, scale))

    def _begin_sum(self, losses: dict[int, torch.Tensor], scale: float) -> tuple[Any, torch.Tensor, float]:
        """What sums the losses over the ranks (None where nothing is left to do), [loss, notices], and the scale: nan
        where this rank will not know the loss."""
        numbers = [torch.zeros((), dtype=torch.float64, device=self.mesh.device)]
        numbers[0] = sum((losses[index].double() for index in sorted(losses)), numbers[0])
        if self._carrying is not None:
            numbers.append(self._carrying.double())
            self._carrying = None
        known, *carried = torch.stack(numbers).tolist()  # the one moment of a step at which the host waits
        self.carried = carried[0] if carried else self.carried
        shared = self.options.share_loss and world() > 1
        if shared and self.mesh.member:
            known = 0.0  # all members of a team have the same loss
        both = torch.tensor([known, float(self.notice())], dtype=torch.float64)
        if shared:
            return dist.all_reduce(both, async_op=True), both, scale
        return None, both, scale if losses else math.nan

    def _end_sum(self, begun: tuple[Any, torch.Tensor, float] | None) -> float | None:
        if begun is None:
            return None
        work, both, scale = begun
        if work is not None:
            comm.wait([work], timedelta(seconds=self.options.timeout_s),
                      lambda: f"{self.mesh.text}, step {self.steps_done}: sum of the loss")
        self.noticed = bool(both[1] > 0)
        return None if math.isnan(scale) else float(both[0]) * scale
