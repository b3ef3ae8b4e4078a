"""`mipipe plan` for teams: what it prints, what it writes, and one line for everything that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mipipe.graphs.coarse.totals import num_sequences
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import digest, load
from mipipe.planner.check import check_plan
from mipipe.planner.plan import Plan
from mipipe.planner.teams.again import task_of

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 688,
          "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024,
          "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
DEVICES = ("--devices", 8, "--kind", "h100", "--global-batch", 32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory, mipipe):
    """The graph of a small Llama, captured by the command line."""
    folder = tmp_path_factory.mktemp("teams")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    mipipe("capture", folder, "--seq", 256, "--dtype", "bfloat16", "--no-verify", "-o", folder / "graph.json")
    return folder / "graph.json"


def test_a_configuration_is_evaluated(mipipe, graph, tmp_path):
    """Degrees, stages, step, times, memory and what the figures rest on; the plan is one the checker takes."""
    ended = mipipe("plan", graph, *DEVICES, "--degrees", "tensor=2,ranks=2,copies=2", "--layers-per-stage", "1,3",
                   "--schedule", "1f1b", "--recomputation", "full", "-o", tmp_path / "plan.json")
    assert ended.code == 0, ended.stderr
    for text in ("evaluated as given", "degrees: ranks=2,tensor=2,copies=2", "tensor 2 x copies 2 x ranks 2",
                 "layers per stage 1,3",
                 "tokens/s per device", "model FLOP utilisation", "tensor communication", "bubble", "rank 0: peak",
                 "optimizer state sharded over copies", "estimated from shapes", "assumed",
                 "`mipipe train` runs this plan"):
        assert text in ended.stdout, text
    made = load(tmp_path / "plan.json", Plan)
    check_plan(made)
    task = task_of(made)  # --elastic plans again with it
    assert task.machine.kind.name == "h100" and task.options.given == {"tensor": 2, "ranks": 2, "copies": 2}
    assert task.options.recomputation == "full"
    shown = mipipe("show", tmp_path / "plan.json")
    assert shown.code == 0, shown.stderr


def test_as_json(mipipe, graph):
    ended = mipipe("plan", graph, *DEVICES, "--degrees", "sequence=4,copies=2", "--json")
    data = json.loads(ended.stdout)
    assert data["degrees"]["tensor"] == 4 and data["degrees"]["sequence"] is True
    assert sum(data["times"].values()) == pytest.approx(data["step_s"])
    assert data["fits"] and data["basis"]["efficiencies"] == "fitted"
    assert data["basis"]["evidence"]["runs"] > 10 and data["outside"]


def test_what_does_not_divide_is_told(mipipe, graph, tmp_path):
    """Key heads that the tensor degree does not divide are whole on every member, and the plan says so."""
    ended = mipipe("plan", graph, *DEVICES, "--degrees", "tensor=8")
    whole = "whole on every member: model.layers.0.self_attn: keys and values: 4 heads do not divide by 8 members"
    assert whole in ended.stdout
    data = json.loads(mipipe("plan", graph, *DEVICES, "--degrees", "tensor=4,copies=2", "--json").stdout)
    assert data["whole_on_every_member"] == []


def test_where_efficiencies_come_from(mipipe, graph):
    """Fitted ones say on how many runs and how far off; others that they are assumed, and by what."""
    fitted, assumed = (mipipe("plan", graph, "--devices", 8, "--kind", kind, "--global-batch", 32, "--degrees",
                              "copies=8").stdout for kind in ("h100", "h200"))
    assert re.search(r"efficiencies of h100: fitted on \d+ published runs, cross-validated error \d+\.\d%", fitted)
    assert "efficiencies of h200: assumed (those fitted for h100, the same chip)" in assumed
    assert "no published run of h200 was predicted" in assumed


def test_free_degrees_are_searched(mipipe, graph):
    ended = mipipe("plan", graph, "--devices", 2, "--kind", "mi300x", "--global-batch", 8, "--time-limit", 2.5)
    assert ended.code == 0, ended.stderr
    for text in ("best of ", "combinations of degrees", "bound over all degrees", "next: ", "no pipeline: "):
        assert text in ended.stdout, text


def test_a_cluster_file_does_as_well(mipipe, graph, tmp_path):
    (tmp_path / "cluster.yaml").write_text("""
