"""Reading any file takes bounded work and gives plain data or one line."""

from __future__ import annotations

import io
import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mipipe.graphs import read_files
from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.read_files import MAX_DEPTH, load_json, load_yaml, read_bytes, read_text
from mipipe.graphs.serialize import load_data

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a: &a {" + ", ".join(f"k{n}: 1" for n in range(300)) + "}\nb: {<<: [" + ", ".join(["*a"] * 1000) + "]}\n"



def refuses(read: Callable[[str, str], object], text: str, words: str) -> None:
    """One short line that names the file and says what is wrong."""
    with pytest.raises(InputError) as caught:
        read(text, "some file")
    message = str(caught.value)
    assert message.startswith("some file") and words in message
    assert "\n" not in message and len(message) < 400


JSON = [
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
    ('{"a": {"b": 1, "b": 1}}', "the key 'b' is given twice"),
    ('{"a": NaN}', "a: found nan, expected a finite number"),
    ('{"a": [1, -Infinity]}', "found -inf"),
    ('{"a": 1e999}', "found inf"),
    ('{"a": 99999999999999999999999}', "at most 64 bits"),
    ('{"a": ' + "9" * 5000 + "}", "not readable as JSON"),
    ("[" * (MAX_DEPTH + 5) + "]" * (MAX_DEPTH + 5), "nested more than"),
    ("[" * 200_000 + "]" * 200_000, "nested more than"),
    ('{"a":' * 200_000, "nested more than"),
    ('{"a": "\\ud800"}', "control characters"),
    ('{"a": "\\u001b[31m"}', "control characters"),
    ('{"\\u001b": 1}', "found the key"),
    ("", "not readable as JSON"),
    ("{", "not readable as JSON"),
]


@pytest.mark.parametrize(("text", "words"), JSON, ids=lambda text: text[:20])
def test_json(text: str, words: str) -> None:
    refuses(load_json, text, words)


def test_another_programs_json_keeps_its_numbers() -> None:
    found = load_json('{"a": Infinity, "b": 1000000000000000019884624838656}', "config.json", foreign=True)
    assert found == {"a": float("inf"), "b": 1000000000000000019884624838656}


YAML = [
    (BOMB, "aliases stand for more than"),
    (MERGES, "merges (<<) of more than"),
    ("a: &a [*a]", "nested more than"),
    ("a: &a {<<: *a}", "nested more than"),
    ("[" * 5000, "nested more than"),
    ("- " * 20_000 + "x", "nested more than"),
    ("a: 1\na: 2", "line 2: not readable as YAML: the key 'a' is given twice"),
    ("a: .nan", "found nan"),
    ("a: .inf", "found inf"),
    ("a: !!int x", "not readable as YAML"),
    ("a: !!float x", "not readable as YAML"),
    ("a: !!timestamp x", "not readable as YAML"),
    ("a: !!binary x", "not readable as YAML"),
    ("a: !!set {x}", "found a set"),
    ("a: !!python/object/apply:os.system [id]", "not readable as YAML"),
    ("? [a]\n: b", "not readable as YAML"),
    ("? !!null\n: b", "found the key None"),
    ("a: " + "9" * 5000, "not readable as YAML"),
    ("a: !!int 1:" + "9:" * 3000 + "9", "64 bits"),
    ("a: \x01", "not readable as YAML"),
    ("x" * (8 * 2**20 + 1), "characters of YAML"),
]


@pytest.mark.parametrize(("text", "words"), YAML, ids=lambda text: text[:20])
def test_yaml(text: str, words: str) -> None:
    refuses(load_yaml, text, words)


def test_yaml_that_people_write() -> None:
    text = "base: &b {x: 1, y: 2}\none: {<<: *b, y: 3}\nday: 2001-01-01\n500: later.json\nlist: [*b, *b]\n"
    assert load_yaml(text, "f") == [{"base": {"x": 1, "y": 2}, "one": {"x": 1, "y": 3}, "day": "2001-01-01",
                                     500: "later.json", "list": [{"x": 1, "y": 2}] * 2}]


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "none", "No such file"), ("/dev/zero", "a device"),
                        ("a\0b", "null")):
        with pytest.raises(InputError, match=words):
            read_text(path)
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a text file"):
        read_text(tmp_path / "latin")


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe.json").write_text(json.dumps({"a": "x" * 200_000})))
    writer.start()
    assert load_data(tmp_path / "pipe.json") == {"a": "x" * 200_000}
    writer.join()


def test_a_pipe_without_a_writer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mipipe.graphs.read_files.PIPE_S", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"said nothing|not readable"):
        load_json(read_text(tmp_path / "pipe"), "pipe")


@pytest.mark.parametrize("value", ["x" * 10_000, "a\nb\x1b[0m", "\ud800", 10**5000, [1] * 1000, {"a": "b" * 1000},
                                   1e308, "\u202ex", None],
                         ids=lambda value: type(value).__name__)
def test_what_is_echoed_is_one_short_line(value: object) -> None:
    for quoted in (True, False):
        text = shown(value, quoted)
        assert len(text) <= 110 and "\n" not in text and "\x1b" not in text
        text.encode()


def test_reading_takes_the_memory_of_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the most that there may be: 1 GiB for every file is refused on small machines. And to the end, however
    little a file system gives at a time."""
    (tmp_path / "file").write_bytes(b"x" * 300_000)
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "file") == b"x" * 300_000
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()

    class Slow(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(7000, 7000 if size is None else size))

    with Slow(str(tmp_path / "file")) as stream:
        assert len(read_files._read_file(stream)) == 300_000
    monkeypatch.setattr(read_files, "MAX_BYTES", 100_000)
    with pytest.raises(InputError, match="has more than"):
        read_bytes(tmp_path / "file")
