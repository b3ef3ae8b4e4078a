"""Writing what a conversion makes: units in order, each computed alone, into a folder that appears when it is whole.

The shapes of all tensors are known before a byte is computed, so the shards are laid out first (as those of a merge)
and filled in place; what an interrupted conversion had finished is kept.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mipipe.graphs.merging.checkpoints.files import DTYPE_BITS, StoredTensor
from mipipe.graphs.merging.layout import index_json, lay_out
from mipipe.graphs.models import mipipe_moe
from mipipe.graphs.serialize import write_text
from mipipe.runtime.convert.source import Source
from mipipe.runtime.merge.output.card import COPIED
from mipipe.runtime.merge.output.verify import verify_output
from mipipe.runtime.weights.writer import Writer, finished, prepare, publish_folder

RECORD = "mipipe_convert.json"
CODE = "modeling_mipipe_moe.py"
OUT_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written; see `mipipe.graphs.merging.layout.Writable`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def write_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Unit:
    """Tensors that are computed together, and the figures that go into the record."""

    pieces: tuple[OutputTensor, ...]
    make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]


@dataclass(frozen=True)
class Conversion:
    """A conversion that is decided: config and units of the result.

    ``figures``: what is known already. ``describe``: one line from all figures, for people.
    """

    config: dict[str, Any]
    units: tuple[Unit, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    code: bool = True
    describe: Callable[[Mapping[str, Any]], str] = lambda figures: ""


def copied(source: Source, left_out: Callable[[str], bool], renamed: Callable[[str], str] = lambda name: name,
           out_dtype: str | None = None) -> Iterator[Unit]:
    """Units of the source's other tensors, as they are but for the name (and a floating dtype, if one is asked for)."""
    for name, tensor in sorted(source.files.tensors.items()):
        if not left_out(name):
            piece = OutputTensor(renamed(name), written_dtype(tensor, out_dtype), tensor.shape)
            yield Unit((piece,), functools.partial(_copy, source, tensor, piece.name))


def _copy(source: Source, tensor: StoredTensor, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {name: source.read_as_stored(tensor)}, {}


def written_dtype(tensor: StoredTensor, out_dtype: str | None) -> str:
    floating = tensor.dtype in OUT_DTYPES.values()
    return OUT_DTYPES[out_dtype] if out_dtype and floating else tensor.dtype


def converted_config(source: Source, settings: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The source's config for the class with converted experts, whose code lies beside it."""
    part = {kind: name for name, kind in mipipe_moe.HOSTS.items()}[source.host]
    module = CODE.removesuffix(".py")  # for transformers without mipipe, where its user says trust_remote_code=True
    model = f"Mipipe{part}ForCausalLM"
    return {**source.files.config, **changes, "model_type": f"mipipe_{source.host}", "architectures": [model],
            "auto_map": {"AutoConfig": f"{module}.Mipipe{part}Config", "AutoModelForCausalLM": f"{module}.{model}"},
            "mipipe_moe": dict(settings)}


def write_conversion(conversion: Conversion, source: Source, out: Path, recipe: Mapping[str, Any], job: str,
                     shard_bytes: int, progress: Callable[[int, int], None] | None = None,
                     verify: bool = True) -> dict[str, Any]:
    """Compute, write and publish; returns the record that is in the folder.

    Raises:
        InputError: the folder exists, or holds another unfinished conversion.
        RunError: no space, or a result that its config's class would not load.
    """
    pieces = [piece for unit in conversion.units for piece in unit.pieces]
    shards = lay_out(pieces, shard_bytes)
    folder = prepare(out, shards, job)
    ready, done, total = finished(folder), 0, sum(piece.write_bytes for piece in pieces)
    figures: dict[str, Any] = dict(conversion.figures)
    notes = folder / "figures.json"
    layers: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {}
    writer = Writer(folder, shards, 0)
    try:
        for unit in conversion.units:
            if not all(piece.name in ready for piece in unit.pieces):
                made, found = unit.make()
                for piece in unit.pieces:
                    writer.write(piece.name, 0, made[piece.name])
                if found:
                    layers.update(found)
                    write_text(notes, json.dumps(layers))
                for piece in unit.pieces:
                    writer.finish(piece.name)
            done += sum(piece.write_bytes for piece in unit.pieces)
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()
    notes.unlink(missing_ok=True)
    if layers:
        figures["layers"] = layers
    before = source.files.num_bytes
    record = {"recipe": dict(recipe), "source_bytes": before, "bytes": total, **figures}
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    write_text(folder / "config.json", json.dumps(conversion.config, indent=2) + "\n")
    if len(shards) > 1:
        write_text(folder / "model.safetensors.index.json", index_json(shards))
    for name in COPIED:
        if (Path(source.files.path) / name).exists():
            shutil.copyfile(Path(source.files.path) / name, folder / name)
    if conversion.code:  # this installation's own file; what lay in the source's folder is neither copied nor run
        shutil.copyfile(mipipe_moe.__file__, folder / CODE)
    write_text(folder / "README.md", _card(folder.name.removesuffix(".partial"), recipe, source, conversion, record))
    if verify:
        verify_output(folder)
    publish_folder(folder, out, shards)
    return record


def _card(name: str, recipe: Mapping[str, Any], source: Source, conversion: Conversion,
          record: Mapping[str, Any]) -> str:
    """The README: where it comes from, how it was made, how it is loaded."""
    import yaml

    given = {key: value for key, value in recipe.items() if value is not None}
    trust = ", trust_remote_code=True" if conversion.code else ""
    licence = source.licence
    front = {"base_model": [recipe["model"]], "library_name": "transformers", "tags": ["mipipe", "moe"],
             "license": licence if licence != "unknown" else "other"}
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

Converted by mipipe from {recipe["model"]} (licence {licence}, fingerprint `{source.files.fingerprint}`).
{conversion.describe(record)}

```yaml
{yaml.safe_dump(given, sort_keys=False).strip()}
```

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
```
"""