format: mipipe.cluster
version: 1
hosts: [{name: a, devices: 4, kind: h100}, {name: b, devices: 4, kind: h100}]
links:
  within_host: {latency: 5us, bandwidth: 360GB/s}
  between_hosts: {latency: 20us, bandwidth: 40GB/s}
""")
    ended = mipipe("plan", graph, "--cluster", tmp_path / "cluster.yaml", "--global-batch", 32, "--degrees",
                   "ranks=2,copies=4")
    assert ended.code == 0, ended.stderr
    assert "ranks=2,copies=4" in ended.stdout


def test_measured_times_of_layers(mipipe, graph, tmp_path):
    """Four layers, embedding and head of 1 ms of F and 2 of B on two ranks; and what the table lacks."""
    table = tmp_path / "layers.json"
    entry = {"1": {"2": {str(number): [1e-3, 2e-3, 0.0] for number in range(6)}}}
    table.write_text(json.dumps({"Tiny": {"GPU": entry, "Other": entry}}))
    options = (*DEVICES, "--degrees", "tensor=2,ranks=2,copies=2,zero=0", "--layer-times", table, "--schedule", "1f1b")
    ended = mipipe("plan", graph, *options, "--layer-entry", "Tiny/GPU", "--held", "--json")
    assert ended.code == 0, ended.stderr
    data = json.loads(ended.stdout)
    assert data["basis"]["layers_measured"] and data["outside"] == []
    assert data["step_s"] == pytest.approx(17 * 9e-3, rel=0.05)
    for wrong, message in (((), "--layer-entry is missing; expected one of Tiny/GPU, Tiny/Other"),
                           (("--layer-entry", "Tiny/CPU"), "--layer-entry 'Tiny/CPU'; expected one of"),
                           (("--layer-entry", "Tiny/GPU", "--recomputation", "full"), "leave it out")):
        ended = mipipe("plan", graph, *options, *wrong)
        assert ended.code == 1 and message in ended.stderr, ended.stderr


@pytest.mark.slow
def test_a_profile_of_one_device_predicts_the_cluster(mipipe, graph, tmp_path):
    """`mipipe profile`'s own table: 8 microbatches on two ranks by hand from its F, I and W; schedules that divide
    backwards as well; and what a profile of whole layers on one device cannot say."""
    table = tmp_path / "costs.json"
    assert mipipe("profile", graph, "--granularity", "layer", "-o", table).code == 0
    other = json.loads(table.read_text())
    times = {entry["group"]: sum(entry["times_ns"].values()) / 1e9 for entry in other["entries"]}
    layer, head = times["model.layers.0"], times["lm_head"]
    options = (*DEVICES, "--layer-times", table, "--json")
    full = ("--degrees", "ranks=2,copies=4,zero=1", "--layers-per-stage", "2,2")
    ended = mipipe("plan", graph, *options, *full)
    assert ended.code == 0, ended.stderr
    data = json.loads(ended.stdout)
    assert data["basis"]["layers_measured"] and data["outside"] == []
    work = 8 * (2 * layer + head) + 2 * layer + times["model.embed_tokens"]
    assert data["step_s"] == pytest.approx(work, rel=0.15)
    split = mipipe("plan", graph, *options, *full, "--schedule", "zb-h1")
    assert split.code == 0 and json.loads(split.stdout)["step_s"] < data["step_s"]
    (tmp_path / "other.json").write_text(json.dumps(other | {"graph_digest": "0" * 16}))
    (tmp_path / "estimated.json").write_text(json.dumps(other | {
        "entries": [entry | {"origin": "roofline"} for entry in other["entries"]]}))
    (tmp_path / "coarse.json").write_text(json.dumps(other | {"notes": {"groups": "2"}}))
    for wrong, message in (
            (("--degrees", "tensor=2,ranks=2,copies=2"), "times of whole layers on one device, but the plan divides"),
            ((*full, "--microbatch", "2"), "capture with --batch 2 and profile that graph"),
            ((*full, "--layer-entry", "h100"), "--layer-entry 'h100'; expected one of cpu"),
            ((*full, "--layer-times", tmp_path / "other.json"), "was measured on another graph"),
            ((*full, "--layer-times", tmp_path / "estimated.json"), "holds estimates, not measurements"),
            ((*full, "--layer-times", tmp_path / "coarse.json"), "profile with --granularity layer")):
        ended = mipipe("plan", graph, *options, *wrong)
        assert ended.code == 1 and message in ended.stderr, ended.stderr


def test_far_from_what_was_validated(mipipe, graph):
    """The small model is far below the sizes of published runs."""
    ended = mipipe("plan", graph, *DEVICES, "--degrees", "copies=8")
    assert "warning: outside what was validated: " in ended.stdout and "parameters" in ended.stdout


@pytest.mark.parametrize("options, message", [
    ((*DEVICES, "--held"), "--held is for a configuration given in full"),
    ((*DEVICES, "--degrees", "copies=8", "--layer-entry", "a/b"), "names an entry of --layer-times, which is not"),
    (("--devices", 8, "--kind", "h100"), "teams need --global-batch"),
    (("--global-batch", 8), "teams need --cluster CLUSTER.yaml, or --devices with --kind"),
    ((*DEVICES, "--degrees", "tensor=3,ranks=2"), "= 6 devices, which does not divide the 8 there are"),
    ((*DEVICES, "--degrees", "tensor=4,ranks=4,copies=1", "--schedule", "1f1b"), "= 16 devices, but there are 8"),
    (("--devices", 48, "--kind", "h100", "--global-batch", 48, "--degrees", "tensor=3"),
     "tensor=3 does not divide the 8 heads"),
    ((*DEVICES, "--degrees", "ranks=4,copies=2", "--recomputation", "some"),
     "--recomputation some: expected one of none"),
    ((*DEVICES, "--recomputation", "latents"),
     "--recomputation latents: LlamaForCausalLM makes no queries, keys and values of latents; expected one of none"),
    ((*DEVICES, "--degrees", "copies=8", "--layers-per-stage", "4;4"), "expected numbers such as 9,9,8"),
    ((*DEVICES, "--degrees", "ranks=2,copies=4", "--layers-per-stage", "2,1"),
     "3 layers in 2 stages, but the model has 4"),
    ((*DEVICES, "--degrees", "copies=8", "--microbatches", 4), "--microbatches does not go with teams"),
    ((*DEVICES, "--degrees", "copies=8", "--microbatch", 0), "--microbatch 0: expected at least 1"),
    ((*DEVICES, "--degrees", "copies=8", "--microbatch", 3), "does not divide into copies=8 x --microbatch 3"),
    ((*DEVICES, "--degrees", "copies=8", "--kind", "h1"), "unknown device kind"),
    ((*DEVICES, "--degrees", "copies=8", "--seq", 64), "captured already")])
def test_one_line_for_what_is_wrong(mipipe, graph, options, message):
    ended = mipipe("plan", graph, *options)
    assert ended.code in (1, 2, 3)
    assert "Traceback" not in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
    assert re.search(message, ended.stderr), ended.stderr


def test_too_little_memory_says_which_degree_would_do(mipipe, graph):
    ended = mipipe("plan", graph, *DEVICES, "--degrees", "copies=8", "--microbatch", 4, "--memory", "45MB")
    assert ended.code == 3
    for text in ("needs", "of 45.00 MB (weights", "--microbatch 1 would fit"):
        assert text in ended.stderr
    nothing = mipipe("plan", graph, *DEVICES, "--degrees", "copies=8", "--memory", "3MB")
    enough = re.search(r"no single change of a degree would fit; --memory (\d+MB) would", nothing.stderr)
    assert nothing.code == 3 and enough is not None, nothing.stderr
    assert mipipe("plan", graph, *DEVICES, "--degrees", "copies=8", "--memory", enough[1]).code == 0
    searched = mipipe("plan", graph, *DEVICES, "--memory", "1MB")
    assert searched.code == 3 and "combinations of degrees fits 1.00 MB" in searched.stderr


def test_train_refuses_in_one_line_what_teams_do_not_do(mipipe, graph, tmp_path):
    """Other microbatches than the graph's, an optimizer of whole tensors, too few processes."""
    plan = tmp_path / "plan.json"

    def refused(text, *options, config="steps: 1\n"):
        (tmp_path / "train.yaml").write_text(config)
        ended = mipipe("train", "--plan", plan, "--graph", graph, "--config", tmp_path / "train.yaml", "--device",
                       "cpu", *options)
        assert ended.code != 0 and len(ended.stderr.strip().splitlines()) == 1, ended.stderr
        assert text in ended.stderr

    told = "it has microbatches of 2 sequences, but the graph was captured with 1; capture it with --batch 2"
    ended = mipipe("plan", graph, *DEVICES, "--degrees", "tensor=2,copies=4", "--microbatch", 2, "-o", plan)
    assert f"`mipipe train` refuses this plan: {told}" in ended.stdout and "runs this plan" not in ended.stdout
    assert not ended.stderr
    refused(told)
    mipipe("plan", graph, *DEVICES, "--degrees", "tensor=2,ranks=2,copies=2", "--microbatch", 1, "-o", plan)
    refused("optimizer adafactor: looks at whole tensors", config="steps: 1\noptimizer: {name: adafactor}\n")
    refused("6 processes were started, but the plan has 2 ranks of 2 devices (tensor 2); start 4", "--processes", 6)


