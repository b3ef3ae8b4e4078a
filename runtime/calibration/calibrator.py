"""Runs a rank's calibration streams, a layer at a time, and leaves what was measured in files
(`mipipe.runtime.calibration.files`).

A run that was interrupted goes on after the last finished step, on any ranks: a stream is run by one process, in one
order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mipipe.graphs.calibration.streams import CalibrationPlan, ModelStream
from mipipe.graphs.errors import InputError, RunError
from mipipe.runtime.calibration import gradients
from mipipe.runtime.calibration.decoder import Decoder
from mipipe.runtime.calibration.files import States, keep, samples_file, stream_folder
from mipipe.runtime.calibration.members import RunningModel, linked, watching
from mipipe.runtime.calibration.statistics import FORWARD, Capture
from mipipe.runtime.calibration.tokens import Samples


class Calibrator:
    """Runs steps of streams; ``open_model(index)`` makes a `Decoder` of the graph's model of that index."""

    def __init__(self, calibration: CalibrationPlan, folder: Path, open_model: Callable[[int], Decoder],
                 dtype: torch.dtype) -> None:
        self._calibration, self._folder, self._open, self._dtype = calibration, folder, open_model, dtype
        self._running = -1
        self._members: list[RunningModel] = []

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
            self._members.append(RunningModel(decoder, torch.from_numpy(samples.ids).long(),
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
        keep(folder / "forward-embedding.safetensors", stream.statistics, found)

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
        keep(folder / f"forward-{layer}.safetensors", stream.statistics, found)

    def _through(self, folder: Path, number: int, layer: int, start: int, stop: int,
                 watch: bool) -> dict[str, Capture]:
        """A batch of a member through a layer; what its modules saw, if asked to watch."""
        member = self._members[number]
        states = self._states(folder, "states", number, layer).read(start, stop)
        seen: dict[str, Capture] = {}
        mask = member.mask(start, stop)
        with watching(member.decoder, layer, mask, seen) if watch else contextlib.nullcontext():
            out = member.decoder.forward(layer, states)
        if not bool(torch.isfinite(out[mask].sum())):
            raise RunError(f"{member.decoder.label}: layer {layer} gives values that are not finite numbers")
        self._states(folder, "states", number, layer + 1).write(start, out)
        return linked(seen)

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
        keep(folder / "forward-head.safetensors", stream.statistics, found)

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
        keep(folder / "backward-rest.safetensors", stream.statistics, found)

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
        keep(folder / f"backward-{layer}.safetensors", stream.statistics, found)

    @staticmethod
    def _take(found: Sequence[gradients.GradientStatistic], number: int, values: Mapping[str, nn.Parameter]) -> None:
        """Hand a sample's gradients on, and clear them."""
        sample = {name: (value.grad, value.detach()) for name, value in values.items() if value.grad is not None}
        for statistic in found:
            statistic.add(number, sample)
        for value in values.values():
            value.grad = None

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
