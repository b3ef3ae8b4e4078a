"""Expert loads from the routing that Megatron Core, vLLM and ADRS record."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mipipe.graphs.errors import InputError
from mipipe.planner.experts.files import read_loads


def line(step: int, layer: int, chosen: list[list[int]], block: str = "decoder", **more: int) -> str:
    return json.dumps({"step": step, "stage": "pre_dispatch", "block": block, "layer": layer, "rank": 0,
                       "num_tokens": len(chosen), "topk": 2, "top_indices": chosen, **more}) + "\n"


def test_a_router_trace_counts_every_ranks_tokens_by_layer(tmp_path: Path) -> None:
    """Two ranks, two steps; the multi-token prediction layer comes last although it shares a number."""
    (tmp_path / "router_trace_rank0.jsonl").write_text(
        line(0, 1, [[0, 1], [0, 2]]) + line(0, 10, [[3, 4]]) + line(0, 1, [[5, 5]], "mtp", mtp_idx=0)
        + line(1, 1, [[0, 1]]))
    (tmp_path / "router_trace_rank1.jsonl").write_text(line(0, 1, [[2, 2]]) + "\n" + line(1, 10, [[4, 0]]))
    loads = read_loads(tmp_path)
    assert loads.loads == ((1.5, 1.0, 1.5, 0.0, 0.0, 0.0), (0.5, 0.0, 0.0, 0.5, 1.0, 0.0),
                           (0.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    assert read_loads(tmp_path / "router_trace_rank0.jsonl", 8).num_experts == 8


@pytest.mark.parametrize("name", ["routes.npy", "routes.npz"])
def test_routed_experts_are_counted_as_numpy_counts(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    prompt, answer = (rng.integers(0, 16, (tokens, 3, 4)).astype(np.int16) for tokens in (50, 20))
    arrays = [prompt] if name.endswith("npy") else [prompt, answer]
    if name.endswith("npy"):
        np.save(tmp_path / name, prompt)
    else:
        np.savez(tmp_path / name, prompt=prompt, answer=answer)
    both = np.concatenate(arrays)
    assert read_loads(tmp_path / name).loads == tuple(
        tuple(np.bincount(both[:, layer].ravel(), minlength=16).astype(float)) for layer in range(3))


def test_a_load_history_is_averaged_over_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "expert-load.json"
    path.write_text(json.dumps({"load_history": [{"logical_expert_load": [[1, 3], [0, 8]]},
                                                 {"logical_expert_load": [[3, 5], [2, 0]]}]}))
    assert read_loads(path).loads == ((2.0, 4.0), (1.0, 4.0))


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "hostile.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(InputError, match="not readable as NumPy's arrays"):
        read_loads(tmp_path / "hostile.npy")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", "", "holds no record"),
    ("a.jsonl", "[1]\n", "line 1: found a list of 1, expected"),
    ("a.jsonl", line(0, 1, [[0, 1]]) + "{\n", "line 2: not readable as JSON"),
    ("a.jsonl", line(0, 1, [[0, -1]]), "sent to expert -1"),
    ("a.jsonl", line(0, 1, [[0, 10**9]]), "sent to expert 1000000000"),
    ("a.jsonl", line(0, 1, [[0, 1], [2]]), "top_indices"),
    ("a.jsonl", line(0, 1, []), "no token is sent to any expert"),
    ("a.jsonl", line(0, 1, [[0, 7]]), "tokens are sent to 8 experts, but --num-experts says 2"),
    ("a.jsonl", '{"step": true, "layer": 1, "top_indices": [[0]]}', "step: found True"),
    ("a.json", '{"load_history": []}', "expected a list of steps"),
    ("a.json", '{"load_history": [{"logical_expert_load": [[1, 2]]}, {"logical_expert_load": [[1]]}]}',
     r"load_history\[1\]"),
    ("a.json", "[[1, 2, 3]]", "--num-experts says 2"),
    ("a.npy", "nothing", "not readable as NumPy's arrays")])
def test_bad_routing_gets_one_clear_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        read_loads(tmp_path / name, 2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("header", ["{'descr': '<i2', 'fortran_order': (", "((((", "{'descr': '<i2'}", "9" * 5000, "\0",
                                    "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1)}",
                                    "{'descr': '<i2', 'fortran_order': False, 'shape': (-1, 1, 1)}",
                                    "{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000, 2, 2)}",
                                    "__import__('os').system('id')", "(" * 3000])
def test_a_damaged_header_is_one_line(tmp_path: Path, header: str) -> None:
    """numpy reads a header as Python's text, with errors of its own for each way in which that fails."""
    raw = header.encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\x00" + len(raw).to_bytes(4, "little") + raw + bytes(8))
    with pytest.raises(InputError, match=r"a\.npy: not readable as NumPy's arrays") as raised:
        read_loads(tmp_path / "a.npy")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("shape", "descr", "message"), [
    ((5, 2000000000000, 0), "<i2", r"found int16 of shape \[5, 2000000000000, 0\], expected the experts of"),
    ((0, 2, 2), "<i2", r"found int16 of shape \[0, 2, 2\], expected the experts of"),
    ((0,), "<i2", r"found int16 of shape \[0\]"),
    ((), "<i2", r"found int16 of shape \[\]"),
    ((2, 1, 1), "<f2", "found float16 of shape"),
    ((2, 1, 1), "|b1", "found bool of shape"),
    ((2, 1, 1), "<U1", "found <U1 of shape"),
    ((2, 1, 1), "<M8[s]", r"found datetime64\[s\] of shape"),
    ((2, 1, 1), [("a", "<i2"), ("b", "<i2")], "of shape"),
    ((1, 70000, 1), "|i1", "with at most 65536 layers"),
    ((1, 1, 1) * 40, "|i1", "not readable as NumPy's arrays"),
    ((1, 2000000000000, 2000000000000), "<i2", "not readable as NumPy's arrays"),
    ((2**62, 4, 1), "<i8", "not readable as NumPy's arrays"),
    ((10**30, 0, 1), "<i8", "not readable as NumPy's arrays"),
    ((-1, -1, 1), "<i2", "not readable as NumPy's arrays"),
    ((0, -5, 1), "<i2", "not readable as NumPy's arrays|found int16"),
    ((True, 1.5, "3"), "<i2", "not readable as NumPy's arrays"),
    ((2, 1, 1), "|O", "not readable as NumPy's arrays"),
    ((2, 1, 1), [("a", "|O")], "not readable as NumPy's arrays"),
    ((2, 1, 1), "|V1000000000000", "not readable as NumPy's arrays")])