@pytest.mark.slow
def test_a_mode_for_a_branch(mipipe, tmp_path):
    """The vision tower by samples beside a divided language model; what cannot be is one line."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 63,
        "image_seq_length": 4, "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "vision_config": {**sizes, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        "text_config": {**sizes, "model_type": "llama", "vocab_size": 64, "num_key_value_heads": 4}}))
    mipipe("capture", tmp_path, "--seq", 16, "--batch", 2, "--no-verify", "-o", tmp_path / "graph.json")
    given = ("plan", tmp_path / "graph.json", "--devices", 4, "--kind", "h100", "--global-batch", 8, "--microbatch", 2,
             "--degrees", "sequence=2,ranks=2")
    page = tmp_path / "plan.html"
    ended = mipipe(*given, "--modes", "vision=batch", "-o", tmp_path / "plan.json", "--html", page)
    assert ended.code == 0, ended.stderr
    assert "modes of branches: vision batch\n" in ended.stdout and "vision batch" in page.read_text()
    both = [json.loads(mipipe(*given, *modes, "--json").stdout) for modes in ((), ("--modes", "vision=batch"))]
    assert [data["modes"] for data in both] == [{}, {"vision": "batch"}]
    assert both[0]["step_s"] != both[1]["step_s"] and task_of(load(tmp_path / "plan.json", Plan)).modes == {
        "vision": "batch"}
    team = load(tmp_path / "plan.json", Plan).team
    assert [(item.mode, bool(item.segments)) for item in team.modes] == [("sequence", False), ("batch", True)]
    shown = mipipe("show", tmp_path / "plan.json")
    assert "2 ranks, each a team of 2 (tensor 2), 1 copy, modes of branches: vision batch" in shown.stdout
    search = (*given[:-2], "--degrees", "sequence=2", "--time-limit", 12)
    ended = mipipe(*search, "-o", tmp_path / "chosen.json")
    assert "modes of branches: vision batch (chosen)\n" in ended.stdout
    assert "with one mode for all branches the best one tried (" in ended.stdout
    chosen = load(tmp_path / "chosen.json", Plan)
    assert task_of(chosen).modes is None and chosen.team.modes == team.modes
    mipipe(*search, "--modes", "uniform", "-o", tmp_path / "uniform.json")
    uniform = load(tmp_path / "uniform.json", Plan)
    assert task_of(uniform).modes == {} and uniform.team.modes == team.modes[:1]
    assert uniform.makespan_ns > chosen.makespan_ns
    for modes, message in (("audio=batch", "has the branches projector, text, vision"),
                           ("vision=context", "with a mode of tensor, sequence, batch"),
                           ("text=expert", "; --degrees expert= divides experts"),
                           ("vision=batch,vision=tensor", "--modes: vision is given twice"),
                           ("projector=batch", "looks at several samples at once"),
                           ("vision=batch", "--modes: there is no tensor axis (ranks=2,copies=2)")):
        degrees = "ranks=2,copies=2" if "no tensor" in message else given[-1]
        refused = mipipe(*given[:-1], degrees, "--modes", modes)
        assert refused.code == 1 and message in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


def test_sequences_are_rows_of_token_numbers(mipipe, tmp_path, monkeypatch):
    """Whatever the order of the inputs, and however many images a sequence has: as many tokens a second, and the
    microbatch that a graph was captured with is told in sequences."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    told = {}
    for first in ("images", "ids"):
        file = tmp_path / f"{first}.json"
        mipipe("capture", "cli_models:pictured", "--set", f"first={first}", "-o", file)
        assert num_sequences(load(file, OperatorGraph)) == 2
        for microbatch in (2, 4):
            ended = mipipe("plan", file, "--devices", 1, "--kind", "h100", "--global-batch", 8, "--degrees", "copies=1",
                           "--microbatch", microbatch, "-o", tmp_path / "plan.json", "--json")
            told[first, microbatch] = ended.data["tokens_per_s_per_device"]
            assert ended.data["global_batch"] * 8 / ended.data["step_s"] == pytest.approx(told[first, microbatch])
            assert ended.data["refused"] == (None if microbatch == 2 else "it has microbatches of 4 sequences, but the"
                                             " graph was captured with 2; capture it with example inputs of 4 and plan"
                                             " that")
    assert told["images", 2] == told["ids", 2] and told["images", 4] == told["ids", 4]


