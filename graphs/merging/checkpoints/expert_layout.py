"""Experts stored one by one and experts stored as banks, read alike: a bank's rows are where single tensors' would be.

transformers has saved the same model as ``experts.3.gate_proj.weight`` (Mixtral: ``experts.3.w1.weight``) and as
``experts.gate_up_proj`` ``[experts, 2 inner, hidden]`` with ``experts.down_proj`` ``[experts, hidden, inner]``, whose
rows lie in the file expert by expert. It loads both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mipipe.graphs.merging.checkpoints.files import DTYPE_BITS, StoredTensor

_BANK = re.compile(r"^(.*)\.experts\.(gate_up_proj|down_proj)$")
_SINGLE = re.compile(r"^(.*)\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def is_single(tensors: Iterable[str]) -> bool:
    """Whether a model has experts stored one by one."""
    return any(_SINGLE.match(name) for name in tensors)


def has_banks(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a model has experts stored as banks that can be told apart."""
    return any(_sizes(tensors, match[1]) for name in tensors if (match := _BANK.match(name)))


def _sizes(tensors: Mapping[str, StoredTensor], block: str) -> tuple[int, int, int] | None:
    """Experts, inner and hidden size of a block's banks; None where they are laid out otherwise."""
    joined, down = (tensors.get(f"{block}.experts.{part}") for part in ("gate_up_proj", "down_proj"))
    if joined is None or down is None or len(joined.shape) != 3 or len(down.shape) != 3:
        return None
    experts, rows, hidden = joined.shape
    fits = down.shape == (experts, hidden, rows // 2) and rows % 2 == 0
    return (experts, rows // 2, hidden) if fits else None


def as_single(tensors: Mapping[str, StoredTensor], like: Iterable[str]) -> dict[str, StoredTensor]:
    """The tensors with every bank as single experts, named as in ``like`` (another model's names)."""
    names = list(like)
    mixtral = any(name.endswith(".w1.weight") for name in names if _SINGLE.match(name))
    block_name = next((match[1].rsplit(".", 1)[1] for name in names if (match := _SINGLE.match(name))), "mlp")
    found: dict[str, StoredTensor] = {}
    blocks = {match[1] for name in tensors if (match := _BANK.match(name)) and _sizes(tensors, match[1])}
    renamed = {block: f"{block.rsplit('.', 1)[0]}.{block_name}" for block in blocks}
    for name, tensor in tensors.items():
        match = _BANK.match(name)
        block = next((item for item in blocks if name.startswith(item + ".")), None)
        if match is None or block is None:
            found[name if block is None else renamed[block] + name[len(block):]] = tensor
            continue
        sizes = _sizes(tensors, block)
        assert sizes is not None
        experts, inner, hidden = sizes
        parts = (("gate_proj", inner, hidden), ("up_proj", inner, hidden)) if match[2] == "gate_up_proj" else \
            (("down_proj", hidden, inner),)
        place = tensor.start
        for expert in range(experts):
            for part, rows, columns in parts:
                size = rows * columns * DTYPE_BITS[tensor.dtype] // 8
                own = f"{renamed[block]}.experts.{expert}.{_MIXTRAL[part] if mixtral else part}.weight"
                found[own] = StoredTensor(own, tensor.dtype, (rows, columns), tensor.file, place, place + size)
                place += size
    return found
