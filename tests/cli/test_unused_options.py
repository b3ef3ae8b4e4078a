"""An option that has no effect on a request is refused in one line, in every mode of every verb that has modes."""

from __future__ import annotations

import inspect
import json

import pytest

from mipipe.cli.plan import NO_PLAN, SINGLE_ONLY, TEAMS_ONLY, plan

VALUES = {
    "microbatches": "4", "groups": "4", "granularity": "layer", "costs": "c.json", "experts": "e.json",
    "sizes": "s.yaml", "activations": "1GB", "batch": "1", "exportable": None, "pareto": None, "recompute": None,
    "explain": None, "placement": "free", "objective": "makespan", "exact": None, "without": "mip", "branches": "2",
    "per_host": "8", "eager": None, "held": None, "scatter": None, "layer_entry": "A/B", "output": "new.json",
    "trace_file": "new.json"}
"""A value for every such option of ``plan``, the default where it has one; None: a flag."""
TEAM = "plan graph.json --devices 8 --kind h100 --global-batch 32"
ASKS = ("degrees", "devices", "kind", "global_batch", "microbatch", "layers_per_stage", "schedule", "recomputation",
        "modes", "layer_times")
BOTH = ("graph", "output", "cluster", "memory", "optimizer", "seq", "dtype", "settings", "save_graph", "no_cache",
        "time_limit", "seed", "html_file", "trace_file", "json_output")


def option(name: str) -> list[str]:
    flag = "--" + name.removesuffix("_file").replace("_", "-")
    return [flag] if VALUES[name] is None else [flag, VALUES[name]]


def test_every_option_of_plan_has_its_modes():
    assert set(inspect.signature(plan).parameters) == {*SINGLE_ONLY, *TEAMS_ONLY, *ASKS, *BOTH}


@pytest.mark.parametrize("name", SINGLE_ONLY)
def test_options_of_single_devices_do_not_go_with_teams(mipipe, name):
    """Also with the value that they have anyway."""
    assert f"{option(name)[0]} does not go with teams" in mipipe(*TEAM.split(), *option(name)).error


@pytest.mark.parametrize("name", TEAMS_ONLY)
def test_options_of_teams_need_teams(mipipe, name):
    ended = mipipe(*["plan", "graph.json", "--cluster", "c.yaml", "--microbatches", "4"], *option(name))
    assert f"{option(name)[0]} is for teams of devices: give --global-batch" in ended.error


