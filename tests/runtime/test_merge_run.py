"""Whole merges on disk: equal to the mathematics in memory, on any ranks and cap, from any shards, after any crash."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from merge_fixtures import in_threads, read, recipe_for, state, trio, write

from mipipe.graphs.errors import InfeasibleError
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass, classify, layer_index
from mipipe.graphs.merging.method_table.method_spec import Scope
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.planner.merging.plan import SHARD_BYTES, plan_recipe
from mipipe.runtime.merge import forked
from mipipe.runtime.merge.launching.launch import MergeOptions, merge
from mipipe.runtime.merge.methods.method import fill, merge_tensors
from mipipe.runtime.merge.methods.registry import BY_METHOD, METHODS
from mipipe.runtime.weights import writer as output


def run(data, out, **options):
    recipes = [parse_recipe(item, "recipe") for item in (data if isinstance(data, list) else [data])]
    return merge(recipes, out, MergeOptions(**{"verify": False, **options}))


def run_threads(data, out, ranks, cap=None):
    """The same merge with several ranks in one process."""
    plan = plan_recipe(parse_recipe(data, "recipe"), "recipe", out, {}, ranks, cap, SHARD_BYTES)
    in_threads(plan, out)
    return plan


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base and three experts, two shards each."""
    folder = tmp_path_factory.mktemp("models")
    trio(folder)
    return folder


@pytest.mark.parametrize("name", [method.spec.name for method in METHODS
                                  if not (method.spec.runs_models or method.spec.factors)])
def test_a_merge_on_disk_equals_the_merge_in_memory(name, root, tmp_path):
    """I5 and I6, tensor by tensor; integer tensors are the base's (or first model's)."""
    method = BY_METHOD[name]
    data = recipe_for(name, root)
    run(data, tmp_path / "out")
    found, base = read(tmp_path / "out"), read(root / "base")
    models = [read(Path(model["model"])) for model in data["models"]]
    assert set(found) == set(base)
    for key, value in found.items():
        assert value.shape == base[key].shape and value.dtype == base[key].dtype
        if not value.is_floating_point():
            assert torch.equal(value, base[key])
            continue
        values = fill(method, data["parameters"], len(models))
        kind = classify(key, tuple(value.shape), "F32")
        if method.scope(**values) is not Scope.PIECE and kind in method.spec.classes:
            continue  # statistics over several tensors: see below
        expected = merge_tensors(method, base[key] if "base_model" in data else None, [model[key] for model in models],
                                 data["parameters"], key=key, layer=layer_index(key), num_layers=2, tensor_class=kind)
        assert torch.equal(value, expected), key


def test_frank_takes_norms_over_whole_layers(root, tmp_path):
    run(recipe_for("frank", root), tmp_path / "out")
    found, base = read(tmp_path / "out"), read(root / "base")
    experts = [read(root / f"expert{seed}") for seed in (1, 2, 3)]
    for layer in range(2):
        names = [name for name in base if f"layers.{layer}." in name]
        energies = [sum(float((expert[name] - base[name]).double().square().sum()) for name in names)
                    for expert in experts]
        for name in names:
            expected = base[name] + sum(energy / sum(energies) * (expert[name] - base[name])
                                        for energy, expert in zip(energies, experts, strict=True))
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
    assert torch.equal(found["lm_head.weight"], experts[0]["lm_head.weight"])


def test_ties_over_the_whole_model_has_one_threshold(root, tmp_path):
    data = recipe_for("ties", root, parameters={"density": 0.2, "scope": "model"})
    data["models"] = data["models"][:1]
    run(data, tmp_path / "out")
    found, base, expert = read(tmp_path / "out"), read(root / "base"), read(root / "expert1")
    names = [name for name in base if base[name].is_floating_point()]
    deltas = torch.cat([(expert[name] - base[name]).flatten() for name in sorted(names)])
    bound = deltas.abs().sort(descending=True).values[int(0.2 * len(deltas))]
    for name in names:
        delta = expert[name] - base[name]
        torch.testing.assert_close(found[name], base[name] + torch.where(delta.abs() >= bound, delta, 0.0),
                                   rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "changes"), [
    ("linear", {}), ("ties", {"parameters": {"density": 0.3, "scope": "model", "rescale": True}}), ("doge", {}),
    ("widen", {}), *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("dare_ties", "frank", "slerp", "tsvm",
                                                                                 "karcher", "sce")),
])
def test_ranks_and_memory_caps_do_not_show_in_the_result(name, changes, root, tmp_path):
    data = recipe_for(name, root, **changes)
    run(data, tmp_path / "one")
    expected = (tmp_path / "one" / "model.safetensors").read_bytes()
    for ranks, cap in ((2, None), (4, None), (3, 10**8)):
        plan = run_threads(data, tmp_path / f"out{ranks}", ranks, cap)
        assert sorted(index for rank in plan.ranks for index in rank) == list(range(len(plan.graph.units)))
        assert (tmp_path / f"out{ranks}" / "model.safetensors").read_bytes() == expected


