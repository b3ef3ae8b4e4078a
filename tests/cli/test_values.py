"""Values that make no sense, in every kind of file: one line that says where, never a traceback."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mipipe.graphs.serialize import to_data
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap
from mipipe.planner.timeline import Span, Timeline

TIMELINE = Timeline("measured", 2, (Span(0, Stream.COMPUTE, ActionKind.F, "0F0", 0, 10, 0, 0),
                                    Span(1, Stream.COMPUTE, ActionKind.F, "1F0", 12, 20, 1, 0, peer=0)),
                    memory=(((0, 5),), ((0, 5),)), resident_bytes=(5, 5))


def put(data: Any, place: str, value: Any) -> Any:
    """The data with one place (``groups.0.name``) changed."""
    made = copy.deepcopy(data)
    item = made
    *path, last = place.split(".")
    for key in path:
        item = item[int(key)] if isinstance(item, list) else item[key]
    item[int(last) if isinstance(item, list) else last] = value
    return made


PROBLEM = [
    ("groups.0.resident_bytes", -1, "groups[0].resident_bytes: expected at least 0 (found -1)"),
    ("groups.0.saved_fw_bytes", -5, "expected at least 0"), ("groups.0.workspace_bytes", 2**63, "expected at most"),
    ("groups.0.gradient_bytes", 1.5, "gradient_bytes"), ("groups.0.times.device.f_ns", -1, "f_ns"),
    ("groups.0.times.device.f_ns", 2**61, "which no clock counts"), ("groups.0.loads", [-1] * 8, "load below 0"),
    ("groups.0.loads", [1e300] * 8, "load below 0"), ("groups.0.loads", ["nan"] * 8, "loads"),
    ("overlap.numerator", 0, "overlap.numerator: expected at least 1"),
    ("overlap.numerator", -3, "expected at least 1"), ("overlap.denominator", 0, "overlap.denominator: expected"),
    ("unit_ns", 0, "unit_ns: expected at least 1"), ("unit_ns", -1, "unit_ns"),
    ("num_microbatches", 0, "expected at least 1"), ("num_microbatches", 10**9, "at most"),
    ("topology.within_host.latency_ns", 4 * 10**18, "transfers add up to"),
    ("topology.overrides", {"0->1": {"latency_ns": 2**61}}, "transfers add up to"),
    ("topology.within_host", {"bytes_per_s": 1, "latency_ns": 2**60}, "transfers add up to"),
    ("groups.0.saved_fw_bytes", 2**62, "microbatches keep adds up to"),
    ("groups.0.workspace_bytes", 2**62, "microbatches keep adds up to"),
    ("edges.0.num_bytes", 2**62, "microbatches keep adds up to"), ("overlap.numerator", 2**31, ""),
    ("colocate", [[]], "a set without groups"),
    ("edges.0.num_bytes", -1, "edges[0].num_bytes"), ("edges.0.grad_bytes", -1, "edges[0].grad_bytes"),
    ("edges.0.source", -1, "names a group beyond"), ("edges.0.targets", [99], "names a group beyond"),
    ("colocate", [[0, 99]], "colocate names group 99"), ("limits.activation_bytes", -1, "activation_bytes"),
    ("name", "x\x1b[31m", "control characters"), ("name", "\ud800", "control characters"), ("name", 5, "expected text"),
    ("groups.0.name", ["x" * 9000], "expected text"), ("graph_digest", "x" * 9000, ""), ("groups", [], "no groups"),
    ("groups.0.name", "layer1", "two groups are named 'layer1'"),
]


@pytest.mark.parametrize(("place", "value", "words"), PROBLEM, ids=lambda item: str(item)[:30])
def test_problems(mipipe, folder: Path, tmp_path: Path, place: str, value: Any, words: str) -> None:
    data = put(json.loads((folder / "problem.json").read_text()), place, value)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    ended = mipipe("plan", tmp_path / "bad.json", "--time-limit", 0.3)
    if not words:  # odd, but no error: nothing is known of the graph
        assert ended.code == 0, ended.stderr
        return
    assert ended.code == 1 and words in ended.error, ended.error
    assert "\n" not in ended.error and len(ended.error) < 600
    assert ended.error.startswith(str(tmp_path / "bad.json"))


OPTIONS = [(1, "--ranks", 10**9, "expected at least 1 and at most"), (1, "--microbatches", 10**9, "at most 65536"),
           (1, "--layers", 10**9, "at most"), (1, "--comm", "1e300", "transfers add up to"),
           (1, "--comm", "123456789012345678", "no clock counts"), (1, "--f", "1e300", "no clock counts"),
           (1, "--fb", "0", "above 0"), (1, "--fb", "1e-9", "at least 1/1,000,000"),
           (1, "--fb", "1e300", "near F + I + W"),
           (1, "--f", "nan", "expected a number"), (1, "--copies", "inf", "expected a number"),
           (2, "--seed", -1, "--seed"), (2, "--seed", 2**31, "--seed"), (2, "--time-limit", "inf", "--time-limit"),
           (2, "--time-limit", "1e400", "--time-limit"), (2, "--time-limit", "nan", "--time-limit")]


@pytest.mark.parametrize(("code", "option", "value", "words"), OPTIONS, ids=lambda item: str(item)[:20])
def test_options_of_compare(mipipe, code: int, option: str, value: Any, words: str) -> None:
    """A size slipped of the pen ran for hours, a duration beyond 64 bits or a seed below 0 was a traceback."""
    ended = mipipe("compare", "--time-limit", 0.3, "--ranks", 2, "--microbatches", 4, option, value)
    assert ended.code == code and words in ended.stderr and "Traceback" not in ended.stderr
    assert code == 2 or ended.error.count("\n") == 0


def test_ranks_times_microbatches_have_an_end(mipipe) -> None:
    for ranks, microbatches in ((64, 65_536), (16_384, 65)):
        ended = mipipe("compare", "--ranks", ranks, "--microbatches", microbatches)
        assert ended.code == 1 and "ranks x microbatches: found" in ended.error


def test_stages_that_take_no_time(mipipe) -> None:
    """A bound of 0: nothing is a share of it."""
    for more in ([], ["--draw"], ["--comm", 1, "--draw"]):
        ended = mipipe("compare", "--time-limit", 0.3, "--ranks", 2, "--microbatches", 4, "--schedules",
                       "1f1b,dualpipe,mipipe", "--f", 0, "--i", 0, "--w", 0, *more)
        assert ended.code == 0, ended.stderr


SPANS = [("spans.0.rank", 2, "of rank 2"), ("spans.0.rank", -1, "spans[0].rank: expected at least 0"),
         ("spans.1.peer", 7, "with peer 7"), ("spans.0.end_ns", -1, "expected at least 0"),
         ("spans.1.end_ns", 5, "before its start"), ("num_ranks", 0, "expected at least 1"),
         ("num_ranks", 10**9, "expected at most"), ("unit_ns", 0, "unit_ns: expected at least 1"),
         ("memory", [[[0, 5]]], "memory has 1 entries for 2 ranks"), ("memory.0", [[0, -5]], "expected at least 0"),
         ("resident_bytes", [1, 2, 3], "3 entries for 2 ranks"), ("origin", "guessed", "'simulated' or 'measured'"),
         ("spans.0.kind", "X", "kind"), ("spans.0.label", "\x1b]0;x\x07", "control characters")]


@pytest.mark.parametrize(("place", "value", "words"), SPANS, ids=lambda item: str(item)[:30])
def test_timelines(mipipe, tmp_path: Path, place: str, value: Any, words: str) -> None:
    data = put({"format": "mipipe.timeline", "version": 1, **json.loads(json.dumps(to_data(TIMELINE)))}, place, value)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    for verb in (["show", tmp_path / "bad.json"], ["export", tmp_path / "bad.json", "--html", tmp_path / "x.html"]):
        ended = mipipe(*verb)
        assert ended.code == 1 and words in ended.error and "\n" not in ended.error
    assert not (tmp_path / "x.html").exists()


CLUSTER = ("hosts: [{name: a, devices: 2, kind: cpu, memory: 2GB}]\n"
           "links: {within_host: {latency: 1us, bandwidth: 1GB/s}}\n")
LOADS = [("loads.0.0", -1.0, "0 or more"), ("loads.0.0", "nan", "loads[0][0]"), ("loads.0.0", float("nan"), "finite"),
         ("loads.0.0", float("inf"), "finite"),
         ("loads.0.0", 1e308, "0 or more"), ("loads.0.0", 1e15, ""), ("loads.0", [], "experts"), ("loads", [], "empty"),
         ("token_bytes", -1, "at least 0"), ("token_ns", {"cpu": -3.0}, "token_ns"),
         ("token_ns", {"cpu": "nan"}, "token_ns"),
         ("expert_bytes", -1, "at least 0")]


@pytest.mark.parametrize(("place", "value", "words"), LOADS, ids=lambda item: str(item)[:30])
def test_loads(mipipe, tmp_path: Path, place: str, value: Any, words: str) -> None:
    good = ExpertLoads(((5.0, 1.0, 2.0, 4.0), (1.0, 1.0, 7.0, 3.0)), "m", {"cpu": 3.0}, 64, 1000)
    (tmp_path / "cluster.yaml").write_text("format: mipipe.cluster\nversion: 1\n" + CLUSTER)
    data = put({"format": "mipipe.expert_loads", "version": 1, **json.loads(json.dumps(to_data(good)))}, place, value)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    ended = mipipe("experts", "--loads", tmp_path / "bad.json", "--cluster", tmp_path / "cluster.yaml",
                   "--time-limit", 0.5)
    assert ended.code == (1 if words else 0), ended.stderr
    assert not words or (words in ended.error and "\n" not in ended.error)


@pytest.mark.parametrize(("place", "value", "words"), [
    ("num_devices", 0, "at least 1"), ("num_experts", -1, "at least 1"), ("num_experts", 2**40, "at most"),
    ("physical_to_logical.0.0", -1, "at least 0"), ("physical_to_logical.0.3", 9, "expert 3 is in no slot"),
    ("physical_to_logical.0", [0, 1, 2, 3, 9, 9], "names expert 9"),
    ("physical_to_logical", [], "no layers"),
    ("physical_to_logical.0", [0, 1], "fewer than the 4 experts")], ids=str)
def test_maps(place: str, value: Any, words: str) -> None:
    from mipipe.graphs.errors import InputError
    from mipipe.graphs.serialize import from_data

    data = put(json.loads(json.dumps(to_data(ExpertMap(4, 2, ((0, 1, 2, 3),))))), place, value)
    with pytest.raises(InputError) as caught:
        from_data(data, ExpertMap, "map.json")
    assert str(caught.value).startswith("map.json: ") and words in str(caught.value)


def run(command: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mipipe.cli.main", *command], text=True, stderr=subprocess.PIPE,
                          timeout=120, **streams)


@pytest.mark.parametrize("command", [
    ["show", "plan.json"], ["--version"], *(pytest.param(command, marks=pytest.mark.slow) for command in (
        ["simulate", "--help"], ["--help"], ["merge", "--methods"], ["export", "plan.json", "--csv", "/dev/stdout"]))],
    ids=" ".join)
def test_a_reader_that_has_gone_and_a_closed_or_full_stdout(folder: Path, command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    gone = run(command, cwd=folder, stdout=write)
    os.close(write)
    assert gone.returncode == 0 and gone.stderr == ""
    with open("/dev/full", "w") as full:
        ended = run(command, cwd=folder, stdout=full)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "No space left" in ended.stderr
    if "/dev/stdout" not in command:
        closed = run(command, cwd=folder, preexec_fn=lambda: os.close(1))
        assert closed.returncode == 0 and closed.stderr == ""


@pytest.mark.parametrize(("command", "code"), [
    (["plan", "none.json"], 1), pytest.param(["bogus"], 2, marks=pytest.mark.slow),
    pytest.param(["show"], 2, marks=pytest.mark.slow)])
def test_an_error_that_nobody_reads_keeps_its_code(command: list[str], code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-m", "mipipe.cli.main", *command], stdout=write, stderr=write, timeout=120)
    os.close(write)
    assert ended.returncode == code


def test_a_file_on_stdout_is_alone_there(folder: Path) -> None:
    """With --json, too: two objects one after the other are no JSON."""
    ended = run(["plan", "problem.json", "--time-limit", "0.3", "-o", "/dev/stdout", "--json"], cwd=folder,
                stdout=subprocess.PIPE)
    assert ended.returncode == 0 and json.loads(ended.stdout)["format"] == "mipipe.plan"
    assert "makespan" in json.loads(ended.stderr.splitlines()[-1])


@pytest.mark.parametrize("command", [
    "plan problem.json -o x --html x", "plan problem.json --html x --trace ./x",
    "plan problem.json -o /dev/stdout --html /dev/stdout",
    "simulate plan.json -o x --program x", "simulate plan.json --html x --trace x", "show plan.json --html x --trace x",
    "export plan.json --csv x --trace x", "calibrate t.json -o x --replan x",
    "experts --loads l.csv --cluster c.yaml -o x --eplb x"])
def test_no_output_replaces_another(mipipe, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the work, whatever the other arguments are."""
    monkeypatch.chdir(folder)
    ended = mipipe(*command.split())
    assert ended.code == 1 and "give each a file of its own" in ended.error
    assert not (folder / "x").exists()


@pytest.mark.parametrize("command", [
    "plan problem.json -o problem.json", "plan problem.json --html ../FOLDER/problem.json",
    "simulate plan.json -o link",
    "show plan.json --html plan.json", "export plan.json --csv plan.json", "place problem.json -o problem.json",
    "compare --problem problem.json --html problem.json", "plan problem.json --cluster plan.json -o plan.json"])
def test_no_output_replaces_an_input(mipipe, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name; what is read stays as it is."""
    monkeypatch.chdir(folder)
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("plan.json")
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    ended = mipipe(*command.replace("FOLDER", folder.name).split())
    assert ended.code == 1 and "is also read: give what is written a name of its own" in ended.error
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before