@pytest.mark.parametrize("name", NO_PLAN)
def test_a_frontier_is_no_plan(mipipe, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    ended = mipipe(*["plan", "problem.json", "--pareto"], *option(name))
    assert f"{option(name)[0]} does not go with --pareto, which makes no plan" in ended.error


@pytest.mark.parametrize("command, message", [
    *((f"plan problem.json {given}", f"{given.split()[0]} does not apply to it") for given in (
        "--cluster c.yaml", "--costs c.json", "--groups 4", "--granularity layer", "--optimizer sgd", "--sizes s.yaml",
        "--experts e.json")),
    *((f"plan problem.json {given}", f"{given.split()[0]} is for models") for given in (
        "--seq 4", "--batch 1", "--dtype fp7", "--set a=1", "--save-graph new.json", "--no-cache")),
    *((f"{TEAM} {given}", f"{given.split()[0]} is for models") for given in (
        "--seq 4", "--dtype fp7", "--dtype float64", "--set a=1", "--save-graph new.json", "--no-cache")),
    ("plan graph.json --cluster c.yaml --global-batch 8 --per-host 8", "--per-host describes what c.yaml describes"),
    ("plan graph.json --cluster c.yaml --global-batch 8 --devices 8", "--devices describes what c.yaml describes"),
    ("plan graph.json --cluster c.yaml --global-batch 8 --kind h100", "--kind describes what c.yaml describes"),
    (f"{TEAM} --layer-entry A/B", "--layer-entry names an entry of --layer-times, which is not given"),
    ("place problem.json --groups 4", "--groups does not apply to it"),
    ("compare --problem problem.json --f 1", "--f describes equal stages, but --problem"),
    ("compare --problem problem.json --layers 4", "--layers describes equal stages, but --problem"),
    ("compare --ranks 4 --microbatches 8 --attention 1,1,1 --w 1", "--w does not apply to stages on two streams"),
    ("calibrate links --plan plan.json", "--plan is of a timeline"), ("calibrate links --seed 1", "--seed is of a"),
    ("calibrate t.json --cluster c.yaml", "--cluster is of `mipipe calibrate links`"),
    ("calibrate t.json --torchrun=-x", "--torchrun is of `mipipe calibrate links`"),
    ("calibrate t.json --plan p.json --costs c.json --seed 0", "--seed is for planning again: give --replan"),
    ("calibrate t.json --plan p.json --costs c.json --time-limit 9", "--time-limit is for planning again"),
    ("train --plan p --graph g --config c --min-ranks 1", "--min-ranks is of runs that plan again: give --elastic"),
    ("train --plan p --graph g --config c --replan-seconds 9", "--replan-seconds is of runs that plan again"),
    ("train --plan p --graph g --config c --resume --resume-if-any", "--resume-if-any starts anew where --resume ends"),
    ("merge --methods --ranks 1", "--ranks does not go with --methods"),
    ("merge --methods -o made", "--output does not go with --methods"),
    ("merge r.yaml -o made --store --no-verify", "--no-verify does not go with --store"),
    ("merge r.yaml -o made --route 0,1 --loader a:b", "--loader does not go with --store and --route"),
    ("tune r.yaml -o made --perplexity t --budget 40", "--budget does not apply to --search grid"),
    ("tune r.yaml -o made --perplexity t --search cma --points 5", "--points does not apply to --search cma"),
    ("tune r.yaml -o made --perplexity t --minimise", "--minimise is of --evaluate, which is not given"),
    ("tune r.yaml -o made --perplexity t --limit 5", "--limit is of --lm-eval, which is not given"),
    ("tune r.yaml -o made --evaluate a:b --samples 64", "--samples is of --perplexity, which is not given"),
    ("tune r.yaml -o made --evaluate a:b --length 256", "--length is of --perplexity, which is not given"),
    ("experts --loads l.json --cluster c.yaml --horizon 10", "--horizon is of moves from a map in use"),
    ("experts --loads l.json --cluster c.yaml --max-moves 1", "--max-moves is of moves from a map in use"),
    ("experts --loads l.json --cluster c.yaml --max-bytes 1GB", "--max-bytes is of moves from a map in use"),
    *((f"capture graph.json --modes tensor --team 2 -o new.json {given}", f"{given.split()[0]} is for models")
      for given in ("--seq 128", "--batch 1", "--dtype float32", "--granularity block", "--verify", "--images 1")),
    *((f"capture a.b:c -o new.json {given}", f"{given.split()[0]} does not apply to a.b:c")
      for given in ("--seq 128", "--batch 1", "--images 1", "--image 32", "--frames 2")),
    ("capture c.pt2 -o new.json --seq 128", "--seq does not apply to c.pt2")])
def test_what_has_no_effect_is_refused(mipipe, folder, tmp_path, monkeypatch, captured, command, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problem.json").write_bytes((folder / "problem.json").read_bytes())
    (tmp_path / "graph.json").write_bytes(captured)
    ended = mipipe(*command.split())
    assert ended.code == 1 and message in ended.error
    assert sorted(item.name for item in tmp_path.iterdir()) == ["graph.json", "problem.json"]


@pytest.fixture(scope="module")
def captured(tmp_path_factory, mipipe) -> bytes:
    """A small graph's file."""
    folder = tmp_path_factory.mktemp("unused")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(__file__).rpartition("/")[0])
        mipipe("capture", "cli_models:small", "-o", folder / "graph.json")
    return (folder / "graph.json").read_bytes()


def test_members_that_send_nothing_have_nothing_to_scatter(mipipe, captured, tmp_path):
    (tmp_path / "graph.json").write_bytes(captured)
    ended = mipipe(*TEAM.replace("graph.json", str(tmp_path / "graph.json")).split(), "--degrees", "copies=8",
                   "--no-scatter")
    assert "--no-scatter is of tensor members that send to the next rank; ranks=1,copies=8 has none" in ended.error


def test_defaults_are_no_options(mipipe, captured, tmp_path):
    """What is not on the command line is not refused."""
    (tmp_path / "graph.json").write_bytes(captured)
    ended = mipipe(*TEAM.replace("graph.json", str(tmp_path / "graph.json")).split(), "--degrees", "copies=8", "--json")
    assert ended.code == 0 and json.loads(ended.stdout)["fits"]