def test_shards_of_inputs_and_output_do_not_show_in_the_result(root, tmp_path):
    other = tmp_path / "resharded"
    for name in ("base", "expert1", "expert2", "expert3"):
        write(other / name, read(root / name), shards=1)
    run(recipe_for("ties", root), tmp_path / "a")
    run(recipe_for("ties", other), tmp_path / "b", shard_bytes=1500)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert set(a) == set(index["weight_map"]) and all(torch.equal(a[name], b[name]) for name in a)
    for file in set(index["weight_map"].values()):
        assert (tmp_path / "b" / file).stat().st_size < 3000


IN_TWO = """
import sys
from pathlib import Path
from mipipe.runtime.merge import forked
from mipipe.runtime.merge.launching import launch
if sys.argv[3] != "fork":
    launch.can_fork = lambda: False
if sys.argv[3] == "torchrun":
    launch.forks_here = lambda: False
assert forked.can_fork()  # a process with one thread
done = []
launch.merge(Path(sys.argv[1]), Path(sys.argv[2]), launch.MergeOptions(num_ranks=2, verify=False),
             lambda *share: done.append(share))
assert sys.argv[3] != "fork" or done[-1][0] == done[-1][1], done
"""
"""Two ranks, from a process of its own: that of the tests has threads, and is not forked."""