@pytest.mark.parametrize("degrees", [(), ("--degrees", "ranks=1,copies=4")])
def test_a_model_without_layers_is_one_piece(mipipe, tmp_path, monkeypatch, degrees):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    mipipe("capture", "cli_models:pictured", "--set", "layered=false", "-o", tmp_path / "graph.json")
    asked = ("plan", tmp_path / "graph.json", "--devices", 4, "--kind", "h100", "--global-batch", 8, "--time-limit", 1)
    ended = mipipe(*asked, *degrees, "--json")
    assert ended.data["degrees"]["ranks"] == 1 and ended.data["layers_per_stage"] == [0]
    assert "has 2 stages, but the model has 0 layers" in mipipe(*asked, "--degrees", "ranks=2,copies=2").error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp4", "float8"])
def test_a_model_with_short_products_is_captured_again_for_its_plan(mipipe, graph, tmp_path, dtype):
    """The plan's microbatch is not that of the first capture; parameters keep the configuration's type."""
    ended = mipipe("plan", graph.parent, "--devices", 8, "--kind", "b200", "--global-batch", 32, "--seq", 32,
                   "--dtype", dtype, "--degrees", "copies=8", "--microbatch", 2, "--no-cache", "--save-graph",
                   tmp_path / "graph.json", "-o", tmp_path / "plan.json", "--json")
    assert ended.code == 0, ended.stderr
    kept = load(tmp_path / "graph.json", OperatorGraph)
    assert num_sequences(kept) == 2 and {item.spec.dtype for item in kept.parameters if not item.buffer} == {"bfloat16"}
    assert load(tmp_path / "plan.json", Plan).problem.graph_digest == digest(kept)


