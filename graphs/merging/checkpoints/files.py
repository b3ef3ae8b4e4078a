"""What a checkpoint on disk holds: its config and, from the headers alone, every tensor's place in the shards.

No tensor data is read and no torch is needed. Reads Hugging Face folders as transformers does: ``config.json`` and
``model.safetensors``, else the tensors that an index of shards names; LoRA folders (``adapter_config.json``,
``adapter_model.safetensors``). The safetensors format: eight bytes little-endian header length, a JSON header, then
the data.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.merging.checkpoints.hub_cache import model_folder, not_there
from mipipe.graphs.read_files import load_json
from mipipe.graphs.serialize import STRICT, Amount, load_data, read_text

DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "U16": 16,
              "U32": 32, "U64": 64, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64}


MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
PYTORCH = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that torch.save writes."""
COMPARED = 2**20
"""Bytes compared at a time."""
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_NO_MODEL = re.compile(r"consolidated|optimizer|scheduler|adapter|training|rng_state")
"""Names of safetensors files that other programs put beside a model."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, as the format's own library allows."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place: bytes ``[start, stop)`` of a file of the checkpoint. ``dtype`` in safetensors' spelling."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    dtype: str
    shape: tuple[Amount, ...]
    file: str
    start: Amount
    stop: Amount

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """One checkpoint: folder, config, tensors by name. ``fingerprint`` changes when a file does (its header,
    size or time of change).

    ``adapter`` is the LoRA config of an adapter folder, else empty. ``left_out``: lines about files and tensors that
    lie there and are no part of the model. ``file``: the name of the file, where the checkpoint is one file alone.
    """

    path: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    fingerprint: str
    adapter: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    file: str = ""

    @property
    def source(self) -> str:
        """What `read_checkpoint` reads it from."""
        return f"{self.path}/{self.file}" if self.file else self.path

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def require(self, name: str) -> StoredTensor:
        """The tensor of a name, or an `InputError`."""
        if name in self.tensors:
            return self.tensors[name]
        raise InputError(f"{self.source}: has no tensor {name}, which the merge needs")


def read_checkpoint(path: str | Path) -> CheckpointFiles:
    """The files of a checkpoint: a folder, one safetensors file, or a name in the Hugging Face cache.

    Raises:
        InputError: no such folder, no safetensors, a truncated or damaged file, an index that disagrees with a shard.
    """
    folder = model_folder(path)
    if folder.is_file():
        return _one_file(folder)
    if not folder.is_dir():
        raise InputError(not_there(str(path)))
    adapter = _optional(folder / "adapter_config.json")
    files, named = (["adapter_model.safetensors"], None) if adapter else _model_files(folder)
    config = _optional(folder / "config.json")
    if not adapter and not config:
        raise InputError(f"{path}: has no config.json")
    tensors: dict[str, StoredTensor] = {}
    unnamed: dict[str, list[str]] = {}
    seal = hashlib.sha256()
    for file in files:
        found, header = read_header(folder / file)
        status = (folder / file).stat()
        seal.update(f"{file}:{status.st_size}:{status.st_mtime_ns}:".encode() + header)
        for tensor in found:
            if named is not None and named.get(tensor.name) != file:
                unnamed.setdefault(file, []).append(tensor.name)
                continue
            if tensor.name in tensors:
                raise InputError(f"{path}: tensor {tensor.name} is in {tensors[tensor.name].file} and in {file};"
                                 " expected it once")
            tensors[tensor.name] = tensor
    _check_index(folder, named or {}, tensors, unnamed)
    notes = [] if adapter else _left_out(folder, files)
    notes += [f"{folder}: {file}: {len(names)} tensor{'s' if len(names) > 1 else ''} that the index does not name there"
              f" left out, first {names[0]}" for file, names in unnamed.items()]
    return CheckpointFiles(str(folder), config, tensors, seal.hexdigest()[:16], adapter, tuple(notes))


def _one_file(file: Path) -> CheckpointFiles:
    """Any state dict in a safetensors file, without a config."""
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: expected a checkpoint folder, a .safetensors file, or (where the merge is run, not"
                         f" planned) a file of PyTorch ending in {', '.join(PYTORCH)}")
    found, header = read_header(file)
    status = file.stat()
    seal = hashlib.sha256(f"{file.name}:{status.st_size}:{status.st_mtime_ns}:".encode() + header)
    return CheckpointFiles(str(file.parent), {}, {tensor.name: tensor for tensor in found}, seal.hexdigest()[:16],
                           file=file.name)


def _optional(path: Path) -> dict[str, Any]:
    """The data of a JSON file of another program; empty where there is none."""
    return load_data(path, foreign=True) if path.exists() else {}


def _model_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files that are the model, and its index where that decides.

    As transformers: ``model.safetensors`` if there is one, else what the index names. With neither: numbered shards, or
    whatever does not look like something else.
    """
    index = folder / INDEX
    present = sorted(file.name for file in folder.glob("*.safetensors"))
    if MODEL in present:
        return [MODEL], None
    if index.exists():
        named = read_index(index)
        names = sorted(set(named.values()))
    else:
        named = None
        names = ([name for name in present if _SHARD.fullmatch(name)]
                 or [name for name in present if not _NO_MODEL.match(name)] or present)
    if not names:
        other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = f"; found {other[0]}: save the model again as safetensors" if other else ""
        raise InputError(f"{folder}: has no .safetensors file{hint}")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(f"{folder}: the index names {missing[0]}, which is not there")
    return names, named