@pytest.mark.distributed
@pytest.mark.parametrize("started_by", ["fork", pytest.param("child", marks=pytest.mark.slow),
                                        pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_give_the_same_bytes(root, tmp_path, started_by):
    """Forks of the process, of one that it starts, or torchrun's."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for("frank", root)))
    merge(recipe, tmp_path / "one", MergeOptions(verify=False))
    subprocess.run([sys.executable, "-c", IN_TWO, recipe, tmp_path / "two", started_by], check=True, timeout=120)
    assert ((tmp_path / "one" / "model.safetensors").read_bytes()
            == (tmp_path / "two" / "model.safetensors").read_bytes())
    assert not (tmp_path / "two.partial").exists()


def test_a_process_with_threads_is_not_forked():
    """A fork has the locks of threads that it does not have: whoever waits for one waits for ever."""
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait)
    thread.start()
    try:
        assert not forked.can_fork()
    finally:
        leave.set()
        thread.join()


def weights_of(folder):
    """The bytes of a folder's only weights file."""
    return (folder / "model.safetensors").read_bytes()


class Crash(Exception):
    """Stands for a process that dies."""


@pytest.mark.parametrize("name", ["dare_ties", "frank"])
def test_an_interrupted_merge_continues_where_it_stopped(name, root, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "JOURNAL_BYTES", 1)
    recipes = [parse_recipe(recipe_for(name, root), "recipe")]
    merge(recipes, tmp_path / "whole")

    def crash(done, total):
        if done > total / 2:
            raise Crash

    with pytest.raises(Crash):
        merge(recipes, tmp_path / "out", progress=crash)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    result = merge(recipes, tmp_path / "out")
    (report,) = result.reports
    assert report["resumed"] > 5 and report["units"] > 3
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_more_ranks_may_continue_what_one_began(root, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "JOURNAL_BYTES", 1)
    data = recipe_for("sce", root)

    def crash(done, total):
        if done > total / 2:
            raise Crash

    with pytest.raises(Crash):
        merge([parse_recipe(data, "recipe")], tmp_path / "out", progress=crash)
    run_threads(data, tmp_path / "out", 3)
    run(data, tmp_path / "whole")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_a_folder_that_is_no_unfinished_merge_is_not_touched(root, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(Exception, match=r"out\.partial: exists and is no unfinished merge"):
        run(recipe_for("linear", root), tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


@pytest.mark.slow
def test_a_killed_process_leaves_no_result_and_can_be_continued(root, tmp_path):
    """SIGKILL in the middle, from a process of its own."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for("ties", root)))
    program = f"""
import os, signal
from mipipe.runtime.weights import writer as output
from mipipe.runtime.merge.launching import launch
output.JOURNAL_BYTES = 1
def die(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
launch.merge({str(recipe)!r}, {str(tmp_path / "out")!r}, progress=die)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    result = merge(recipe, tmp_path / "out")
    assert result.reports[0]["resumed"] > 5
    merge(recipe, tmp_path / "whole")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_after_a_restart_of_the_machine_the_journal_does_not_count(root, tmp_path, monkeypatch):
    recipes = [parse_recipe(recipe_for("linear", root), "recipe")]

    def crash(done, total):
        raise Crash

    with pytest.raises(Crash):
        merge(recipes, tmp_path / "out", progress=crash)
    monkeypatch.setattr(output, "boot_id", lambda: "another boot")
    assert merge(recipes, tmp_path / "out").reports[0]["resumed"] == 0


def test_an_unfinished_merge_of_another_recipe_is_not_touched(root, tmp_path):
    def crash(done, total):
        raise Crash

    with pytest.raises(Crash):
        merge([parse_recipe(recipe_for("linear", root), "recipe")], tmp_path / "out", progress=crash)
    with pytest.raises(Exception, match=r"out\.partial: holds an unfinished merge of another recipe"):
        run(recipe_for("ties", root), tmp_path / "out")
    assert (tmp_path / "out.partial" / "model.safetensors").exists()


def test_memory_cap_below_the_largest_tensor(root, tmp_path):
    with pytest.raises(InfeasibleError, match=r"memory cap 1.00 kB per rank: merging .* raise --memory"):
        run(recipe_for("linear", root), tmp_path / "out", memory_cap=1_000)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_output_dtypes_and_subtraction_in_float32(tmp_path):
    """bf16 inputs: the merge is that of the float32 values, cast once."""
    weights = trio(tmp_path, dtype=torch.bfloat16)
    run(recipe_for("task_arithmetic", tmp_path, parameters={"lambda": 0.7}), tmp_path / "out")
    found = read(tmp_path / "out")
    for name, base in weights["base"].items():
        if not base.is_floating_point():
            continue
        exact = base.float()
        for seed in (1, 2, 3):
            exact = exact.add(weights[f"expert{seed}"][name].float() - base.float(), alpha=0.7)
        assert torch.equal(found[name], exact.to(torch.bfloat16))
    run(recipe_for("linear", tmp_path, out_dtype="float16"), tmp_path / "half")
    half = read(tmp_path / "half")
    assert {value.dtype for name, value in half.items() if name != "model.position_ids"} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_chained_recipes(root, tmp_path):
    first = {**recipe_for("linear", root), "name": "soup"}
    second = {"merge_method": "slerp", "base_model": f"{root}/base", "models": [{"model": "soup"}],
              "parameters": {"t": 0.5}}
    run([first, second], tmp_path / "out")
    found, base = read(tmp_path / "out"), read(root / "base")
    experts = [read(root / f"expert{seed}") for seed in (1, 2, 3)]
    for name, value in found.items():
        if value.is_floating_point():
            soup = sum(expert[name] for expert in experts) / 3
            torch.testing.assert_close(value, merge_tensors(BY_METHOD["slerp"], None, [base[name], soup], {"t": 0.5}),
                                       rtol=0, atol=1e-6)
    assert not (tmp_path / "out.steps").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## How soup was made" in card and f"| {root}/expert3 | apache-2.0 |" in card
    assert "### Recipe" in card.split("## How soup")[1]


def test_the_model_card_names_sources_method_and_licences(tmp_path):
    weights = trio(tmp_path)
    write(tmp_path / "other", state(7, weights["base"]), licence="mit")
    data = recipe_for("ties", tmp_path)
    data["models"].append({"model": f"{tmp_path}/other"})
    run(data, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "other" and "merge" in head["tags"] and "normalize true" in card
    assert f"{tmp_path}/other | mit" in card and "arXiv 2306.01708" in card
    again = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert dataclasses.replace(parse_recipe(again, "card")) == parse_recipe(data, "recipe")


@pytest.mark.parametrize(("found", "wanted"), [
    (["{{ a }}", None, "{{ b }}", "{{ b }}"], "{{ b }}"), (["{{ a }}", "{{ b }}", None, None], "{{ a }}"),
    ([None, None, None, None], None)])
def test_auto_takes_the_chat_template_most_models_have(found, wanted, tmp_path):
    trio(tmp_path)
    for folder, template in zip(("base", "expert1", "expert2", "expert3"), found, strict=True):
        if folder == "expert3" and template:  # the older place for it
            (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        elif template:
            (tmp_path / folder / "chat_template.jinja").write_text(template)
    recipe = parse_recipe(recipe_for("ties", tmp_path, chat_template="auto"), "recipe")
    merge([recipe], tmp_path / "out")
    place = tmp_path / "out" / "chat_template.jinja"
    assert (place.read_text() if place.exists() else None) == wanted


def test_chat_templates_with_names(tmp_path):
    """A list of them has a default, which counts; files of further ones go with the model."""
    trio(tmp_path)
    named = [{"name": "tool_use", "template": "{{ t }}"}, {"name": "default", "template": "{{ d }}"}]
    for folder in ("expert1", "expert2"):
        (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ a }}")
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ t }}")
    merge([parse_recipe(recipe_for("ties", tmp_path, chat_template="auto"), "recipe")], tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ d }}"
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ t }}"


def test_classes_of_the_tiny_transformer(root):
    kinds = {name: classify(name, tuple(value.shape), "F32" if value.is_floating_point() else "I64")
             for name, value in read(root / "base").items()}
    assert kinds["model.embed_tokens.weight"] is TensorClass.EMBEDDING
    assert kinds["lm_head.weight"] is TensorClass.HEAD
    assert kinds["model.norm.weight"] is TensorClass.VECTOR
    assert kinds["model.position_ids"] is TensorClass.BUFFER
    assert kinds["model.layers.0.self_attn.q_proj.weight"] is TensorClass.MATRIX


@pytest.mark.slow
@pytest.mark.parametrize("start", ["run_forked(lambda ranks: time.sleep(1), 2, print)",
                                   "Verifier('LlamaForCausalLM', True).__enter__()"])
def test_a_signal_while_forking_is_not_lost(start):
    """Python ignores what is raised in the functions that it calls around a fork."""
    code = ("import os, signal, time\n"
            "from mipipe.runtime.merge.forked import run_forked\n"
            "from mipipe.runtime.merge.output.verifier import Verifier\n"
            "def interrupted(number, frame): raise KeyboardInterrupt\n"
            "signal.signal(signal.SIGTERM, interrupted)\n"
            "def hit(): os.kill(os.getpid(), signal.SIGTERM)\n"
            "os.register_at_fork(after_in_parent=hit)\n"
            f"try:\n    {start}\n    print('lost')\n"
            "except KeyboardInterrupt:\n    print('told')\n"
            "try:\n    os.waitpid(-1, 0)\n    print('left one')\n"
            "except ChildProcessError:\n    print('none left')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "told\nnone left\n", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_sigterm_leaves_nothing_but_what_is_done(root, tmp_path):
    """No temporary folder, no rank; the same command goes on. Exit code 130."""
    steps = {"parameters": {"steps": 3000}}  # seconds of merging
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_for("wudi", root, **steps)))
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "mipipe.cli.main", "merge", str(tmp_path / "recipe.yaml"), "-o",
               str(tmp_path / "out"), "--ranks", "2", "--no-verify"]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stderr=subprocess.PIPE,
                               text=True)
    deadline = time.monotonic() + 120
    while len(processes(tmp_path)) < 3:  # the command, and its ranks
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.terminate()
    assert "mipipe: interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130
    assert not list((tmp_path / "tmp").glob("mipipe-merge-*")) and not (tmp_path / "out").exists()
    assert not processes(tmp_path)
    assert subprocess.run(command, timeout=300).returncode == 0
    assert (tmp_path / "out" / "config.json").exists()


def processes(folder):
    """Those whose command line names a folder."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in cmdline(path)]


def cmdline(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
