"""Every result is opened as transformers would open it, and values that its dtype cannot hold are refused."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from merge_fixtures import read, state, trio, write
from typer.testing import CliRunner

from mipipe.cli.main import app
from mipipe.graphs.errors import RunError
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, merge
from mipipe.runtime.merge.output import opened, verify
from mipipe.runtime.merge.output.verifier import Verifier
from mipipe.runtime.merge.output.verify import verify_output

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def nothing_opened_before(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def run(data, out, **options):
    lines = []
    merge([parse_recipe(data, "recipe")], out, MergeOptions(verify=True, **options), tell=lines.append)
    return lines


def passthrough(folder):
    return {"merge_method": "passthrough", "models": [{"model": str(folder)}]}


def without(tensors):
    return {name: value for name, value in tensors.items() if not name.endswith("1.self_attn.q_proj.weight")}


@pytest.mark.parametrize(("change", "config", "message"), [
    (without, {}, "lacks model.layers.1.self_attn.q_proj.weight of the LlamaForCausalLM"),
    (lambda tensors: {**tensors, "model.extra.weight": torch.ones(2, 2)}, {}, "has model.extra.weight, which"),
    (dict, {"intermediate_size": 12}, r"mlp.*has shape \[.*16.*\] in the result, but .* describes"),
    (dict, {"num_hidden_layers": 3}, "lacks model.layers.2.* and 8 more tensors"),
    (dict, {"num_attention_heads": "two"}, "config.json: transformers makes no"),
])
def test_a_result_that_would_not_load_is_not_called_done(tmp_path, change, config, message):
    write(tmp_path / "a", change(state(0)), config)
    with pytest.raises(RunError, match=message):
        run(passthrough(tmp_path / "a"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    merge([parse_recipe(passthrough(tmp_path / "a"), "recipe")], tmp_path / "out", MergeOptions(verify=False))
    assert not (tmp_path / "out" / "verify").exists() and not (tmp_path / "out.partial").exists()


def test_token_ids_beyond_the_table(tmp_path):
    folder = write(tmp_path / "a", state(0))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 11}}, "added_tokens": []}))
    with pytest.raises(RunError, match=r"'b' has the id 11, but model\.embed_tokens\.weight has 11 rows"):
        run(passthrough(folder), tmp_path / "out")


def test_an_architecture_that_transformers_does_not_have_is_said(tmp_path):
    write(tmp_path / "a", state(0), {"architectures": ["OwnModel"]})
    assert run(passthrough(tmp_path / "a"), tmp_path / "out") == [
        "the result was not opened with transformers: it has no architecture 'OwnModel'"]


def dense(**more):
    return {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, **more}


@pytest.mark.parametrize(("config", "more"), [
    ("LlamaConfig", {}), ("Qwen2Config", {"tie_word_embeddings": True}), ("GPT2Config", {"n_embd": 16, "n_layer": 2}),
    ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": [1]}),
    ("MixtralConfig", {"num_local_experts": 4}), ("Gemma2Config", {}), ("Phi3Config", {"pad_token_id": 0})])
def test_what_transformers_saves_it_would_load(tmp_path, config, more):
    """Experts stored one by one or fused, tied heads, fused projections: no false alarm."""
    settings = getattr(transformers, config)(**dense(**more))
    model = transformers.AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(tmp_path / "a")
    assert verify_output(tmp_path / "a") == ""


@pytest.mark.parametrize(("dtype", "value", "held"), [("float16", 70000.0, False), ("float16", 65519.0, True),
                                                      ("float16", -65520.0, False), ("bfloat16", 3.4e38, False),
                                                      ("bfloat16", 70000.0, True)])
def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path, dtype, value, held):
    tensors = state(0)
    tensors["model.norm.weight"][3] = value
    write(tmp_path / "a", tensors)
    data = {**passthrough(tmp_path / "a"), "out_dtype": dtype}
    if held:
        run(data, tmp_path / "out")
        assert np.isfinite(read(tmp_path / "out")["model.norm.weight"].float().numpy()).all()
        return
    with pytest.raises(RunError, match=rf"model.norm.weight: has values up to {abs(value):.6g}".replace("+", r"\+")):
        run(data, tmp_path / "out")


def test_cropped_tables_make_the_vocabulary_the_config_says(tmp_path):
    for name, rows in (("a", 11), ("b", 13)):
        write(tmp_path / name, state(rows, vocabulary=rows), {"vocab_size": rows})
    data = {"merge_method": "linear", "mismatch": "submatrix",
            "models": [{"model": f"{tmp_path}/{name}"} for name in "ba"]}
    run(data, tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 11


@pytest.mark.parametrize("how", ["forked", "dead", "here"])
def test_verification_in_a_fork_says_the_same(tmp_path, how):
    """Also where the fork has died, or there is none."""
    folder = write(tmp_path / "a", without(state(0)))
    with Verifier("LlamaForCausalLM", how != "here") as verifier:
        if how == "dead":
            os.kill(verifier._child[0], signal.SIGKILL)
        with pytest.raises(RunError, match=r"lacks model\.layers\.1\.self_attn"):
            verifier.check(folder)
    good = write(tmp_path / "b", state(0))
    with Verifier("LlamaForCausalLM", how != "here") as verifier:
        assert verifier.check(good) == ""


def test_the_command_verifies_unless_told_not_to(tmp_path):
    trio(tmp_path)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(passthrough(tmp_path / "base")))
    call = ["merge", str(recipe), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == RunError.exit_code and "--no-verify" in result.output
    assert CliRunner().invoke(app, [*call, "--no-verify"]).exit_code == 0


def test_what_was_opened_once_is_not_opened_again(tmp_path, monkeypatch):
    """The result of another merge with the same config and tensors; nothing else that differs in anything."""
    made = []
    monkeypatch.setattr(verify, "_meta_model", lambda *given, make=verify._meta_model: made.append(1) or make(*given))
    folder = write(tmp_path / "a", state(0))
    result = merge([parse_recipe(passthrough(folder), "recipe")], tmp_path / "one", MergeOptions(verify=True))
    assert made == [1] and opened.was_opened(opened.key_of_graph(result.plan.graph))
    write(tmp_path / "b", state(1))
    run(passthrough(tmp_path / "b"), tmp_path / "two")
    assert made == [1]
    others = [(without(state(0)), {}, False), (without(state(0)), {}, False), (state(0), {"rope_theta": 5.0}, True),
              (state(0), {"intermediate_size": 12}, False),
              ({name: value.half() for name, value in state(0).items()}, {}, True)]
    for number, (tensors, config, held) in enumerate(others):
        write(tmp_path / f"c{number}", tensors, config)
        if held:
            assert verify_output(tmp_path / f"c{number}") == ""
        else:
            with pytest.raises(RunError):
                verify_output(tmp_path / f"c{number}")
        assert len(made) == number + 2


def test_another_transformers_opens_again(monkeypatch):
    tensors = [("a", (2, 3), "F32")]
    key = opened.key_of({"model_type": "llama"}, tensors)
    opened.note_opened(key, "LlamaForCausalLM")
    assert opened.was_opened(key) and not opened.was_opened(None)
    found = opened.importlib.metadata.distribution

    class Edited:
        """An installation whose files change in place."""

        version, read_text = "9", {"RECORD": "a,b", "direct_url.json": '{"dir_info": {"editable": true}}'}.get
        locate_file = found("transformers").locate_file

    class Newer(Edited):
        read_text = {"RECORD": "a,c"}.get

    class Elsewhere(Newer):
        """What is imported is a checkout ahead on the path."""

        locate_file = staticmethod(lambda name: f"/elsewhere/{name}")

    class Odd(Newer):
        read_text = {"RECORD": "a,c", "direct_url.json": "{"}.get

    class Odder(Newer):
        read_text = {"RECORD": "a,c", "direct_url.json": '{"dir_info": 3}'}.get

    keys = {}
    for other in (Edited, Newer, Elsewhere, Odd, Odder):
        monkeypatch.setattr(opened.importlib.metadata, "distribution",
                            lambda name, other=other: other if name == "transformers" else found(name))
        keys[other] = opened.key_of({"model_type": "llama"}, tensors)
        assert not opened.was_opened(keys[other])
    assert keys.pop(Newer) not in (key, None) and set(keys.values()) == {None}
    monkeypatch.undo()
    assert opened.key_of({"model_type": "mipipe_mixtral"}, tensors) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert verify_output(write(tmp_path / "a", state(0))) == ""


def test_a_source_that_was_edited_in_place_opens_again(tmp_path, monkeypatch):
    """As people patch an installed transformers; its RECORD stays."""
    (tmp_path / "transformers" / "models").mkdir(parents=True)
    source = tmp_path / "transformers" / "models" / "modeling_own.py"
    source.write_text("width = 1")
    (tmp_path / "transformers" / "__init__.py").write_text("")
    spec = opened.importlib.util.spec_from_file_location("transformers", tmp_path / "transformers" / "__init__.py")
    monkeypatch.setattr(opened.importlib.util, "find_spec", lambda _name: spec)
    found = opened.importlib.metadata.distribution("transformers")
    monkeypatch.setattr(type(found), "locate_file", lambda _self, name: tmp_path / name)
    key = opened.key_of({"model_type": "own"}, [])
    assert key is not None and key == opened.key_of({"model_type": "own"}, [])
    source.write_text("width = 2")
    os.utime(source, ns=(1, 1))
    assert opened.key_of({"model_type": "own"}, []) not in (key, None)


@pytest.mark.parametrize("entry", ["empty", "cut", "other", "folder", "pipe", "link", "binary"])
def test_an_entry_that_is_no_whole_one_of_this_check_is_none(tmp_path, entry):
    """It opens again, does not wait, and is replaced where it can be."""
    files = write(tmp_path / "a", state(0))
    checkpoint = verify.read_checkpoint(files)
    key = opened.key_of(checkpoint.config, ((name, item.shape, item.dtype)
                                            for name, item in checkpoint.tensors.items()))
    path = opened.cache_folder("opened") / key
    path.parent.mkdir(parents=True)
    whole = f"LlamaForCausalLM of transformers 5 opened {key}\n"
    if entry == "folder":
        path.mkdir()
    elif entry == "pipe":
        os.mkfifo(path)
    elif entry == "link":
        (tmp_path / "whole").write_text(whole)
        path.symlink_to(tmp_path / "whole")
    else:
        content = {"empty": "", "cut": whole[:-1], "other": whole.replace(key, "0" * 32), "binary": "\x00\udcff"}[entry]
        path.write_bytes(content.encode(errors="surrogateescape"))
    assert not opened.was_opened(key)
    bad = write(tmp_path / "b", without(state(0)))
    with pytest.raises(RunError):
        verify_output(bad)
    assert verify_output(files) == ""
    assert opened.was_opened(key) == (entry in ("empty", "cut", "other", "binary"))


def test_the_entry_of_another_user_is_none(monkeypatch):
    key = opened.key_of({"model_type": "llama"}, [])
    opened.note_opened(key, "LlamaForCausalLM")
    assert opened.was_opened(key)
    monkeypatch.setattr(opened.os, "geteuid", lambda: 4321)
    assert not opened.was_opened(key)


def test_many_merges_at_once_drop_old_entries(monkeypatch):
    monkeypatch.setattr(opened, "KEPT", 3)
    keys = [f"{number:032x}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: opened.note_opened(key, "Own"), keys))
    opened.note_opened(keys[0], "Own")
    assert opened.was_opened(keys[0]) and len(list(opened.cache_folder("opened").iterdir())) == 3


def test_a_user_without_a_home_has_no_cache(tmp_path):
    """A container's: no HOME, and no name in /etc/passwd."""
    code = ("import os, pathlib; os.environ.pop('HOME', None); pathlib.os.path.expanduser = lambda path: path;"
            "from mipipe.runtime.merge.output import opened; from mipipe.graphs.merging.checkpoints.hub_cache import"
            " cached_model; key = opened.key_of({'layers': 1}, []); opened.note_opened(key, 'Own');"
            "print(key is not None, opened.was_opened(key), cached_model('a/b'))")
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False,
                          env=environment, cwd=tmp_path)
    assert done.stdout == "True False None\n", done.stderr


def test_entries_that_were_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(opened, "KEPT", 2)
    keys = [opened.key_of({"layers": layers}, []) for layers in range(3)]
    folder = opened.cache_folder("opened")
    for place, key in enumerate(keys[:2]):
        opened.note_opened(key, "Own")
        os.utime(folder / key, (place + 1, place + 1))
    assert opened.was_opened(keys[0])  # used again
    opened.note_opened(keys[2], "Own")
    assert [opened.was_opened(key) for key in keys] == [True, False, True]


@pytest.mark.slow
def test_the_merging_process_does_without_transformers(tmp_path):
    """Whether the result is opened by a fork, or was before."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(passthrough(write(tmp_path / "a", state(0)))))
    code = ("import sys, time; from typer.testing import CliRunner; from mipipe.cli.main import app; "
            "result = CliRunner().invoke(app, sys.argv[1:]); print(result.output, result.exit_code); "
            "sys.exit(result.exit_code or 'transformers' in sys.modules)")
    for out in ("one", "two"):
        done = subprocess.run([sys.executable, "-c", code, "merge", str(recipe), "-o", str(tmp_path / out)],
                              capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / out / "model.safetensors").exists()
