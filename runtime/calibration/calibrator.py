"""Runs a rank's calibration streams, a layer at a time, and leaves what was measured in files.

Under the merge's partial folder, ``calibration`` holds the samples (``samples-N.npz``), and for every stream a folder
with the residual streams between layers (``states-MEMBER-LAYER``), gradients (``gradients-MEMBER-LAYER``), the
statistics of each layer (``forward-LAYER.safetensors``, ``backward-LAYER.safetensors``) and a mark for each finished
step. A run that was interrupted goes on after the last mark, on any ranks: a stream is run by one process, in one
order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mipipe.graphs.calibration.streams import CalibrationPlan, ModelStream
from mipipe.graphs.errors import InputError, RunError
from mipipe.runtime.calibration import gradients
from mipipe.runtime.calibration.decoder import Decoder
from mipipe.runtime.calibration.states import States
from mipipe.runtime.calibration.statistics import FORWARD, Capture, Fields
from mipipe.runtime.calibration.tokens import Samples

ROUTER = re.compile(r"(^|\.)(gate|router|wg|router\.layer)$")
"""Paths inside a layer of what sends tokens to experts (a dense MLP's gate is called gate_proj)."""
FOLDER = "calibration"
"""The folder inside a merge's partial folder."""


def samples_file(folder: Path, calibration: CalibrationPlan, data: str) -> Path:
    """Where the samples of a data source are."""
    return folder / FOLDER / f"samples-{calibration.sources.index(data)}.npz"


def stream_folder(folder: Path, index: int) -> Path:
    """Where a stream's files are."""
    return folder / FOLDER / f"stream-{index}"


@dataclass
class _Member:
    """A model of the running stream with its samples ``[first, stop)``."""

    decoder: Decoder
    ids: Tensor
    lengths: Tensor
    first: int
    stop: int
    hidden: int = 0
    states: dict[int, States] = field(default_factory=dict)

    def rows(self, batch: int) -> Iterator[tuple[int, int]]:
        """Batches as rows relative to the first."""
        count = self.stop - self.first
        yield from ((start, min(start + batch, count)) for start in range(0, count, batch))

    def mask(self, start: int, stop: int) -> Tensor:
        """Which tokens of rows are real."""
        lengths = self.lengths[self.first + start:self.first + stop]
        return torch.arange(self.ids.shape[1])[None] < lengths[:, None]

    def tokens(self, start: int, stop: int) -> Tensor:
        return self.ids[self.first + start:self.first + stop]


class Calibrator:
    """Runs steps of streams; ``open_model(index)`` makes a `Decoder` of the graph's model of that index."""

    def __init__(self, calibration: CalibrationPlan, folder: Path, open_model: Callable[[int], Decoder],
                 dtype: torch.dtype) -> None:
        self._calibration, self._folder, self._open, self._dtype = calibration, folder, open_model, dtype
        self._running = -1
        self._members: list[_Member] = []

    def step(self, index: int, step: int) -> None:
        """Run a step of a stream, unless an earlier run did.

        Raises:
            InputError: a model cannot be run. RunError: the disk is full, or values are not finite.
        """
        stream = self._calibration.streams[index]
        folder = stream_folder(self._folder, index)
        mark = folder / f"done-{step}"
        if mark.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if index != self._running:
            self._start(index, stream)
        layers = self._calibration.num_layers
        if step == 0:
            self._embed(stream, folder)
        elif step <= layers:
            self._forward(stream, folder, step - 1)
        elif step == layers + 1 and stream.gradients:
            self._loss(stream, folder)
        elif step == layers + 1:
            self._head(stream, folder)
        else:
            self._backward(stream, folder, 2 * layers + 1 - step)
        mark.touch()
        self._forget(stream, folder, step)

    def _start(self, index: int, stream: ModelStream) -> None:
        self._members, self._running = [], index
        for item in stream.members:
            samples = Samples.load(samples_file(self._folder, self._calibration, item.data))
            decoder = self._open(item.model)
            if decoder.layers != self._calibration.num_layers:
                raise InputError(f"{decoder.label}: has {decoder.layers} layers, the merge"
                                 f" {self._calibration.num_layers}")
            first, stop = self._calibration.rows(stream, len(samples.ids))
            self._members.append(_Member(decoder, torch.from_numpy(samples.ids).long(),
                                         torch.from_numpy(samples.lengths), first, stop))

    def _batch(self, stream: ModelStream) -> int:
        return 1 if stream.gradients else self._calibration.batch

    def _states(self, folder: Path, kind: str, number: int, layer: int) -> States:
        member = self._members[number]
        return States(folder / f"{kind}-{number}-{layer}", member.ids.shape[1], self._hidden(number), self._dtype)

    def _hidden(self, number: int) -> int:
        return int(self._members[number].decoder.model.config.get_text_config().hidden_size)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _embed(self, stream: ModelStream, folder: Path) -> None:
        """The residual streams before the first layer, and the statistics of the embedding's output."""
        found = [FORWARD[name]() for name in stream.statistics] if not stream.gradients else []
        for member in self._members:
            member.decoder.load_rest(head=False)
        for start, stop in self._members[0].rows(self._batch(stream)):
            seen: list[dict[str, Capture]] = []
            for number, member in enumerate(self._members):
                if start >= member.stop - member.first:
                    continue
                states = member.decoder.embed(member.tokens(start, stop))
                self._states(folder, "states", number, 0).write(start, states)
                name = member.decoder.table
                valid = states[member.mask(start, stop)]
                seen.append({} if name is None else {name: Capture(name, valid, valid, False, name, "")})
            for statistic in found if len(seen) == len(self._members) else ():
                statistic.add(seen)
        self._rest_of_rows(stream, folder)
        for member in self._members:
            member.decoder.drop_rest()
        self._keep(folder / "forward-embedding.safetensors", stream.statistics, found)

    def _rest_of_rows(self, stream: ModelStream, folder: Path) -> None:
        """Embed what later members have beyond the first one's samples (each may have its own data)."""
        batch, least = self._batch(stream), self._members[0].stop - self._members[0].first
        for number, member in enumerate(self._members):
            for start, stop in member.rows(batch):
                if start >= least:
                    self._states(folder, "states", number, 0).write(start, member.decoder.embed(
                        member.tokens(start, stop)))

    def _record(self, stream: ModelStream) -> None:
        """Make sure that what layers take beside states is known, after an interruption too."""
        for member in self._members:
            for start, stop in member.rows(self._batch(stream)):
                if not member.decoder.has_recorded((stop - start, member.ids.shape[1])):
                    member.decoder.load_rest(head=False)
                    member.decoder.embed(member.tokens(start, stop))
                    member.decoder.drop_rest()

    def _forward(self, stream: ModelStream, folder: Path, layer: int) -> None:
        self._record(stream)
        found = [FORWARD[name]() for name in stream.statistics] if not stream.gradients else []
        for member in self._members:
            member.decoder.load_layer(layer)
        paired = bool(found)
        for start, stop in self._members[0].rows(self._batch(stream)) if paired else ():
            seen = [self._through(folder, number, layer, start, stop, True) for number in range(len(self._members))]
            for statistic in found:
                statistic.add(seen)
        for number, member in enumerate(self._members) if not paired else ():
            for start, stop in member.rows(self._batch(stream)):
                self._through(folder, number, layer, start, stop, False)
        for member in self._members:
            member.decoder.drop_layer(layer)
        self._keep(folder / f"forward-{layer}.safetensors", stream.statistics, found)

    def _through(self, folder: Path, number: int, layer: int, start: int, stop: int,
                 watch: bool) -> dict[str, Capture]:
        """A batch of a member through a layer; what its modules saw, if asked to watch."""
        member = self._members[number]
        states = self._states(folder, "states", number, layer).read(start, stop)
        seen: dict[str, Capture] = {}
        mask = member.mask(start, stop)
        with _watching(member.decoder, layer, mask, seen) if watch else _nothing():
            out = member.decoder.forward(layer, states)
        if not bool(torch.isfinite(out[mask].sum())):
            raise RunError(f"{member.decoder.label}: layer {layer} gives values that are not finite numbers")
        self._states(folder, "states", number, layer + 1).write(start, out)
        return _linked(seen)

    def _head(self, stream: ModelStream, folder: Path) -> None:
        """The statistics of what goes into the head."""
        found = [FORWARD[name]() for name in stream.statistics]
        for member in self._members:
            member.decoder.load_rest(head=False)
        if all(member.decoder.head for member in self._members):
            for start, stop in self._members[0].rows(self._batch(stream)):
                seen: list[dict[str, Capture]] = []
                for number, member in enumerate(self._members):
                    states = self._states(folder, "states", number, self._calibration.num_layers).read(start, stop)
                    valid = member.decoder.normed(member.tokens(start, stop), states)[member.mask(start, stop)]
                    name = member.decoder.head or ""
                    seen.append({name: Capture(name, valid, valid, True, name, "")})
                for statistic in found:
                    statistic.add(seen)
        for member in self._members:
            member.decoder.drop_rest()
        self._keep(folder / "forward-head.safetensors", stream.statistics, found)

    def _loss(self, stream: ModelStream, folder: Path) -> None:
        """The gradients of the loss on the last states, and the statistics of norm and head."""
        last = self._calibration.num_layers
        values = []
        for member in self._members:
            member.decoder.load_rest(head=True, train=True)
            values.append(_parameters(member.decoder, ""))
        found = [gradients.make(name, [_plain(item) for item in values]) for name in stream.statistics]
        for number, member in enumerate(self._members):
            for start, stop in member.rows(1):
                length = int(member.lengths[member.first + start])
                states = self._states(folder, "states", number, last).read(start, stop).requires_grad_()
                with torch.enable_grad():
                    ids = member.tokens(start, stop)
                    logits = member.decoder.logits(ids, states)[0, :length - 1]
                    torch.nn.functional.cross_entropy(logits, ids[0, 1:length]).backward()
                assert states.grad is not None
                self._states(folder, "gradients", number, last).write(start, states.grad)
                self._take(found, number, values[number])
        for member in self._members:
            member.decoder.drop_rest()
        self._keep(folder / "backward-rest.safetensors", stream.statistics, found)

    def _backward(self, stream: ModelStream, folder: Path, layer: int) -> None:
        self._record(stream)
        values = []
        for member in self._members:
            member.decoder.load_layer(layer, train=True)
            values.append(_parameters(member.decoder, member.decoder.prefix(layer)))
        found = [gradients.make(name, [_plain(item) for item in values]) for name in stream.statistics]
        for number, member in enumerate(self._members):
            for start, stop in member.rows(1):
                states = self._states(folder, "states", number, layer).read(start, stop).requires_grad_()
                onward = self._states(folder, "gradients", number, layer + 1).read(start, stop)
                with torch.enable_grad():
                    member.decoder.forward(layer, states).backward(onward)
                assert states.grad is not None
                self._states(folder, "gradients", number, layer).write(start, states.grad)
                self._take(found, number, values[number])
        for member in self._members:
            member.decoder.drop_layer(layer)
        self._keep(folder / f"backward-{layer}.safetensors", stream.statistics, found)

    @staticmethod
    def _take(found: Sequence[gradients.GradientStatistic], number: int, values: Mapping[str, nn.Parameter]) -> None:
        """Hand a sample's gradients on, and clear them."""
        sample = {name: (value.grad, value.detach()) for name, value in values.items() if value.grad is not None}
        for statistic in found:
            statistic.add(number, sample)
        for value in values.values():
            value.grad = None

    @staticmethod
    def _keep(file: Path, names: Sequence[str], found: Sequence[Any]) -> None:
        tensors: dict[str, Tensor] = {}
        for statistic, made in zip(names, found, strict=bool(found)) if found else ():
            fields: Fields = made.result()
            tensors |= {f"{name}|{statistic}|{item}": value.contiguous() for (name, item), value in fields.items()}
        if tensors:
            try:
                save_file(tensors, file.with_suffix(".partial"))
                file.with_suffix(".partial").rename(file)
            except OSError as error:
                raise RunError(f"{file}: cannot be written: {error.strerror}") from None

    def _forget(self, stream: ModelStream, folder: Path, step: int) -> None:
        """Remove states that no later step reads."""
        layers = self._calibration.num_layers
        for number in range(len(self._members)):
            if not stream.gradients and step >= 1:
                self._states(folder, "states", number, step - 1).remove()
            if step > layers + 1:
                layer = 2 * layers + 1 - step
                self._states(folder, "gradients", number, layer + 1).remove()
                self._states(folder, "states", number, layer + 1).remove()
        if step == stream.num_steps(layers) - 1:
            for file in (*folder.glob("states-*"), *folder.glob("gradients-*")):
                file.unlink()


def _parameters(decoder: Decoder, prefix: str) -> dict[str, nn.Parameter]:
    """Trainable parameters by the merge's names: of a layer, or (no prefix) of what is around the layers."""
    found = {}
    for own, value in decoder.model.named_parameters():
        name = decoder.stored(own)
        if own.startswith(prefix) and value.requires_grad and not value.is_meta and name is not None:
            found[name] = value
    return found


def _plain(values: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _watching(decoder: Decoder, layer: int, mask: Tensor, seen: dict[str, Capture]) -> Iterator[None]:
    """Note what modules with a weight of their own see while a layer runs, in the order in which they run."""
    hooks = []
    inputs: dict[int, str] = {}
    kept: list[Any] = []  # inputs stay alive, so that no two have the same id

    def note(name: str, linear: bool, router: bool) -> Any:
        def hook(_module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            if not given or not isinstance(given[0], Tensor):
                return
            if router and given[0].dim() == 2 and len(given[0]) == mask.numel():  # routers see tokens, not samples
                rows = given[0][mask.flatten()]
                seen[name] = Capture(name, rows, rows @ _module.weight.T, True, name, "", True)  # type: ignore[operator]
            elif given[0].shape[:2] == mask.shape and isinstance(out, Tensor):
                kept.append(given[0])
                shared = inputs.setdefault(id(given[0]), name) if linear else name
                seen[name] = Capture(name, given[0][mask], out[mask], linear, shared, "", router)
        return hook

    prefix = decoder.prefix(layer)
    for path, module in decoder.model.get_submodule(prefix[:-1]).named_modules():
        name = decoder.stored(f"{prefix}{path}.weight") if path and "weight" in module._parameters else None
        if name is not None:
            linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            router = ROUTER.search(path) is not None and module._parameters["weight"].dim() == 2
            hooks.append(module.register_forward_hook(note(name, linear, router)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linked(seen: dict[str, Capture]) -> dict[str, Capture]:
    """The captures with, for each module that is no linear map, the next one that is."""
    found: dict[str, Capture] = {}
    after = ""
    for name, capture in reversed(list(seen.items())):
        after = name if capture.linear else after
        found[name] = Capture(name, capture.inputs, capture.outputs, capture.linear, capture.shared,
                              "" if capture.linear else after, capture.router)
    return dict(reversed(list(found.items())))
