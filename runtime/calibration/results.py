"""What calibration found, as merge methods read it: sums over all parts of a stream, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mipipe.graphs.calibration.streams import CalibrationPlan
from mipipe.runtime.calibration.files import stream_folder
from mipipe.runtime.calibration.gradients import ENTRYWISE
from mipipe.runtime.calibration.statistics import AS


class Results:
    """The statistics of a merge's streams. A stream is named by its last member's model."""

    def __init__(self, calibration: CalibrationPlan, folder: Path, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._files: dict[tuple[str, int], list[dict[tuple[str, str], Path]]] = {}
        for index, stream in enumerate(calibration.streams):
            found: dict[str, dict[tuple[str, str], Path]] = {}
            for file in sorted(stream_folder(folder, index).glob("*.safetensors")):
                with safe_open(file, "pt") as opened:
                    for key in opened.keys():  # noqa: SIM118
                        name, statistic, item = key.split("|")
                        found.setdefault(statistic, {})[name, item] = file
            for statistic, places in found.items():
                self._files.setdefault((statistic, stream.key), []).append(places)
        self._scalars: dict[tuple[str, int], dict[str, dict[str, float]]] = {}

    def fields(self, statistic: str, model: int, name: str, rows: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The fields of a tensor's statistic, summed over parts; empty where it was not measured.

        Args:
            rows: of statistics that have the tensor's own shape, only these.
        """
        found: dict[str, Tensor] = {}
        for places in self._files.get((statistic, model), ()):
            for (other, item), file in places.items():
                if other != name:
                    continue
                if item.startswith(AS):
                    return self.fields(statistic, model, item.removeprefix(AS), rows)
                part = self._read(file, f"{name}|{statistic}|{item}", rows if _entrywise(statistic, item) else None)
                found[item] = found[item] + part if item in found else part
        return found

    def scalars(self, statistic: str, model: int, item: str) -> dict[str, float]:
        """A field of one number, of every tensor that has it, by name."""
        key = statistic, model
        if key not in self._scalars:
            totals: dict[str, dict[str, float]] = {}
            for places in self._files.get(key, ()):
                for (name, field), file in places.items():
                    value = self._read(file, f"{name}|{statistic}|{field}", None)
                    if value.numel() == 1:
                        entry = totals.setdefault(field, {})
                        entry[name] = entry.get(name, 0.0) + float(value)
            if statistic == "moments":
                totals["information"] = {name: information(self.fields(statistic, model, name))
                                         for name in self.names(statistic, model)}
            self._scalars[key] = totals
        return self._scalars[key].get(item, {})

    def names(self, statistic: str, model: int) -> list[str]:
        """The tensors that a statistic was measured on."""
        found: dict[str, None] = {}
        for places in self._files.get((statistic, model), ()):
            found |= dict.fromkeys(name for name, _ in places)
        return list(found)

    def _read(self, file: Path, key: str, rows: tuple[int, int] | None) -> Tensor:
        with safe_open(file, "pt") as opened:
            value: Tensor = opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows[0]:rows[1]]
        return value if value.dtype is torch.float64 and value.numel() < 2**16 else value.to(self._dtype)


def information(moments: Mapping[str, Tensor]) -> float:
    """The mutual information in nats of two models' outputs, were each feature Gaussian: mean ``-0.5 ln(1 - rho^2)``.

    ``rho^2`` is at most ``1 - 1e-6``; features that do not vary are left out.
    """
    count = float(moments["count"])
    mean = {key: moments[key].double() / count for key in ("a", "b", "aa", "bb", "ab")}
    one, two = mean["aa"] - mean["a"] ** 2, mean["bb"] - mean["b"] ** 2
    varies = (one > 1e-12 * mean["aa"].clamp_min(1e-30)) & (two > 1e-12 * mean["bb"].clamp_min(1e-30))
    if not bool(varies.any()):
        return 0.0
    squared = ((mean["ab"] - mean["a"] * mean["b"]) ** 2 / (one * two))[varies].clamp_max(1 - 1e-6)
    return float((-0.5 * torch.log1p(-squared)).mean())


def _entrywise(statistic: str, item: str) -> bool:
    return statistic.partition(":")[0] in ENTRYWISE and item == "sum"


class UnitResults:
    """The results for some rows of one unit; models are numbered as in its tile, the base is -1."""

    def __init__(self, results: Results, name: str, models: Mapping[int, int], rows: tuple[int, int],
                 turned: bool, columns: Mapping[int, Tensor] | None = None,
                 units: Mapping[int, Tensor] | None = None) -> None:
        self._results, self._name, self._models, self._rows, self._turned = results, name, models, rows, turned
        self._columns, self._units = columns or {}, units or {}

    def fields(self, statistic: str, model: int) -> dict[str, Tensor]:
        """The fields of this tensor's statistic; empty where it was not measured."""
        found = self._results.fields(statistic, self._models[model], self._name, self._rows)
        if self._turned and statistic.partition(":")[0] in ENTRYWISE:
            found = {item: value.T.contiguous() if value.dim() == 2 else value for item, value in found.items()}
        return found

    def columns(self, model: int) -> Tensor | None:
        """The order in which a model's columns were read, where it is not its own."""
        return self._columns.get(model)

    def units(self, model: int) -> Tensor | None:
        """The order in which a model's rows were read, where it is not its own."""
        return self._units.get(model)

    def every(self, statistic: str, model: int, item: str) -> dict[str, float]:
        """A field of one number for all tensors, by name."""
        return self._results.scalars(statistic, self._models[model], item)

    def other(self, statistic: str, model: int, name: str) -> dict[str, Tensor]:
        """The fields of another tensor's statistic."""
        return self._results.fields(statistic, self._models[model], name)

    def names(self, statistic: str, model: int) -> list[str]:
        """The tensors that a statistic was measured on."""
        return self._results.names(statistic, self._models[model])

    @property
    def name(self) -> str:
        return self._name

