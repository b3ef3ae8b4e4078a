"""What a command writes is no other file that it writes, and none that it reads: for every verb and option."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import pytest

from mipipe.cli.main import VERBS

READS: dict[str, tuple[str, ...]] = {
    "capture": ("SOURCE", "--loads", "--config", "--tags"),
    "profile": ("GRAPH", "--cluster"),
    "plan": ("GRAPH", "--cluster", "--costs", "--experts", "--sizes", "--layer-times"),
    "place": ("FILE", "--cluster", "--costs"),
    "simulate": ("PLAN",),
    "show": ("FILE",),
    "compare": ("--problem",),
    "export": ("FILE",),
    "calibrate": ("TIMELINE", "--plan", "--costs", "--cluster"),
    "merge": ("RECIPE",),
    "tune": ("RECIPE", "--perplexity"),
    "experts": ("--loads", "--cluster", "--current"),
}
"""What verbs read, arguments in capitals."""
WRITES: dict[str, tuple[str, ...]] = {
    "capture": ("--output",), "profile": ("--output",), "place": ("--output",), "compare": ("--html",),
    "plan": ("--output", "--save-graph", "--html", "--trace"),
    "simulate": ("--output", "--program", "--html", "--trace"), "show": ("--html", "--trace"),
    "export": ("--csv", "--megatron", "--bridge", "--torchtitan", "--trace", "--html"),
    "calibrate": ("--output", "--replan"), "merge": ("--timeline",), "tune": ("--html",),
    "experts": ("--output", "--eplb")}
FOLDERS = {"merge": ("--output",), "convert": ("RECIPE", "--output"), "tune": ("--output",)}
ONLY_READ = {"check": ("PLAN", "--program", "--graph"), "evaluate": ("MODELS",),
             "train": ("--plan", "--graph", "--config")}
"""Files that `mipipe train` writes are named in its configuration."""
TEXTS = {("capture", "SOURCE"), ("plan", "GRAPH"), ("plan", "--layer-times"), ("calibrate", "TIMELINE")}
"""Files whose option takes other names, too."""
NEEDED = {"capture": ("--output",), "profile": ("--output",), "merge": ("--output",), "tune": ("--output",),
          "experts": ("--loads", "--cluster")}


def test_every_file_of_every_verb_is_in_the_tables():
    for module in VERBS:
        verb = module.__name__.rpartition(".")[2]
        known = [name for table in (READS, WRITES, FOLDERS, ONLY_READ) for name in table.get(verb, ())]
        files = [name for name, item in inspect.signature(getattr(module, verb)).parameters.items()
                 if str(item.annotation) in ("Html", "Trace") or "Path" in str(item.annotation)]
        assert len(files) == len(set(known) - {name for at, name in TEXTS if at == verb and name != "TIMELINE"}), verb


def command(verb: str, files: dict[str, str]) -> list[str]:
    """A command line with files in options; arguments and needed options that are none of them get their own."""
    arguments = [name for name in (*READS[verb], *FOLDERS.get(verb, ())) if name.isupper()]
    files = dict.fromkeys(arguments, "other.json") | {
        name: f"needed{number}" for number, name in enumerate(NEEDED.get(verb, ()))} | files
    return [verb, *(files[name] for name in arguments),
            *(part for name, path in files.items() if name not in arguments for part in (name, path))]


@pytest.mark.parametrize(("verb", "read", "written"), [
    (verb, read, written) for verb in READS for read in READS[verb] for written in WRITES[verb]])
def test_nothing_that_is_read_is_written(mipipe, tmp_path, monkeypatch, verb, read, written) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lt.json").write_text("kept")
    (tmp_path / "same").symlink_to("lt.json")
    ended = mipipe(*command(verb, {read: "lt.json", written: "same"}))
    assert ended.code == 1 and f"{written} same is also read: give what is written a name of its own" in ended.error
    assert sorted(item.name for item in tmp_path.iterdir()) == ["lt.json", "same"]
    assert (tmp_path / "lt.json").read_text() == "kept"


@pytest.mark.parametrize(("verb", "one", "other"), [
    (verb, *pair) for verb in READS for pair in itertools.combinations(WRITES[verb], 2)])
def test_nothing_is_written_twice(mipipe, tmp_path, monkeypatch, verb, one, other) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    ended = mipipe(*command(verb, {one: "out.x", other: "./out.x"}))
    assert ended.code == 1 and "both write" in ended.error and one in ended.error and other in ended.error
    assert [item.name for item in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize("options", ["--torchtitan x.csv", "--megatron q.csv --torchtitan q.json",
                                     "--csv r.csv --torchtitan r.json"])
def test_the_order_beside_torchtitans_fields_is_a_file_too(mipipe, folder: Path, tmp_path, monkeypatch,
                                                           options) -> None:
    monkeypatch.chdir(tmp_path)
    ended = mipipe("export", folder / "plan.json", *options.split())
    assert ended.code == 1 and "torchtitan's order both write" in ended.error and not list(tmp_path.iterdir())


def test_an_export_that_is_refused_in_part_writes_nothing(mipipe, folder: Path, tmp_path) -> None:
    ended = mipipe("export", folder / "plan.json", "--csv", tmp_path / "a.csv", "--megatron", tmp_path / "b.txt")
    assert ended.code == 1 and "has no degrees to export to Megatron-LM" in ended.error
    assert not list(tmp_path.iterdir())
