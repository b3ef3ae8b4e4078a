"""A loop over one rank's instructions with one handler for each kind.

It knows no pipeline: what runs when was decided by the plan, who sends to whom by lowering. Sends and receives are
started and forgotten until a consumer or a FREE needs them; nothing polls. What the plan has on the collective stream
runs on a thread (and a CUDA stream) of its own where ranks exchange rows there (`mipipe.runtime.engine.side_stream`),
else in the program's order. A failing instruction ends the run with its number, its text and the peer.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mipipe.graphs.collector import no_collection
from mipipe.graphs.errors import MipipeError, ProgramError, RunError
from mipipe.planner.actions import ActionKind
from mipipe.planner.execution.simulate_memory import sends_fit
from mipipe.planner.jobs.stages import view
from mipipe.runtime.engine import reduce
from mipipe.runtime.engine.clock import Clock, HostClock
from mipipe.runtime.engine.compiling.buckets import Bucket
from mipipe.runtime.engine.compiling.buffers import Buffers
from mipipe.runtime.engine.compiling.calls import ActionCode, random_key, run_calls
from mipipe.runtime.engine.compiling.compiled import Compiled
from mipipe.runtime.engine.compiling.instructions import ActionPart, Step, Transport
from mipipe.runtime.engine.parts import Gathers
from mipipe.runtime.engine.record import StepRecord
from mipipe.runtime.engine.side_stream import SideStream
from mipipe.runtime.engine.streams import streams_of
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks.options import EngineOptions

Handlers = Sequence[tuple[Callable[["Executor", Any], None], Any]]
"""What runs an instruction, and its argument. Functions, not methods of one executor, which would hold itself: groups
have to end with the engine, not as the interpreter does (a thread of theirs that still holds a tensor aborts then)."""


class Executor:
    """Runs the instructions of a rank."""

    def __init__(self, compiled: Compiled, options: EngineOptions) -> None:
        self._on_update: Callable[[], None] | None = None
        self._compiled, self._options = compiled, options
        self._waits = compiled.waits
        self._buffers = Buffers()
        self._reducer = reduce.Reducer(compiled, self._waits)
        self._gathers = Gathers(compiled, self._waits)
        self._microbatches: list[dict[str, torch.Tensor]] = []
        self._record = StepRecord()
        self._clock: Clock = HostClock()
        self._step, self._evaluating = 0, False
        self._hold_sends = holds_sends(compiled, options)
        self._tracking, self._static = options.track_memory, set[int]()
        self._side: SideStream | None = None
        self._aside = options.overlap and not self._tracking and compiled.exchanges_aside
        self._made_aside: set[int] = set()
        self._frames_aside: set[int] = set()
        if self._aside:
            steps = [ready.argument for ready in compiled.instructions if isinstance(ready.argument, Step)]
            self._made_aside = {transfer for step in steps if step.aside for piece in step.pieces
                                for transfer, _ in piece.outgoing}
            self._frames_aside = {piece.frame for step in steps if step.aside for piece in step.pieces}
        handlers: dict[ActionKind, Callable[[Executor, Any], None]] = {
            **dict.fromkeys((ActionKind.F, ActionKind.I, ActionKind.W, ActionKind.B, ActionKind.OVERLAP_F_B,
                             ActionKind.RECOMPUTE), Executor._compute),
            ActionKind.SEND: Executor._send, ActionKind.RECV: Executor._receive, ActionKind.FREE: Executor._free,
            ActionKind.ALL_REDUCE: Executor._all_reduce, ActionKind.OPTIMIZER_STEP: Executor._update}
        missing = [item.kind for item in compiled.instructions if item.kind not in handlers]
        if missing:
            raise ProgramError(f"program: instruction {missing[0]} is not known to the engine")
        self._training = [(handlers[item.kind], item.argument) for item in compiled.instructions]
        self._evaluation = [(handlers[item.kind], item.argument) for item in compiled.evaluation]

    def run(self, microbatches: list[dict[str, torch.Tensor]], step: int,
            on_update: Callable[[], None] | None = None, clock: Clock | None = None) -> StepRecord:
        """Forward and backward of all microbatches; ``on_update`` is called at the program's OPTIMIZER_STEP. ``step``
        counts steps for random numbers; ``clock`` (the host's) takes the times of the record.

        Raises:
            RunError: an instruction failed or a peer kept this rank waiting for too long.
        """
        self._on_update, self._evaluating = on_update, False
        self._clock = clock or HostClock()
        self._reducer.begin()
        return self._walk(self._training, microbatches, step)

    def evaluate(self, microbatches: list[dict[str, torch.Tensor]], step: int) -> StepRecord:
        """Forward of all microbatches; raises as `run`."""
        self._evaluating, self._clock = True, HostClock()
        return self._walk(self._evaluation, microbatches, step)

    def _walk(self, program: Handlers, microbatches: list[dict[str, torch.Tensor]], step: int) -> StepRecord:
        self._microbatches, self._step, self._record = microbatches, step, StepRecord(clock=self._clock.kind)
        self._waits.talk = self._record.talk
        self._gathers.refresh()
        if self._compiled.sampler is not None:
            self._compiled.sampler.active = not self._evaluating
        for counter in self._compiled.counters.values():
            counter.zero_()
        if self._tracking:
            self._static = self._static_storages()
        if self._aside and self._side is None:
            self._side = SideStream(streams_of(self._compiled.mesh.device))
        position = 0
        try:
            self._clock.begin()
            with torch.no_grad(), no_collection():
                for position, (handler, argument) in enumerate(program):  # noqa: B007
                    handler(self, argument)
                    if self._tracking:
                        self._measure()
                self._join()
                if not self._evaluating:
                    self._reducer.finish()
                self._drain()
            self._settle()
            self._read_clock()
            return self._record
        except Exception as error:
            self._buffers.clear()
            self._waits.forget()
            if self._side is not None:
                self._side.abandon()
                self._side = None
            instructions = self._compiled.evaluation if self._evaluating else self._compiled.instructions
            text = f"{self._compiled.mesh.text}, instruction {position} ({instructions[position].label})"
            if isinstance(error, _Unsettled):
                raise RunError(f"{self._compiled.mesh.text}, {error}") from None
            if isinstance(error, MipipeError):
                raise type(error)(f"{text}: {error}") from error
            raise RunError(f"{text}: {type(error).__name__}: {error}") from error

    def _compute(self, step: Step) -> None:
        if self._side is None:
            self._act(step)
        elif step.aside:
            keys = [("frame", target) for piece in step.pieces for _, target, _, _ in piece.deliveries]
            action = self._compiled.program.ranks[self._compiled.mesh.rank][step.index].action
            self._side.submit(functools.partial(self._act, step), str(action), keys)
        else:
            for piece in step.pieces:
                self._side.wait(("frame", piece.frame))
            self._act(step)

    def _act(self, step: Step) -> None:
        aside = self._side is not None and step.aside
        for transport in step.waits:
            self._take(transport, aside)
        start = self._clock.mark()
        for piece in step.pieces:
            self._do(piece, aside)
        self._record.events.append((step.index, start, self._clock.mark()))

    def _do(self, piece: ActionPart, aside: bool) -> None:
        buffers = self._buffers
        frame = buffers.frame(piece.frame, piece.template)
        for slot, name in piece.batch:
            frame[slot] = self._microbatches[piece.microbatch][name]
        part: ActionCode = piece.evaluation if self._evaluating else piece.part
        run_calls(part.calls, frame, functools.partial(self._seed, piece.microbatch))
        for slot, target, template, place in piece.deliveries:
            buffers.frame(target, template)[place] = frame[slot]
            if self._side is not None and (target in self._frames_aside) is not aside:
                self._side.streams.keep(frame[slot], not aside)
        for transfer, slots in piece.outgoing:
            buffers.outgoing[transfer] = ([frame[slot].contiguous() for slot in slots], [])
            if self._side is not None and aside:  # FREE waits for them on the compute stream
                for tensor in buffers.outgoing[transfer][0]:
                    self._side.streams.keep(tensor, False)
        for name, slot in piece.keeps:
            self._keep(name, piece.microbatch, frame[slot])
        if self._tracking:
            self._measure()
        for slot in part.drops:
            frame[slot] = None
        if piece.last or self._evaluating:
            del buffers.frames[piece.frame]

    def _seed(self, microbatch: int, segment: int) -> int:
        mesh = self._compiled.mesh
        number = mesh.copy * self._compiled.plan.problem.num_microbatches + microbatch
        return random_key(self._options.seed, self._step, number, segment)

    def _keep(self, name: str, microbatch: int, tensor: torch.Tensor) -> None:
        if name == self._compiled.graph.loss:
            self._record.losses[microbatch] = tensor
        if self._evaluating:
            self._record.outputs.setdefault(name, {})[microbatch] = tensor

    def _take(self, transport: Transport, aside: bool) -> None:
        tensors, works = self._buffers.incoming.pop(transport.index)
        self._waits.wait(works, lambda: f"receiving {transport.text} from rank {transport.peer}")
        self._record.transfer_times.append((transport.index, 1, self._clock.mark()))
        frame = self._buffers.frame(transport.frame, transport.template)
        for slot, tensor in zip(transport.slots, tensors, strict=True):
            frame[slot] = tensor
            if self._side is not None and aside:
                self._side.streams.keep(tensor, True)

    def _receive(self, transport: Transport) -> None:
        device = self._compiled.mesh.device
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in transport.specs]
        works = comm.start_receive(transport.group, tensors, transport.place)
        self._buffers.incoming[transport.index] = (tensors, works)

    def _send(self, transport: Transport) -> None:
        if self._side is None:
            self._start_send(transport)
            return
        channel = ("channel", transport.peer)  # its sends stay in one order
        if transport.index in self._made_aside:
            keys = [("sent", transport.index), channel]
            self._side.submit(functools.partial(self._start_send, transport), f"SEND {transport.text}", keys)
        else:
            self._side.launched(channel)
            self._start_send(transport)

    def _start_send(self, transport: Transport) -> None:
        tensors, works = self._buffers.outgoing[transport.index]
        self._record.transfer_times.append((transport.index, 0, self._clock.mark()))
        works += comm.start_send(transport.group, tensors, transport.place)

    def _free(self, transport: Transport) -> None:
        if self._hold_sends:
            return
        if self._side is not None:
            self._side.launched(("sent", transport.index))
        _, works = self._buffers.outgoing[transport.index]
        self._waits.wait(works, lambda: f"sending {transport.text} to rank {transport.peer}")
        del self._buffers.outgoing[transport.index]

    def _all_reduce(self, buckets: tuple[Bucket, ...]) -> None:
        self._reducer.start(buckets)

    def _update(self, index: int) -> None:
        if self._on_update is not None and not self._evaluating:
            self._join()
            start = self._clock.mark()
            self._reducer.finish()
            with torch.enable_grad():
                self._on_update()
            self._record.events.append((index, start, self._clock.mark()))

    def _settle(self) -> None:
        try:
            self._waits.settle()
        except RunError as error:
            raise _Unsettled(str(error)) from None

    def _read_clock(self) -> None:
        """Marks become moments, now that the step is over."""
        if isinstance(self._clock, HostClock):
            return
        read, record = self._clock.moment_ns, self._record
        record.events = [(index, read(start), read(end)) for index, start, end in record.events]
        record.transfer_times = [(index, side, read(moment)) for index, side, moment in record.transfer_times]

    def _join(self) -> None:
        if self._side is not None:
            self._side.join()

    def _measure(self) -> None:
        self._record.memory.append((time.perf_counter_ns(), self._buffers.num_bytes(self._static)))

    def _static_storages(self) -> set[int]:
        """Data pointers of what is there without the step: weights, constants, the batch."""
        held = [item for code in self._compiled.stages.values() for item in code.template if item is not None]
        held += [tensor for piece in self._microbatches for tensor in piece.values()]
        return {tensor.untyped_storage().data_ptr() for tensor in held}

    def _drain(self) -> None:
        """Wait for sends the program left to run (programs without FREE); nothing else may be left over."""
        for index in list(self._buffers.outgoing):
            _, works = self._buffers.outgoing.pop(index)
            self._waits.wait(works, functools.partial("sending transfer {}".format, index))
        left = len(self._buffers.incoming) + len(self._buffers.frames)
        if left:
            raise ProgramError(f"{left} buffers are left at the end of the step; see mipipe check")


def holds_sends(compiled: Compiled, options: EngineOptions) -> bool:
    """Whether what was sent stays to the end of a step: as the options say, else on CUDA where there is room. On a CPU
    the wait is the host's, and short where the plan's times hold."""
    if options.hold_sends is not None:
        return options.hold_sends
    plan = compiled.plan
    return compiled.mesh.device.type == "cuda" and sends_fit(view(plan.problem, plan.placement), compiled.program,
                                                             compiled.mesh.rank)


class _Unsettled(RunError):
    """A wait that was not over when the step was, with its own place: the instruction at hand is a later one."""
