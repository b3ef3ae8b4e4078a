"""A planning problem as CSV: what it says is the problem, every mistake is one line; and `show` prints problems."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mipipe.cli.requests.files import open_any
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.serialize import load, save
from mipipe.graphs.topology import Link
from mipipe.planner.check import check_plan
from mipipe.planner.plan import Plan
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem

DOCUMENTED = re.search(r"```text\n(# devices.*?)```", (Path(__file__).parents[2] / "docs/verbs/plan.md").read_text(),
                       re.DOTALL)[1]


@pytest.fixture
def file(tmp_path):
    """The documented problem."""
    (tmp_path / "own.csv").write_text(DOCUMENTED)
    return tmp_path / "own.csv"


def test_every_cell_is_the_problems(file):
    problem = open_any(file, PlanningProblem)
    mb, ms = 10**6, 10**6
    layer = {"resident_bytes": 2 * 10**9, "gradient_bytes": 500 * mb, "saved_fi_bytes": 40 * mb,
             "saved_fw_bytes": 20 * mb, "workspace_bytes": 8 * mb}
    assert problem.groups == (
        Group("embed", {"device": PhaseTimes(ms, None, ms)}, resident_bytes=2 * 10**9, gradient_bytes=500 * mb,
              saved_fw_bytes=10 * mb),
        *(Group(name, {"device": PhaseTimes(f * ms, f * ms, ms)}, **layer)
          for name, f in (("layer 0", 2), ("layer 1", 2), ("head", 3))))
    assert problem.edges == tuple(GroupEdge(at, (at + 1,), 16 * mb, 16 * mb, f"output of {name}")
                                  for at, name in enumerate(("embed", "layer 0", "layer 1")))
    assert problem.num_microbatches == 8 and problem.num_ranks == 4 and problem.name == "own"
    assert {device.memory_bytes for device in problem.topology.devices} == {80 * 10**9}
    assert problem.topology.within_host == Link(5000, 50 * 10**9)


def test_verbs_read_it(mipipe, file, tmp_path):
    """As they read the same problem as JSON."""
    save(open_any(file, PlanningProblem), tmp_path / "own.json")
    shown = [mipipe("show", tmp_path / name) for name in ("own.csv", "own.json")]
    assert shown[0].code == 0 and shown[0].stdout == shown[1].stdout
    for text in ("own: 4 groups, 3 values, 8 microbatches on 4 devices", "layer 0", "2.00 GB", "500.00 MB", "60.00 MB",
                 "8.00 MB", "output of embed", "16.00 MB", "memory 80.00 GB", "50.00 GB/s"):
        assert text in shown[0].stdout, text
    data = mipipe("show", file, "--json").data
    assert data["digest"] == open_any(file, PlanningProblem).digest() and data["microbatches"] == 8
    assert data["groups"][1]["times"] == {"device": {"f_ns": 2 * 10**6, "i_ns": 2 * 10**6, "w_ns": 10**6}}
    assert [value["targets"] for value in data["values"]] == [[1], [2], [3]] and len(data["devices"]) == 4
    ended = mipipe("plan", file, "--time-limit", 1, "-o", tmp_path / "plan.json")
    assert ended.code == 0, ended.stderr
    made = load(tmp_path / "plan.json", Plan)
    check_plan(made)
    assert made.problem == open_any(file, PlanningProblem)
    placed = [mipipe("place", tmp_path / name, "--time-limit", 2, "--json").data for name in ("own.csv", "own.json")]
    assert placed[0]["objective"] == placed[1]["objective"] > 0 and set(placed[0]["assignment"]) == {
        "embed", "layer 0", "layer 1", "head"}
    compared = mipipe("compare", "--problem", file, "--schedules", "1F1B", "--json")
    assert compared.data["problem"]["digest"] == made.problem.digest()


def test_a_value_may_have_several_readers_and_no_gradient(tmp_path):
    (tmp_path / "own.csv").write_text("# devices: 1\n# microbatches: 1\ngroup,f,i,w,output,reads\nfrozen,1us,,,1kB,\n"
                                      "other,1us,1us,,2kB,-\nlast,1us,1us,1us,,frozen; other\n")
    assert open_any(tmp_path / "own.csv", PlanningProblem).edges == (
        GroupEdge(0, (2,), 1000, None, "output of frozen"), GroupEdge(1, (2,), 2000, 2000, "output of other"))


@pytest.mark.parametrize("old, new, message", [
    ("# devices: 4\n", "", "own.csv: found '' devices, expected a line such as '# devices: 4'"),
    ("# devices: 4", "# devices: x", "found 'x' devices"), ("# devices: 4", "# devices: 0", "found '0' devices"),
    ("# microbatches: 8", "# microbatch: 8", "own.csv, line 2: found 'microbatch', expected each of devices"),
    ("# memory: 80GB", "# devices: 5", "own.csv, line 3: found 'devices', expected each of devices"),
    ("# memory: 80GB", "# memory: 80", "own.csv, memory: found"), ("50GB/s", "50GB", "own.csv, bandwidth: found"),
    ("group,f,i", "group,f,j", "own.csv: found the columns 'group,f,j"), ("group,f,i", "group,f,f", "each once"),
    ("embed,1ms", "embed,", "own.csv, line 7: has no f"), ("embed,1ms", ",1ms", "own.csv, line 7: has no name"),
    ("embed,1ms", "embed,1", "own.csv, line 7, f: found"), ("16MB,embed", "16MB,head", "own.csv, line 8, reads: found"),
    ("500MB,40MB", "-5MB,40MB", "line 8, gradient: found"), ("16MB,embed", "16MB", "line 8: has 11 cells, expected 12"),
    ("layer 1,2ms", "layer 0,2ms", "own.csv, line 9: two groups are named 'layer 0'"),
    ("layer 0,2ms", "embed,2ms", "own.csv, line 8: two groups are named 'embed'"),  # which it reads itself
    ("embed,1ms", "embed,1e-9ms", "own.csv, line 7, f: found '1e-9ms', which is too small"),
    ("# latency: 5us", "# latency: 0.1ns", "latency: found '0.1ns', which is too small"),
    ("40MB,20MB", "0.4B,20MB", "saved_fi: found '0.4B', which is too small"),
    ("output,reads", "output,\"reads", "own.csv, line 6: unexpected end of data")])
def test_what_is_wrong_is_one_line(mipipe, file, old, new, message):
    assert old in DOCUMENTED
    file.write_text(DOCUMENTED.replace(old, new, 1))
    with pytest.raises(MipipeError):
        open_any(file, PlanningProblem)
    for verb in ("show", "plan"):
        assert message in mipipe(verb, file).error


def test_the_stream_of_transfers_is_none_of_a_groups(mipipe, folder, tmp_path):
    text = (folder / "problem.json").read_text()
    assert '"compute"' in text
    (tmp_path / "p.json").write_text(text.replace('"compute"', '"channel"', 1))
    for verb in ("show", "plan", "place"):
        ended = mipipe(verb, tmp_path / "p.json")
        assert ended.code == 1 and "is on the stream 'channel'" in ended.error and "'compute' or" in ended.error


def test_a_problem_is_shown_alone(mipipe, folder):
    shown = mipipe("show", folder / "problem.json")
    assert shown.code == 0 and "8 microbatches on 4 devices" in shown.stdout
    for more in ((folder / "plan.json",), ("--html", "new.html"), ("--trace", "new.json")):
        assert "give one planning problem, without --html and --trace" in mipipe("show", folder / "problem.json",
                                                                                  *more).error
