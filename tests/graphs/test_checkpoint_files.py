"""Safetensors headers that lie: shapes, offsets, duplicates; each is one line, and no data is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import read_header

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        "c": {"dtype": "F32", "shape": [0, 5], "data_offsets": [24, 24]}}
SIZE = 24


def file_of(folder: Path, header: str, size: int = SIZE, length: int | None = None) -> Path:
    raw = header.encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(size))
    return path


def changed(name: str, **changes: Any) -> str:
    return json.dumps({**GOOD, name: {**GOOD[name], **changes}})


def test_a_good_file(tmp_path: Path) -> None:
    found, _ = read_header(file_of(tmp_path, json.dumps({"__metadata__": {"format": "pt"}, **GOOD})))
    assert [(item.name, item.shape, item.stop - item.start) for item in found] == [
        ("a", (2, 2), 16), ("b", (4,), 8), ("c", (0, 5), 0)]


LIES = [
    (changed("a", shape=[-2, -2]), "no valid dtype, shape"),
    (changed("a", shape=[2.0, 2]), "no valid dtype, shape"),
    (changed("a", shape=[True, 4]), "no valid dtype, shape"),
    (changed("a", shape=["2", 2]), "no valid dtype, shape"),
    (changed("a", shape=[2**70]), "no valid dtype, shape"),
    (changed("a", shape=[1] * 1000), "no valid dtype, shape"),
    (changed("a", shape=7), "no valid dtype, shape"),
    (changed("a", shape=[2, 3]), "has 16 bytes"),
    (changed("a", dtype="F33"), "dtype 'F33'"),
    (changed("a", dtype=["F32"]), "no valid dtype, shape"),
    (changed("a", data_offsets=[-16, 0]), "no valid dtype, shape"),
    (changed("a", data_offsets=[16, 0]), "has -16 bytes"),
    (changed("a", data_offsets=[0]), "no valid dtype, shape"),
    (changed("a", data_offsets=[0, 16, 32]), "no valid dtype, shape"),
    (changed("b", data_offsets=[8, 16]), "overlap at 'b'"),
    (changed("b", data_offsets=[20, 28]), "leave a gap at"),
    (changed("b", data_offsets=[2**40, 2**40 + 8]), "leave a gap at"),
    (json.dumps({**GOOD, "d": GOOD["a"]}), "overlap"),
    (json.dumps({"a": 5}), "no valid dtype, shape"),
    (json.dumps({"a": None}), "no valid dtype, shape"),
    (json.dumps([1]), "its header is a list"),
    ('{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "a": {"dtype": "BF16", "shape": [4],'
     ' "data_offsets": [16, 24]}}', "'a' is given twice"),
    ('{"a": ' + "[" * 100_000 + "}", "no safetensors file"),
    ("{}", "damaged: has"),
    ("", "no safetensors file"),
]


@pytest.mark.parametrize(("header", "words"), LIES, ids=lambda text: text[:30])
def test_a_header_that_lies(tmp_path: Path, header: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_header(file_of(tmp_path, header))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**9])
def test_a_length_that_lies(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match="no safetensors file, or truncated"):
        read_header(file_of(tmp_path, json.dumps(GOOD), length=length))


@pytest.mark.parametrize("size", [0, 23, 25, 1000])
def test_a_size_that_lies(tmp_path: Path, size: int) -> None:
    with pytest.raises(InputError, match=r"truncated|damaged"):
        read_header(file_of(tmp_path, json.dumps(GOOD), size=size))
