"""`Engine`: executes one rank's program step by step. A loop over instructions with one handler for each kind.

It knows no pipeline: what runs when was decided by the plan, who sends to whom by lowering. Sends and receives are
started and forgotten until a consumer or a FREE needs them; nothing polls. A failing instruction ends the run with its
number, its text and the peer.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import MipipeError, ProgramError, RunError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.actions import ActionKind
from mipipe.planner.expert_map import ExpertMap
from mipipe.planner.plan import Plan
from mipipe.planner.program import Program
from mipipe.runtime import comm, reduce
from mipipe.runtime.batches import Batch, split_batch, total_weight
from mipipe.runtime.buckets import Bucket
from mipipe.runtime.buffers import Buffers, Frame
from mipipe.runtime.compiled import Compiled, compile_rank
from mipipe.runtime.expert_moves import Moved, move_experts
from mipipe.runtime.instructions import Step, Transport
from mipipe.runtime.mesh import Mesh
from mipipe.runtime.stage import Call, Part
from mipipe.runtime.weights import Source, Weights


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """``seed`` keys random operators; ``timeout_s`` bounds every wait; ``compile`` uses torch.compile.

    ``master_dtype`` keeps weights and gradients in another dtype than the graph computes in. ``share_loss`` returns the
    loss on every rank (one small all-reduce), else only where it is computed. ``track_memory`` measures after every
    instruction, slowly. Memory beyond the plan's buys independence of the other ranks' delays: ``hold_sends`` keeps
    what was sent to the end of the step instead of waiting where the program frees it, ``prepost`` posts every receive
    that many compute actions earlier than the program does. For graphs captured for expert parallelism: ``expert_map``
    places the experts on the copies of the plan (None: in equal blocks), ``load_factor`` caps the rows that a copy
    accepts, in even shares.
    """

    seed: int = 0
    timeout_s: float = 60.0
    compile: bool = False
    master_dtype: torch.dtype | None = None
    share_loss: bool = True
    track_memory: bool = False
    hold_sends: bool = False
    prepost: int = 0
    expert_map: ExpertMap | None = None
    load_factor: float | None = None


class Engine:
    """One rank of a planned run, usable in any training loop.

    ``engine.step(batch)`` runs forward and backward of all microbatches and returns the loss; gradients are then on
    ``engine.parameters()``, ordinary parameters for any torch optimizer, already summed over replicas and ties.
    ``on_update`` is called at the program's OPTIMIZER_STEP, when gradients are complete.
    """

    def __init__(self, plan: Plan, graph: OperatorGraph, weights: Source, *, program: Program | None = None,
                 mesh: Mesh | None = None, options: EngineOptions | None = None,
                 on_update: Callable[[], None] | None = None, device: torch.device | str = "cpu") -> None:
        self.options = options or EngineOptions()
        self.on_update = on_update
        self.steps_done = 0
        self.compiled: Compiled = compile_rank(plan, graph, weights, program, mesh, torch.device(device), self.options)
        self.plan, self.graph, self.mesh = plan, graph, self.compiled.mesh
        self.weights: Weights = self.compiled.weights
        self._timeout = timedelta(seconds=self.options.timeout_s)
        self._blocking = self.mesh.device.type == "cpu"
        self._buffers = Buffers()
        self._losses: dict[int, torch.Tensor] = {}
        self._microbatches: list[dict[str, torch.Tensor]] = []
        self._reducer = reduce.Reducer(self.compiled, self._timeout, self._blocking)
        self.outputs: dict[str, dict[int, torch.Tensor]] = {}
        self.events: list[tuple[int, int, int]] = []
        self.transfer_times: list[tuple[int, int, int]] = []
        self.memory: list[tuple[int, int]] = []
        self._evaluating = False
        self._static: set[int] = set()
        handlers: dict[ActionKind, Callable[[Any], None]] = {
            ActionKind.F: self._compute, ActionKind.I: self._compute, ActionKind.W: self._compute,
            ActionKind.B: self._compute, ActionKind.OVERLAP_F_B: self._compute, ActionKind.RECOMPUTE: self._compute,
            ActionKind.SEND: self._send, ActionKind.RECV: self._receive, ActionKind.FREE: self._free,
            ActionKind.ALL_REDUCE: self._all_reduce, ActionKind.OPTIMIZER_STEP: self._update}
        missing = [item.kind for item in self.compiled.instructions if item.kind not in handlers]
        if missing:
            raise ProgramError(f"program: instruction {missing[0]} is not known to the engine")
        self._program = [(handlers[item.kind], item.argument) for item in self.compiled.instructions]
        self._evaluation = [(handlers[item.kind], item.argument) for item in self.compiled.evaluation]

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters of this rank."""
        return [parameter for parameter in self.weights.parameters.values() if parameter.requires_grad]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters of this rank with their canonical names."""
        return [(name, item) for name, item in self.weights.parameters.items() if item.requires_grad]

    def step(self, batch: Batch) -> float | None:
        """The loss of one step: the sum of all microbatches' losses over the global number of valid labels.

        ``batch``: tensors by the graph's input names, split along their first dimension, or a list of microbatches.
        Gradients are added to what ``.grad`` holds. None where the loss is not known to this rank (``share_loss``).

        Raises:
            RunError: an instruction failed or a peer kept this rank waiting for too long.
        """
        self._microbatches = split_batch(self.graph, batch, self.plan.problem.num_microbatches, self.mesh.device)
        weight = self._total_weight()
        self.compiled.loss_gradient.fill_(1.0 / weight)
        self._evaluating = False
        self._run(self._program)
        self.steps_done += 1
        return self._share(self._losses, 1.0 / weight)

    def evaluate(self, batch: Batch) -> float | None:
        """The loss of a batch without gradients; ``engine.outputs`` then has this rank's outputs by microbatch."""
        self._microbatches = split_batch(self.graph, batch, self.plan.problem.num_microbatches, self.mesh.device)
        weight = self._total_weight()
        self._evaluating = True
        self._run(self._evaluation)
        return self._share(self._losses, 1.0 / weight)

    def _total_weight(self) -> float:
        """What the losses are divided by, over all copies of the plan."""
        weight = total_weight(self.graph, self._microbatches)
        if self.mesh.copy_group is not None:
            total = torch.tensor(weight, dtype=torch.float64, device=self.mesh.device)
            dist.all_reduce(total, group=self.mesh.copy_group)
            weight = float(total)
        if weight <= 0:
            raise RunError(f"step {self.steps_done + 1}: the batch has no valid label; every label is ignored")
        return weight

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

    def _run(self, program: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
        self._losses.clear()
        self.outputs = {}
        self.events, self.transfer_times, self.memory = [], [], []
        self.weights.refresh()
        for counter in self.compiled.counters.values():
            counter.zero_()
        if not self._evaluating:
            self._reducer.begin()
        if self.options.track_memory:
            self._static = self._static_storages()
        position = 0
        try:
            with torch.no_grad(), no_collection():
                for position, (handler, argument) in enumerate(program):  # noqa: B007
                    handler(argument)
                    self._measure()
                if not self._evaluating:
                    self._reducer.finish()
                self._drain()
        except Exception as error:
            self._buffers.clear()
            where = (self.compiled.evaluation if self._evaluating else self.compiled.instructions)[position]
            text = f"rank {self.mesh.rank}, instruction {position} ({where.label})"
            if isinstance(error, MipipeError):
                raise type(error)(f"{text}: {error}") from error
            raise RunError(f"{text}: {type(error).__name__}: {error}") from error

    def _compute(self, step: Step) -> None:
        buffers = self._buffers
        for transport in step.waits:
            self._take(transport)
        start = time.perf_counter_ns()
        for piece in step.pieces:
            frame = buffers.frame(piece.frame, piece.template)
            for slot, name in piece.batch:
                frame[slot] = self._microbatches[piece.microbatch][name]
            part: Part = piece.evaluation if self._evaluating else piece.part
            self._calls(part.calls, frame, piece.microbatch)
            for slot, target, template, place in piece.deliveries:
                buffers.frame(target, template)[place] = frame[slot]
            for transfer, slots in piece.outgoing:
                buffers.outgoing[transfer] = ([frame[slot].contiguous() for slot in slots], [])
            for name, slot in piece.keeps:
                self._keep(name, piece.microbatch, frame[slot])
            self._measure()
            for slot in part.drops:
                frame[slot] = None
            if piece.last or self._evaluating:
                del buffers.frames[piece.frame]
        self.events.append((step.index, start, time.perf_counter_ns()))

    def _calls(self, calls: tuple[Call, ...], frame: Frame, microbatch: int) -> None:
        for call in calls:
            for slot, parts in call.sums:
                total = frame[parts[0]]
                for part in parts[1:]:
                    total = total + frame[part]
                frame[slot] = total
            if call.segment >= 0:
                torch.manual_seed(random_key(self.options.seed, self.steps_done,
                                             self.mesh.copy * self.plan.problem.num_microbatches + microbatch,
                                             call.segment))
            if call.counted is not None:
                slot, counter = call.counted
                chosen = frame[slot].reshape(-1)
                counter.index_add_(0, chosen, torch.ones_like(chosen))
            results = call.function(*call.arguments(frame))
            for position, slot in call.stores:
                frame[slot] = results[position]
            for position, parameter, owned in call.gradients:
                gradient = results[position]
                if parameter.grad is not None:
                    parameter.grad.add_(gradient)
                elif owned and gradient.dtype is parameter.dtype and gradient.is_contiguous():
                    parameter.grad = gradient
                else:
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
            for position, buffer in call.updates:
                buffer.copy_(results[position])
            for slot in call.drops:
                frame[slot] = None

    def _keep(self, name: str, microbatch: int, tensor: torch.Tensor) -> None:
        if name == self.graph.loss:
            self._losses[microbatch] = tensor
        if self._evaluating:
            self.outputs.setdefault(name, {})[microbatch] = tensor

    def _take(self, transport: Transport) -> None:
        tensors, works = self._buffers.incoming.pop(transport.index)
        comm.wait(works, self._timeout, lambda: f"receiving {transport.text} from rank {transport.peer}",
                  self._blocking)
        self.transfer_times.append((transport.index, 1, time.perf_counter_ns()))
        frame = self._buffers.frame(transport.frame, transport.template)
        for slot, tensor in zip(transport.slots, tensors, strict=True):
            frame[slot] = tensor

    def _receive(self, transport: Transport) -> None:
        device = self.mesh.device
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in transport.specs]
        works = comm.start_receive(transport.group, tensors, transport.place)
        self._buffers.incoming[transport.index] = (tensors, works)

    def _send(self, transport: Transport) -> None:
        tensors, works = self._buffers.outgoing[transport.index]
        self.transfer_times.append((transport.index, 0, time.perf_counter_ns()))
        works += comm.start_send(transport.group, tensors, transport.place)

    def _free(self, transport: Transport) -> None:
        if self.options.hold_sends:
            return
        _, works = self._buffers.outgoing[transport.index]
        comm.wait(works, self._timeout, lambda: f"sending {transport.text} to rank {transport.peer}", self._blocking)
        del self._buffers.outgoing[transport.index]

    def _all_reduce(self, buckets: tuple[Bucket, ...]) -> None:
        self._reducer.start(buckets)

    def _update(self, index: int) -> None:
        if self.on_update is not None and not self._evaluating:
            start = time.perf_counter_ns()
            self._reducer.finish()
            with torch.enable_grad():
                self.on_update()
            self.events.append((index, start, time.perf_counter_ns()))

    def _measure(self) -> None:
        if self.options.track_memory:
            self.memory.append((time.perf_counter_ns(), self._buffers.num_bytes(self._static)))

    def _static_storages(self) -> set[int]:
        """Data pointers of what is there without the step: weights, constants, the batch."""
        held = [item for code in self.compiled.stages.values() for item in code.template if item is not None]
        held += [tensor for piece in self._microbatches for tensor in piece.values()]
        return {tensor.untyped_storage().data_ptr() for tensor in held}

    def _drain(self) -> None:
        """Wait for sends the program left to run (programs without FREE); nothing else may be left over."""
        for index in list(self._buffers.outgoing):
            _, works = self._buffers.outgoing.pop(index)
            comm.wait(works, self._timeout, functools.partial("sending transfer {}".format, index), self._blocking)
        left = len(self._buffers.incoming) + len(self._buffers.frames)
        if left:
            raise ProgramError(f"{left} buffers are left at the end of the step; see mipipe check")

    def _share(self, losses: dict[int, torch.Tensor], scale: float) -> float | None:
        total = sum((losses[index].double() for index in sorted(losses)), torch.zeros((), dtype=torch.float64,
                                                                                      device=self.mesh.device))
        if self.options.share_loss and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        elif not losses:
            return None
        return float(total) * scale


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python's cyclic garbage collector waits meanwhile: with torch loaded one pass takes tens of milliseconds, and a
    pause of one rank is a pause of all. Nothing is lost: tensors go by reference counts."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def random_key(seed: int, step: int, microbatch: int, segment: int) -> int:
    """The generator's seed for one segment's F: the same on whatever rank and however often it runs (splitmix64)."""
    key = 0
    for part in (seed, step, microbatch, segment):
        key = (key + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key >> 1
