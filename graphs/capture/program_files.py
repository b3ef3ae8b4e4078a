"""Opening a program saved by ``torch.export.save`` without running what it holds.

torch's own loader falls back to unpickling where a file's tensors do not load as such, walks over attributes of
``torch`` for an operator's name, and evaluates the text of symbolic sizes. Here the archive is read first: operators
are torch's, sizes are arithmetic, and pickles are loaded as tensors alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.models.silence import silence
from mipipe.graphs.read_files import MAX_BYTES, load_json

_TARGET = re.compile(r"torch\.ops\.(aten|prims|mipipe|higher_order|[a-z]\w*)\.[A-Za-z_]\w*(\.[A-Za-z_]\w*)?"
                     r"|_operator\.(?!attrgetter|methodcaller)[a-z]\w*|math\.[a-z]\w*|torch\.(_)?sym_\w+", re.ASCII)
_NOT = re.compile(r"torch\.ops\.(import_module|load_library|loaded_libraries)\b|.*__")
_SIZE = re.compile(r"[A-Za-z0-9_+\-*/(), .<>=!&|~%]*", re.ASCII)
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z_]|__")


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """A program saved by ``torch.export.save``.

    Raises:
        InputError: no such file, not such a program, or one that holds more than operators, sizes and tensors.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [item for item in archive.infolist() if item.filename.endswith(".json")]
            if sum(item.file_size for item in entries) > MAX_BYTES:
                raise InputError(f"{path}: its description has more than {MAX_BYTES // 2**20} MiB")
            for item in entries:
                text = archive.read(item).decode("utf-8")
                _check(load_json(text, f"{path}: {shown(item.filename, quoted=False)}", foreign=True), str(path))
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, RuntimeError) as error:
        # zipfile's for an entry that is encrypted (RuntimeError) or compressed in a way it does not know (its subclass
        # NotImplementedError)
        raise _no_program(path, error) from None
    try:
        with silence(), _tensors_alone():
            return torch.export.load(path)  # runs no code of the file: operators and sizes were checked above, and
            # pickles in it become tensors and plain data, or end in an error
    except Exception as error:
        raise _no_program(path, error) from None


def _no_program(path: str | Path, error: Exception) -> InputError:
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return InputError(f"{path}: not a program saved by torch.export.save with this torch: {line[:200]}")


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """Inside: torch.load makes tensors and plain data, also where its caller asks for more."""
    name, kept = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if kept is None:
            del os.environ[name]
        else:
            os.environ[name] = kept


def _check(data: Any, where: str) -> None:
    """Raise `InputError` unless all operators and sizes that a description names are such."""
    pending = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        if not isinstance(item, dict):
            continue
        pending.extend(item.values())
        target, size = item.get("target"), item.get("expr_str")
        if "inputs" in item and isinstance(target, str) and (not _TARGET.fullmatch(target) or _NOT.match(target)):
            raise InputError(f"{where}: names the operator {shown(target)}, expected one of torch's, such as"
                             " torch.ops.aten.add.Tensor")
        if isinstance(size, str) and (not _SIZE.fullmatch(size) or _ATTRIBUTE.search(size)):
            raise InputError(f"{where}: has the size {shown(size)}, expected arithmetic of symbols and numbers")
