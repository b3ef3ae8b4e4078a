"""What running the models costs: flops, bytes and memory of each step of a calibration stream, and who runs which.

A step is the embedding, a decoder layer forward, the head or loss, or a layer backward (`Stream.num_steps`), of all
members of the stream on all its samples. Counted are two flops per weight and token forward, six more backward (the
forward once again, and the gradients of inputs and weights); attention's scores and the statistics themselves are not.
"""

from __future__ import annotations

from mipipe.graphs.calibration.streams import ModelStream
from mipipe.graphs.errors import InfeasibleError
from mipipe.graphs.merging.checkpoints.files import DTYPE_BITS
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.units import format_bytes
from mipipe.planner.merging.costs import OVERHEAD_BYTES, MergeRates

SQUARE = {"gram": 1, "cross": 3, "joint": 4, "routing": 1}
"""How many matrices of inputs by inputs a statistic keeps for every linear map."""

RUNNING_BYTES = 2**27
"""What running a model takes beside its tensors: transformers, imported at first use."""


def step_name(stream: ModelStream, step: int, num_layers: int) -> str:
    """A step in words."""
    if step == 0:
        return "embedding"
    if step <= num_layers:
        return f"layer {step - 1}"
    if step == num_layers + 1:
        return "loss" if stream.gradients else "head"
    return f"backward of layer {2 * num_layers + 1 - step}"


class RunCosts:
    """The costs of a graph's streams; what tensors have is counted once."""

    def __init__(self, graph: MergeGraph, rates: MergeRates) -> None:
        assert graph.calibration is not None
        self._rates, self._calibration = rates, graph.calibration
        self._bytes = 8 if graph.compute_dtype == "float64" else 4
        self._width = 0
        self._weights: dict[tuple[int, int | None], list[int]] = {}
        self._widest: dict[int | None, int] = {}
        squares: dict[int | None, dict[int, int]] = {}
        for unit in graph.units:
            if unit.tensor_class is TensorClass.EMBEDDING:
                self._width = max(self._width, unit.shape[-1])
                continue
            for item in unit.inputs:
                entry = self._weights.setdefault((item.model, unit.layer), [0, 0])
                entry[0] += item.tensor.num_bytes * 8 // DTYPE_BITS[item.tensor.dtype]
                entry[1] += item.num_bytes
            if len(unit.shape) == 2:
                self._widest[unit.layer] = max(self._widest.get(unit.layer, 0), unit.shape[0])
                squares.setdefault(unit.layer, {})[unit.shape[1]] = unit.shape[1] ** 2
        self._squares = {layer: 2 * sum(found.values()) for layer, found in squares.items()}

    def step_seconds(self, stream: ModelStream, step: int) -> float:
        """Seconds of one step at measured rates."""
        found, rates = self._calibration, self._rates
        first, stop = found.rows(stream, found.samples)
        tokens, seconds = (stop - first) * found.length, 0.0
        for member in stream.members:
            entries, size = self._weights.get((member.model, _layer_of(step, found.num_layers)), (0, 0))
            flops = 0 if step == 0 else (2 if step <= found.num_layers else 6) * entries * tokens
            states = tokens * self._width * self._bytes
            seconds += flops / rates.flops + size / rates.read + states / rates.write + states / rates.read
        return seconds

    def stream_seconds(self, stream: ModelStream) -> float:
        """Seconds of a stream."""
        return sum(self.step_seconds(stream, step) for step in range(stream.num_steps(self._calibration.num_layers)))

    def step_memory(self, stream: ModelStream, step: int) -> int:
        """Bytes of a step: a layer of every member, its gradients, one batch inside it, and the statistics."""
        found = self._calibration
        layer = _layer_of(step, found.num_layers)
        entries = [self._weights.get((member.model, layer), (0, 0))[0] if step else 0 for member in stream.members]
        tokens = (1 if stream.gradients else found.batch) * found.length
        inside = 12 * tokens * max(self._width, self._widest.get(layer, 0))
        factor = 3 if stream.gradients and step > found.num_layers else 1
        kept = sum(SQUARE.get(name, 0) for name in stream.statistics) * self._squares.get(layer, 0)
        return RUNNING_BYTES + self._bytes * (sum(entries) * factor + max(entries, default=0) + inside
                                              + (kept if 0 < step <= found.num_layers else 0))


def assign_streams(graph: MergeGraph, num_ranks: int, rates: MergeRates,
                   cap: int | None) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The streams of every rank, the longest given out first, and the bytes the largest step takes.

    Raises:
        InfeasibleError: a step needs more memory than the cap.
    """
    calibration = graph.calibration
    if calibration is None:
        return tuple(() for _ in range(num_ranks)), 0
    costs = RunCosts(graph, rates)
    peaks = [(costs.step_memory(stream, step), number, step) for number, stream in enumerate(calibration.streams)
             for step in range(stream.num_steps(calibration.num_layers))]
    peak, number, step = max(peaks)
    if cap is not None and OVERHEAD_BYTES + peak > cap:
        stream = calibration.streams[number]
        raise InfeasibleError(f"memory cap {format_bytes(cap)} per rank: running"
                              f" {' beside '.join(graph.models[item.model].label for item in stream.members)},"
                              f" {step_name(stream, step, calibration.num_layers)}, takes"
                              f" {format_bytes(OVERHEAD_BYTES + peak)} at once; raise --memory to at least that, or"
                              " lower calibration's batch or length")
    times = [costs.stream_seconds(stream) for stream in calibration.streams]
    loads, found = [0.0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for index in sorted(range(len(times)), key=lambda index: (-times[index], index)):
        rank = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        found[rank].append(index)
        loads[rank] += times[index]
    return tuple(tuple(sorted(rank)) for rank in found), peak


def _layer_of(step: int, num_layers: int) -> int | None:
    """The decoder layer of a step; None for embedding and loss."""
    if 0 < step <= num_layers:
        return step - 1
    return 2 * num_layers + 1 - step if step > num_layers + 1 else None