@pytest.mark.parametrize("wrong, message", [
    (("--schedule", ""), "schedule '': unknown"), (("--layers-per-stage", "3,x"), "--layers-per-stage 'x': expected"),
    (("--schedule", "onef1b"), "schedule 'onef1b': unknown")])
def test_what_is_wrong_is_told_before_a_capture(mipipe, graph, monkeypatch, wrong, message):
    monkeypatch.setattr("mipipe.cli.requests.teams.captured", None)
    assert message in mipipe("plan", graph.parent, *DEVICES, *wrong).error


@pytest.mark.parametrize("dtype, gradients", [
    ("float32", 1), pytest.param("float64", 1, marks=pytest.mark.slow), ("bfloat16", 2)])
def test_state_is_what_single_devices_keep_of_the_dtype(mipipe, graph, tmp_path, dtype, gradients):
    """AdamW's moments in the parameters' type, of 16-bit ones with a float32 copy; --optimizer says another."""
    file, cluster = tmp_path / "graph.json", tmp_path / "one.yaml"
    mipipe("capture", graph.parent, "--seq", 32, "--dtype", dtype, "--no-verify", "-o", file)
    cluster.write_text("format: mipipe.cluster\nversion: 1\ndevice_kinds:\n  slow: {base: h100, flops: {float64:"
                       " 1TFLOPS, float32: 1TFLOPS, bfloat16: 1TFLOPS}}\nhosts:\n"
                       "  - {name: one, devices: 1, kind: slow}\nlinks:\n"
                       "  within_host: {latency: 1us, bandwidth: 1GB/s}\n")
    alone = mipipe("plan", file, "--cluster", cluster, "--microbatches", 1, "--granularity", "layer", "--time-limit",
                   0.4, "-o", tmp_path / "alone.json")
    assert alone.code == 0, alone.stderr
    facts = load(tmp_path / "alone.json", Plan).provenance["model"]
    for optimizer, state in (("auto", facts["state_bytes"]), ("sgd", 0), ("momentum", 1)):
        ended = mipipe("plan", file, "--devices", 1, "--kind", "h100", "--global-batch", 1, "--degrees",
                       "copies=1,zero=0", "--optimizer", optimizer, "--json")
        rank = ended.data["memory"][0]
        assert rank["optimizer_bytes"] == pytest.approx(state * rank["weights_bytes"], rel=1e-3)
        assert rank["gradients_bytes"] == pytest.approx(gradients * rank["weights_bytes"], rel=1e-3)
    assert facts["state_bytes"] == (6 if dtype == "bfloat16" else 2)
    assert "--optimizer adagrad: expected one of auto, none, sgd" in mipipe(
        "plan", file, *DEVICES, "--optimizer", "adagrad").error


@pytest.mark.parametrize("command", ["plan graph.json --devices 8 --kind h100 --global-batch 32 --memory 0GB",
                                     "plan graph.json --cluster c.yaml --microbatches 4 --memory 0B",
                                     "plan graph.json --cluster c.yaml --microbatches 4 --activations 0",
                                     "merge recipe.yaml -o made --memory 0GB",
                                     "tune recipe.yaml -o made --perplexity t.txt --memory 0GB",
                                     "convert recipe.yaml -o made --shard-size 0MB"])
def test_no_memory_is_none(mipipe, command):
    assert "expected a size above 0, such as 80GB" in mipipe(*command.split()).error