def _left_out(folder: Path, files: Sequence[str]) -> list[str]:
    """A line about the safetensors files that lie beside the model."""
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in files)
    if not others:
        return []
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return [f"{folder}: the model is {files[0] if len(files) == 1 else f'{len(files)} shards'}; left out:"
            f" {', '.join(others[:3])}{more}"]


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index of shards.

    Raises:
        InputError: no such mapping, or a name that leads out of the checkpoint's folder.
    """
    found = load_data(index, foreign=True).get("weight_map", {})
    if not isinstance(found, dict):
        raise InputError(f"{index}: weight_map is a {type(found).__name__}, expected a mapping of tensors to files")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: {shown(name)} is said to be in {shown(file)}, expected the name of a"
                             " .safetensors file in the same folder")
    return found


def _check_index(folder: Path, named: Mapping[str, str], tensors: Mapping[str, StoredTensor],
                 unnamed: Mapping[str, Sequence[str]]) -> None:
    for name, file in named.items():
        if name not in tensors:
            holders = [other for other, names in unnamed.items() if name in names]
            raise InputError(f"{folder / INDEX}: says {shown(name)} is in {file}, but"
                             f" {holders[0] if holders else 'no shard'} holds it")


def read_header(file: Path) -> tuple[list[StoredTensor], bytes]:
    """The tensors a safetensors file says it holds, and its raw header; checks sizes against the file's.

    Raises:
        InputError: unreadable, no safetensors, truncated, a tensor given twice, or offsets that do not fit the shapes,
            overlap or leave gaps.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else 0
            raw = stream.read(length) if 2 <= length <= min(size - 8, MAX_HEADER) else b""
        header = load_json(raw.decode("utf-8"), f"{file}: header", foreign=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (InputError, UnicodeDecodeError) as error:
        told = f": {error}" if "twice" in str(error) else ""
        raise InputError(f"{file}: no safetensors file, or truncated within its header ({size} bytes){told}") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: no safetensors file: its header is a {type(header).__name__}")
    tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda item: (item.start, item.stop)):
        if tensor.start != end:
            problem = "overlap" if tensor.start < end else "leave a gap"
            raise InputError(f"{file}: damaged: its tensors {problem} at {shown(tensor.name)}, which starts at byte"
                             f" {tensor.start}; expected {end}")
        end = tensor.stop
    if end != size:
        problem = "truncated" if size < end else "damaged"
        raise InputError(f"{file}: {problem}: has {size} bytes, its header describes {end}")
    return tensors, raw


def _stored(file: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    """One entry of a header; the data begin at byte ``begin`` of the file."""
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = isinstance(dtype, str) and len(offsets) == 2 and len(shape) <= 64 and \
            all(type(item) is int and 0 <= item < 2**62 for item in (*shape, *offsets))
    except (KeyError, TypeError):
        good = False
    if not good:
        raise InputError(f"{file}: tensor {shown(name)} has no valid dtype, shape and data_offsets")
    if dtype not in DTYPE_BITS:
        raise InputError(f"{file}: tensor {shown(name)} has dtype {shown(dtype)}, which this version does not know")
    start, stop = offsets
    if (stop - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise InputError(f"{file}: tensor {shown(name)} of shape {list(shape)} and dtype {dtype} has {stop - start}"
                         " bytes")
    return StoredTensor(name, dtype, tuple(shape), file.name, begin + start, begin + stop)


def licence_of(path: str) -> str:
    """The licence a model's card states in its front matter, or ``unknown``."""
    card = Path(path) / "README.md"
    if not card.exists():
        return "unknown"
    lines = read_text(card).splitlines()
    if not lines or lines[0].strip() != "---":
        return "unknown"
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip() or "unknown"
    return "unknown"


def same_bytes(folder: str, first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors of a checkpoint hold the same values; reads until the first difference.

    Raises:
        InputError: a file cannot be read.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    try:
        with (Path(folder) / first.file).open("rb") as one, (Path(folder) / second.file).open("rb") as two:
            for start in range(0, first.num_bytes, COMPARED):
                size = min(COMPARED, first.num_bytes - start)
                one.seek(first.start + start)
                two.seek(second.start + start)
                if one.read(size) != two.read(size):
                    return False
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    return True
