"""Reading and writing expert loads and maps in mipipe's form, in EPLB's and in those of recorded routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.read_files import load_json
from mipipe.graphs.serialize import from_data, load, read_text
from mipipe.planner.experts import routing
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap


def read_loads(path: Path, num_experts: int | None = None) -> ExpertLoads:
    """Loads from a `mipipe.expert_loads` file, from a bare list ``[layers][experts]`` (EPLB's ``weight``), or from
    recorded routing (`mipipe.planner.experts.routing`).

    Args:
        path: the file; a folder for a router trace of several ranks.
        num_experts: experts per layer, for routing that may not have reached the last ones.
    """
    if path.is_dir() or path.suffix == ".jsonl":
        return ExpertLoads(routing.read_trace(path, num_experts))
    if path.suffix in (".npy", ".npz"):
        return ExpertLoads(routing.read_arrays(path, num_experts))
    data = _json(path)
    if isinstance(data, dict) and "format" not in data and "load_history" in data:
        data = routing.history_loads(data, str(path))
    loads = from_data({"loads": data}, ExpertLoads, str(path)) if isinstance(data, list) else load(path, ExpertLoads)
    if num_experts is not None and loads.num_experts != num_experts:
        raise InputError(f"{path}: has the loads of {loads.num_experts} experts, but --num-experts says {num_experts}")
    return loads


def read_map(path: Path, num_experts: int, num_devices: int) -> ExpertMap:
    """A map from a `mipipe.expert_map` file or from EPLB's tables (an object with ``physical_to_logical``)."""
    data = _json(path)
    if isinstance(data, dict) and "format" not in data and "physical_to_logical" in data:
        return from_data({"num_experts": num_experts, "num_devices": num_devices,
                          "physical_to_logical": data["physical_to_logical"]}, ExpertMap, str(path))
    return load(path, ExpertMap)


def eplb_tables(placed: ExpertMap) -> dict[str, Any]:
    """``physical_to_logical``, ``logical_to_physical`` (padded with -1) and ``count``, as EPLB returns them."""
    return {"physical_to_logical": [list(row) for row in placed.physical_to_logical],
            "logical_to_physical": placed.logical_to_physical(), "count": placed.counts()}


def _json(path: Path) -> Any:
    return load_json(read_text(path), str(path))
