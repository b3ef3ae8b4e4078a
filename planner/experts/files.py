"""Reading and writing expert loads and maps in mipipe's form and in EPLB's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mipipe.graphs.read_files import load_json
from mipipe.graphs.serialize import from_data, load, read_text
from mipipe.planner.experts.maps import ExpertLoads, ExpertMap


def read_loads(path: Path) -> ExpertLoads:
    """Loads from a `mipipe.expert_loads` file or from a bare list ``[layers][experts]``, EPLB's ``weight``."""
    data = _json(path)
    if isinstance(data, list):
        return from_data({"loads": data}, ExpertLoads, str(path))
    return load(path, ExpertLoads)


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
