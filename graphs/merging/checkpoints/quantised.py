"""Quantised checkpoints told from plain ones, so that packed integers are never taken for weights.

Not every program says ``quantization_config``: AutoGPTQ and AutoAWQ write a file of their own, MLX a key of its own,
and some leave only the tensors: packed integers beside scales.
"""

from __future__ import annotations

import re
from pathlib import Path

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles
from mipipe.graphs.merging.checkpoints.tensor_classes import FLOATING, QUANTISED

_KEYS = ("quantization_config", "quantization", "compression_config")
_FILES = ("quantize_config.json", "quant_config.json")
_PACKED = re.compile(r"\.(qweight|qzeros|weight_packed|weight\.absmax|weight\.quant_state\.\w+|SCB)$")
_SCALES = re.compile(r"(\.weight)?[._](scales?|scale_inv|scb|absmax|zeros|zero_point)$", re.IGNORECASE)
_PAIRS = (("W_q", "scale"), ("codes", "codebooks"), ("weight._data", "weight._scale"), ("q_weight", "q_scale"),
          ("B", "s"), ("indices", "centroids.weight"), ("weight_qdata", "weight_scale"))
"""A module's packed integers and what stands beside them: of HQQ, AQLM, quanto, ExLlamaV2, Marlin, VPTQ, torchao."""


def refuse_quantised(label: str, files: CheckpointFiles) -> None:
    """Raise for a quantised model.

    Raises:
        InputError: by its config, by another program's file, or by its tensors.
    """
    reason = _reason(files)
    if reason:
        raise InputError(f"{label}: is quantised ({reason}); merge the dequantised model")


def _reason(files: CheckpointFiles) -> str:
    text = files.config.get("text_config")
    for config in (files.config, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            if config.get(key):
                return f"config.json has {key}"
    for name in _FILES if files.config else ():
        if (Path(files.path) / name).exists():
            return f"it has a {name}; remove that file if it is not"
    packed = next((name for name in files.tensors if _PACKED.search(name)), None)
    if packed:
        return f"tensor {packed} holds packed weights"
    modules = {_SCALES.sub("", name) for name in files.tensors if _SCALES.search(name)}
    for name, tensor in files.tensors.items():
        odd = tensor.dtype not in FLOATING or tensor.dtype in QUANTISED
        if odd and len(tensor.shape) >= 2 and name.removesuffix(".weight") in modules:
            return f"tensor {name} of dtype {tensor.dtype} has scales beside it"
        if odd and tensor.dtype not in (*QUANTISED, "BOOL") and len(tensor.shape) >= 2:
            beside = [f"{name.removesuffix(part)}{other}" for part, other in _PAIRS if name.endswith("." + part)]
            if name.endswith(".weight") or any(other in files.tensors for other in beside):
                return f"tensor {name} holds integers of dtype {tensor.dtype} in place of weights"
    return ""
