"""Running the models as part of a merge: any ranks, any parts, after interruptions, and what is wrong with data."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import torch
from calibration_fixtures import CONFIGS, LENGTH, family, recipe, write_samples
from merge_fixtures import in_threads

import mipipe
from mipipe.graphs.errors import InfeasibleError, InputError, RunError
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.graphs.serialize import load
from mipipe.planner.actions import ActionKind
from mipipe.planner.merging.lower import lower_merge
from mipipe.planner.merging.plan import plan_recipe
from mipipe.planner.merging.simulate import simulate_merge
from mipipe.planner.timeline import Timeline
from mipipe.runtime.calibration import calibrator, files
from mipipe.runtime.merge.calibrate import open_decoder, with_samples
from mipipe.runtime.merge.calibrate import write_samples as write_samples_of
from mipipe.runtime.merge.launching.launch import MergeOptions
from mipipe.runtime.merge.launching.launch import merge as run
from mipipe.runtime.merge.sources import Surroundings
from mipipe.runtime.merge.worker import begin
from mipipe.runtime.weights.reader import Shelf


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    family(root, "llama")
    for number, name in enumerate("ab", 1):
        write_samples(root / f"{name}.jsonl", number, lengths=(LENGTH, 5))
    return root


def merged(data, out, **options):
    run([parse_recipe(data, "recipe")], out, MergeOptions(**options))
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", [
    "llama", "gemma3", "mixtral",
    *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in ("llama", "gemma3", "mixtral"))])
def test_layer_by_layer_is_the_whole_model(tmp_path, kind):
    """The logits of a decoder of which one layer at a time has weights are those of transformers."""
    model = family(tmp_path, kind)["expert1"].double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    data = parse_recipe({"merge_method": "linear", "dtype": "float64",
                         "models": [{"model": str(tmp_path / "expert1")}]}, "recipe")
    plan = plan_recipe(data, "recipe", tmp_path / "out", {}, 1, None, 10**9)
    ids = torch.randint(64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with Shelf() as shelf, torch.no_grad():
        decoder = open_decoder(plan.graph, 0, Surroundings(plan.graph, shelf, torch.device("cpu")))
        decoder.load_rest(head=True)
        states = decoder.embed(ids)
        for layer in range(decoder.layers):
            decoder.load_layer(layer)
            states = decoder.forward(layer, states)
            decoder.drop_layer(layer)
        assert torch.allclose(decoder.logits(ids, states), model(ids).logits, atol=1e-5)
        assert all(value.is_meta for name, value in decoder.model.named_parameters() if ".layers." in name)


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_ranks_do_not_show(place, tmp_path, method):
    data = recipe(place, method, base=False, parts=3)
    plan = plan_recipe(parse_recipe(data, "recipe"), "recipe", tmp_path / "two", {}, 2, None, 5 * 10**9)
    plan, samples = with_samples(plan, (), "recipe", print, tmp_path)
    write_samples_of(plan, samples, begin(plan, tmp_path / "two"))
    in_threads(plan, tmp_path / "two")
    assert all(plan.streams)
    assert merged(data, tmp_path / "one") == (tmp_path / "two/model.safetensors").read_bytes()
    assert not (tmp_path / "one" / files.FOLDER).exists()


def test_an_interrupted_calibration_goes_on(place, tmp_path, monkeypatch):
    """What is done is not done again, and the bytes are those of an undisturbed run."""
    data = recipe(place, "sens")
    whole = merged(data, tmp_path / "whole")
    steps, original = [], calibrator.Calibrator.step

    def stop(self, index, step):
        if (index, step) == (1, 4):
            raise RunError("stopped")
        original(self, index, step)

    monkeypatch.setattr(calibrator.Calibrator, "step", stop)
    with pytest.raises(RunError, match="stopped"):
        merged(data, tmp_path / "out")
    for name in ("_embed", "_forward", "_loss", "_backward"):
        kept = getattr(calibrator.Calibrator, name)
        monkeypatch.setattr(calibrator.Calibrator, name, lambda self, *given, _kept=kept, _name=name: (
            steps.append(_name), _kept(self, *given)))
    monkeypatch.setattr(calibrator.Calibrator, "step", original)
    assert merged(data, tmp_path / "out", num_ranks=1) == whole
    assert steps == ["_backward", "_backward"]


def test_other_samples_are_another_merge(place, tmp_path):
    data = recipe(place, "regmean", base=False)
    whole = merged(data, tmp_path / "out")
    data["seed"] = 1
    data["calibration"]["samples"] = 3
    assert merged(data, tmp_path / "other") != whole


@pytest.mark.slow
def test_processes_do_not_show(place, tmp_path):
    data = recipe(place, "acm")
    assert merged(data, tmp_path / "one") == merged(data, tmp_path / "two", num_ranks=2)


def test_calibration_is_planned_and_shown(place, tmp_path):
    data = parse_recipe(recipe(place, "acm"), "recipe")
    plan = plan_recipe(data, "recipe", tmp_path / "out", {}, 2, None, 10**9)
    assert [len(streams) for streams in plan.streams] == [1, 1]
    simulated = simulate_merge(plan, lower_merge(plan))
    run([data], tmp_path / "out", MergeOptions(1, timeline=str(tmp_path / "measured.json")))
    measured = load(tmp_path / "measured.json", Timeline)
    for timeline in (simulated, measured):
        spans = [span for span in timeline.spans if span.kind is ActionKind.CALIBRATE]
        assert len(spans) == 2 * 4  # two pairs, each embedding, two layers, head
    assert "beside" in spans[0].label and spans[0].label.endswith("embedding")


def test_a_cap_below_a_layer_is_refused(place, tmp_path):
    with pytest.raises(InfeasibleError, match=r"running .*expert2, loss, takes .*raise --memory"):
        plan_recipe(parse_recipe(recipe(place, "fisher", length=10**6), "recipe"), "recipe", tmp_path / "out", {}, 1,
                    10**9, 10**9)


def without(data, key):
    return {name: value for name, value in data.items() if name != key}


@pytest.mark.parametrize(("change", "message"), [
    ({"samples": 0}, "calibration: samples: found 0, expected at least 1"),
    ({"length": 1}, "calibration: length: found 1, expected at least 2"),
    ({"parts": 9}, "calibration: parts: found 9, expected at most the 6 samples"),
    ({"data": ""}, "has no data; expected a text or JSONL file"),
    ({"colour": 1}, "colour"),
])
def test_a_rule_out_of_range_is_refused(place, change, message):
    data = recipe(place, "regmean", base=False)
    data["models"] = [{"model": item["model"]} for item in data["models"]]
    data["calibration"] |= change
    with pytest.raises(InputError, match=message):
        parse_recipe(data, "recipe")


@pytest.mark.parametrize(("text", "message"), [
    (None, "data: .*lost.jsonl: no such file"),
    ("", "has no sample of two tokens or more"),
    ("{\n", "line 1"),
    ('{"tokens": [1, 99]}\n', "has the token 99, expected 0 to 63"),
    ('{"answer": 3}\n', "sample 1: found .*expected a text"),
    ('{"text": "abc"}\n', "has no tokenizer that can be loaded"),
])
def test_wrong_data_are_refused(place, tmp_path, text, message):
    file = tmp_path / "lost.jsonl"
    if text is not None:
        file.write_text(text)
    data = recipe(place, "regmean", base=False)
    data["models"][1]["calibration"] = str(file)
    with pytest.raises(InputError, match=message) as caught:
        mipipe.merge(data, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_text_needs_the_files_of_a_tokenizer(place, tmp_path):
    """Without them transformers makes an empty tokenizer for some architectures, and every text has no tokens."""
    (tmp_path / "text.txt").write_text("some words\n" * 50)
    data = recipe(place, "regmean", base=False)
    data["models"][1]["calibration"] = str(tmp_path / "text.txt")
    with pytest.raises(InputError, match=r"has no tokenizer that can be loaded .*give a JSONL file with tokens"):
        mipipe.merge(data, tmp_path / "out")


def test_a_method_without_calibration_is_refused(place, tmp_path):
    data = without(recipe(place, "regmean", base=False), "calibration")
    data["models"] = [{"model": item["model"]} for item in data["models"]]
    with pytest.raises(InputError, match="regmean runs the models on samples of text; give the recipe a calibration"):
        mipipe.merge(data, tmp_path / "out")


def test_calibration_does_not_go_with_slices(place):
    data = recipe(place, "regmean", base=False)
    data["slices"] = [{"sources": [{"model": data["models"][0]["model"], "layer_range": [0, 1]}]}]
    del data["models"]
    with pytest.raises(InputError, match="leave out slices, tokenizer, align and adapter"):
        parse_recipe(data, "recipe")


def test_a_loader_is_called_only_if_it_is_named(place, tmp_path, monkeypatch):
    (tmp_path / "my_samples.py").write_text("def rows():\n    return [[1, 2, 3, 4]] * 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "my_samples", None)
    monkeypatch.delitem(sys.modules, "my_samples")
    data = recipe(place, "regmean", base=False)
    for model in data["models"]:
        model["calibration"] = "my_samples:rows"
    with pytest.raises(InputError, match="a recipe calls no code; name the loader"):
        merged(data, tmp_path / "out")
    assert merged(data, tmp_path / "out", loaders=("my_samples:rows",))


def test_a_text_file_is_cut_into_windows(place, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    letters = {chr(ord("a") + number): number for number in range(26)}
    tokenizer = Tokenizer(models.WordLevel(letters | {"?": 26}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "text.txt").write_text("abcdefghij" * 20)
    from mipipe.runtime.calibration.tokens import draw_samples
    found = draw_samples(str(tmp_path / "text.txt"), str(folder), 5, 8, 0, 64)
    assert found.ids.shape == (5, 8) and set(found.lengths.tolist()) == {8}
    again = draw_samples(str(tmp_path / "text.txt"), str(folder), 5, 8, 0, 64)
    other = draw_samples(str(tmp_path / "text.txt"), str(folder), 5, 8, 1, 64)
    assert found.digest == again.digest != other.digest
    for row in found.ids:
        assert all((int(late) - int(early)) % 10 == 1 for early, late in pairwise(row))