def test_a_header_that_says_anything_is_one_line(tmp_path: Path, shape: Any, descr: Any, message: str) -> None:
    """Whatever size and type a header claims, none is believed before it is looked at; in an archive likewise."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    raw = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + bytes(80_000)
    (tmp_path / "a.npy").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("routes.npy", raw)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match=message) as raised:
            read_loads(tmp_path / name)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    """A gigabyte of zeros is a megabyte of file: its size is read from the directory, before anything is unpacked."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("routes.npy", bytes(2_000_000))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    entry = raw.rfind(b"PK\x01\x02")
    raw[entry + 24:entry + 28] = (2**32 - 2).to_bytes(4, "little")  # the unpacked size, as a real bomb says it
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(InputError, match="not readable as NumPy's arrays: 4294967294 bytes unpacked"):
        read_loads(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_experts_of_any_integer_type_are_counted(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "a.npy", np.array([[[0, 2]], [[2, 1]]], dtype=dtype))
    assert read_loads(tmp_path / "a.npy").loads == ((1.0, 1.0, 2.0),)


def test_a_folder_without_a_trace_and_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no router_trace_rank\*.jsonl"):
        read_loads(tmp_path)
    np.save(tmp_path / "flat.npy", np.zeros((4, 2), dtype=int))
    with pytest.raises(InputError, match=r"shape \[4, 2\]"):
        read_loads(tmp_path / "flat.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 2, 1), dtype=int), b=np.zeros((4, 3, 1), dtype=int))
    with pytest.raises(InputError, match="3 layers, but the arrays before have 2"):
        read_loads(tmp_path / "two.npz")
