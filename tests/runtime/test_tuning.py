"""Searching free values and measuring models: spaces, surrogates, searches, journals, MergeBench's figures."""

from __future__ import annotations

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from calibration_fixtures import family, write_samples

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.tuning.space import space_of
from mipipe.runtime.tuning import tune as tuning
from mipipe.runtime.tuning.objectives import Measure, Objectives
from mipipe.runtime.tuning.protocol import evaluate_models, normalised_performance, read_models
from mipipe.runtime.tuning.search import Bayesian, Evolution, Surrogates, make_search
from mipipe.runtime.tuning.surrogate import (
    angles_of,
    bin_scores,
    bins_of,
    directions,
    fit,
    left_out,
    not_dominated,
    num_coefficients,
)
from mipipe.runtime.tuning.tune import TuneOptions, tune


def space(size=2, low=0.0, high=1.0):
    return space_of([{"parameters": {f"w{number}": {"search": [low, high]} for number in range(size)}}], "recipe")


# Spaces ---------------------------------------------------------------------------------------------------------------


def test_free_values_stand_anywhere():
    data = {"models": [{"model": "a", "parameters": {"weight": [{"search": [0, 2]}, 0.5]}}],
            "parameters": {"density": [{"filter": "mlp", "value": {"choose": [0.2, 0.4]}}],
                           "steps": {"search": [1, 9], "integer": True}}}
    found = space_of([data], "recipe")
    assert [item.name for item in found.free] == ["models.0.weight.0", "density.0", "steps"]
    assert found.point([0.5, 0.99, 0.5]) == (1.0, 0.4, 5)
    made = found.documents_at((1.5, 0.2, 3))[0]
    assert made["models"][0]["parameters"]["weight"] == [1.5, 0.5]
    assert made["parameters"] == {"density": [{"filter": "mlp", "value": 0.2}], "steps": 3}
    assert data["parameters"]["steps"] == {"search": [1, 9], "integer": True}
    assert len(found.grid(3)) == 3 * 2 * 3 and found.grid(3)[0] == (0.0, 0.2, 1)


def test_places_of_one_name_have_one_value():
    """A chain of three documents with one step length: three points, not 27."""
    free = {"choose": [0.1, 0.3, 0.5], "as": "eta"}
    found = space_of([{"parameters": {"eta": free}} for _ in range(3)], "recipe")
    assert [item.name for item in found.free] == ["eta"] and found.grid(3) == [(0.1,), (0.3,), (0.5,)]
    assert found.documents_at((0.3,)) == [{"parameters": {"eta": 0.3}}] * 3
    one = {"search": [0, 1], "as": "x"}
    ranges = space_of([{"a": one, "b": [{"search": [0, 1]}, one]}], "")
    assert [item.name for item in ranges.free] == ["x", "b.0"]
    assert ranges.documents_at((0.5, 0.25)) == [{"a": 0.5, "b": [0.25, 0.5]}]


def test_every_value_has_a_name_of_its_own():
    """Documents of a chain leave the same place open: their numbers tell the values apart."""
    free = {"search": [0, 1]}
    chain = space_of([{"parameters": {"t": free, "eta": free}}, {"parameters": {"t": free}}], "recipe")
    assert [item.name for item in chain.free] == ["0.t", "eta", "1.t"]
    assert chain.documents_at((0.1, 0.2, 0.3))[1] == {"parameters": {"t": 0.3}}
    nested = {"models": {"parameters": {"w": free}}, "w": free}  # named alike in one document: no number helps
    assert len({item.name for item in space_of([nested], "recipe").free}) == 2


@pytest.mark.parametrize(("data", "message"), [
    ({"a": {"search": [0, 1], "as": "b"}, "b": {"search": [0, 1]}},
     r"parameters\.b: found the name b, which the value at parameters\.a has"),
    ({"b": {"search": [0, 1]}, "a": {"search": [0, 1], "as": "b"}},
     r"parameters\.a: found the name b, which the value at parameters\.b has"),
    ({"a": {"search": [0, 1]}, "value": {"a": {"search": [0, 1]}}}, r"found the name 0\.a, which .* has"),
    ({"a": {"search": [0, 1], "as": ""}}, "a: as: found '', expected a name"),
    ({"a": {"search": [0, 1], "as": 3}}, "as: found 3, expected a name"),
    ({"a": {"search": [0, 1], "as": "x"}, "b": {"search": [0, 2], "as": "x"}},
     r"parameters\.b: as: x is another range or choice at parameters\.a"),
    ({"a": 1}, "leaves no value open"),
    ({"a": {"search": [1, 0]}}, "expected \\[low, high\\] with low below high"),
    ({"a": {"search": 3}}, "expected \\[low, high\\]"),
    ({"a": {"choose": []}}, "expected a list of values"),
    ({"a": {"search": [0, 1], "choose": [1]}}, "expected search .* or choose"),
])
def test_wrong_spaces_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        space_of([{"parameters": data}], "recipe")


def test_a_grid_too_large_is_refused():
    with pytest.raises(InputError, match=r"are 100000000 merges; give fewer points"):
        space(8).grid(10)


# Surrogates -----------------------------------------------------------------------------------------------------------


def test_a_quadratic_is_found_again_from_twelve_points():
    """M_1 = 1 - (c_1 - 1)^2 - 0.5 c_2^2, coefficients [c1^2, c2^2, c1 c2, c1, c2, 1]."""
    points = np.random.default_rng(0).random((12, 2))
    scores = 1 - (points[:, 0] - 1) ** 2 - 0.5 * points[:, 1] ** 2
    assert np.allclose(fit(points, scores).coefficients, [-1, -.5, 0, 2, 0, 0])
    assert left_out(points, scores) == pytest.approx(1.0)
    assert num_coefficients(2) == 6 and num_coefficients(3) == 10 and num_coefficients(8) == 45


def test_losses_stay_above_zero():
    points = np.random.default_rng(0).random((30, 1))
    scores = np.logaddexp(0, 3 * points[:, 0] - 2)
    assert np.allclose(fit(points, scores, "softplus")(points), scores)


def test_the_preferred_point_of_two_quadratics():
    """The optimum by hand: c_1 = w / (w + .5 (1 - w)), and (2/3, 2/3) for equal preferences."""
    for weight in (0.5, 0.8):
        search = Surrogates(space(), 30, 0, {"one": weight, "two": 1 - weight})
        best, value = None, -math.inf
        while asked := search.ask():
            found = [((a, b), {"one": 1 - (a - 1) ** 2 - 0.5 * b ** 2, "two": 1 - (b - 1) ** 2 - 0.5 * a ** 2})
                     for a, b in asked]
            search.tell(found)
            for point, scores in found:
                mixed = weight * scores["one"] + (1 - weight) * scores["two"]
                best, value = (point, mixed) if mixed > value else (best, value)
        wanted = (weight / (weight + .5 * (1 - weight)), (1 - weight) / ((1 - weight) + .5 * weight))
        assert best == pytest.approx(wanted, abs=0.05)
        assert search.facts()["r_squared"] == {"one": 1.0, "two": 1.0}


def nested(experts, budget, score_of, weights=None, seed=0):
    """A nested search to its end: the points it asked for, their scores, and its facts."""
    search = make_search("nested-map", space(experts), budget, 5, seed, weights or {})
    points = []
    while asked := search.ask():
        points += [(values, score_of(np.array(values))) for values in asked]
        search.tell(points[-len(asked):])
    return points, search.facts()


def apart(values):
    """M_t = 1 - (c_t - 1)^2 - 0.5 sum of the others' squares."""
    return {f"s{t}": 1 - (values[t] - 1) ** 2 - 0.5 * (np.delete(values, t) ** 2).sum() for t in range(len(values))}


def test_nested_map_of_two_is_map_and_of_more_goes_pair_by_pair():
    """T = 2: the preferred point of two quadratics, (2/3, 2/3) with scores of 2/3; T experts take T + 21 (T - 1)
    points, a fifth of a pair's with equal scalings; every quadratic is exact, and the end is near the best there is."""
    points, facts = nested(2, 60, apart)
    assert len(points) == 2 + 21 and facts["pairs"][0]["r_squared"] == [1.0, 1.0]
    assert sum(values[0] == values[1] for values, _ in points[2:22]) == 4
    assert points[-1][0] == pytest.approx([2 / 3, 2 / 3], abs=0.02)
    assert list(points[-1][1].values()) == pytest.approx([2 / 3, 2 / 3], abs=0.02)
    w = 0.8
    values = nested(2, 60, apart, {"s0": w, "s1": 1 - w})[0][-1][0]
    assert values == pytest.approx([w / (w + 0.5 * (1 - w)), (1 - w) / ((1 - w) + 0.5 * w)], abs=0.03)
    points, facts = nested(4, 200, apart)
    assert len(points) == 4 + 21 * 3 and [sum(map(len, pair["of"])) for pair in facts["pairs"]] == [2, 2, 4]
    best = 4 * (1 - 0.36 - 0.5 * 3 * 0.16)  # sum over tasks at c = 1 / (1 + 0.5 (T - 1)) = 0.4
    assert best - 0.02 < sum(points[-1][1].values()) <= best


def test_nested_map_merges_what_is_nearest_first():
    """Experts 0 and 2 have the nearest scores, so they are the first pair."""
    def scores(values):
        return {f"s{t}": height * (1 - (values[t] - 1) ** 2) for t, height in enumerate((0.9, 0.2, 0.8))}

    assert nested(3, 200, scores)[1]["pairs"][0]["of"] == [["w0"], ["w2"]]


def test_what_nested_map_cannot_search_is_one_line():
    with pytest.raises(InputError, match="w0 does not begin at 0, where an expert is left out"):
        make_search("nested-map", space(2, -1.0), 60, 5, 0, {})
    with pytest.raises(InputError, match="and a budget of at least 17"):
        make_search("nested-map", space(3), 16, 5, 0, {})
    with pytest.raises(InputError, match=r"3 free values, but 1 scores \(all\); expected one for each expert"):
        nested(3, 200, lambda values: {"all": 1.0})


def test_bayesian_map_looks_where_the_quadratics_are_worst():
    """A score that is quadratic but for a bump in one direction draws the new points there."""
    angles = np.random.default_rng(1).random((50, 2)) * np.pi / 2
    assert np.allclose(angles_of(directions(angles)), angles)
    assert np.allclose((directions(angles) ** 2).sum(1), 1) and bins_of(3) == 4 and bins_of(4) == 2
    points = np.random.default_rng(0).random((60, 2))
    angle = np.arctan2(points[:, 1], points[:, 0])
    scores = (points[:, 0] + 3.0 * (angle > 3 * np.pi / 8))[:, None]
    found = bin_scores(points, scores, np.random.default_rng(0))
    assert found.argmax() == 3 and len(found) == 4
    search = Bayesian(space(), 40, 0, {})
    asked = []
    while points := search.ask():
        search.tell([((a, b), {"one": a + 3.0 * (np.arctan2(b, a) > 3 * np.pi / 8)}) for a, b in points])
        asked += points
    assert len(asked) == 40
    late = [np.arctan2(b, a) > np.pi / 4 for a, b in asked[12:26]]
    assert np.mean(late) > 0.6


def test_cma_reaches_the_optimum_of_a_quadratic():
    search = Evolution(space(4, -1.5, 1.5), 800, 42, {})
    target, best = np.array([0.9, -0.4, 0.2, 1.2]), -math.inf
    history = []
    while asked := search.ask():
        found = [(point, {"score": -float(((np.array(point) - target) ** 2).sum())}) for point in asked]
        search.tell(found)
        best = max([best, *(scores["score"] for _, scores in found)])
        history.append(best)
    assert best > -1e-4 and history == sorted(history)


def test_nsga3_spreads_along_the_front_of_two_distances():
    """The points between two targets, which no other beats; the same again with the same seed."""
    pytest.importorskip("pymoo")
    first, second = np.array([0.2, 0.2]), np.array([0.8, 0.8])

    def searched():
        search, asked = make_search("nsga3", space(2), 480, 5, 3, {}), []
        while points := search.ask():
            search.tell([(point, {name: -float(((np.array(point) - target) ** 2).sum())
                                  for name, target in (("one", first), ("two", second))}) for point in points])
            asked += points
        return asked, search.facts()

    asked, facts = searched()
    assert searched()[0] == asked and len(asked) == 480 and facts == {"generations": 12, "population": 40}
    late = np.array(asked[-40:])
    drawn = np.array(asked[:40])
    assert np.abs(late[:, 0] - late[:, 1]).mean() < np.abs(drawn[:, 0] - drawn[:, 1]).mean() / 3
    assert np.ptp(late.mean(1)) > 0.3
    one = make_search("nsga3", space(2), 40, 5, 0, {})
    with pytest.raises(InputError, match="found one score, expected two or more"):
        one.tell([(point, {"one": 0.0}) for point in one.ask()])


def test_searches_without_their_library_say_what_to_install(monkeypatch):
    for kind, module in (("cma", "cmaes"), ("nsga3", "pymoo.algorithms.moo.nsga3")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"--search {kind} needs the library"):
            make_search(kind, space(2), 40, 5, 0, {})


@pytest.mark.parametrize(("kind", "data", "message"), [
    ("cma", {"a": {"choose": [1, 2]}, "b": {"search": [0, 1]}}, "only --search grid takes"),
    ("cma", {"b": {"search": [0, 1]}}, "found one free value, expected two or more"),
])
def test_searches_that_do_not_fit_are_refused(kind, data, message):
    with pytest.raises(InputError, match=message):
        make_search(kind, space_of([data], "recipe"), 10, 5, 0, {})


def test_not_dominated():
    assert not_dominated(np.array([[1, 0], [0, 1], [0.4, 0.4], [0.5, 0.6], [0.5, 0.6]])) == [0, 1, 3, 4]


# Whole searches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuned")
    family(root, "llama")
    for number, name in enumerate("ab", 1):
        write_samples(root / f"{name}.jsonl", number)
    return root


RECIPE = """merge_method: {method}
base_model: base
models:
  - {{model: expert1, parameters: {{weight: {{search: [0.0, 1.0]}}}}}}
  - {{model: expert2, parameters: {{weight: 0.5}}}}
{more}"""


def write_recipe(place, name="recipe.yaml", method="task_arithmetic", more=""):
    (place / name).write_text(RECIPE.format(method=method, more=more))
    return place / name


OBJECTIVES = Objectives(texts=("a", "b"), samples=4, length=12)


def objectives(place):
    return Objectives((str(place / "a.jsonl"), str(place / "b.jsonl")), samples=4, length=12)


def test_a_grid_is_measured_and_resumed(place, tmp_path, monkeypatch):
    recipe, work = write_recipe(place), tmp_path / "work"
    found = tune(recipe, work, objectives(place), TuneOptions(points=3))
    assert [trial.values for trial in found.trials] == [(0.0,), (0.5,), (1.0,)]
    assert set(found.trials[0].scores) == {"a", "b"} and found.best in found.front
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "best")
    losses = []
    for row in map(json.loads, (place / "a.jsonl").read_text().splitlines()):
        ids = torch.tensor([row["tokens"]])
        losses.append(float(model(input_ids=ids, labels=ids).loss.detach()))
    every = Objectives((str(place / "a.jsonl"),), samples=6, length=12)
    assert Measure(every).scores(work / "best")["a"] == pytest.approx(np.mean(losses), rel=1e-5)
    lines = (work / "journal.jsonl").read_text().splitlines(keepends=True)
    (work / "journal.jsonl").write_text("".join(lines[:3]) + lines[3][:9])  # cut off while it was written
    ran = []
    original = tuning._Runner.run
    monkeypatch.setattr(tuning._Runner, "run", lambda self, values: (ran.append(values), original(self, values))[1])
    again = tune(recipe, work, objectives(place), TuneOptions(points=3))
    assert ran == [(1.0,)]
    assert [trial.scores for trial in again.trials] == [trial.scores for trial in found.trials]
    with pytest.raises(InputError, match="is of another search"):
        tune(recipe, work, Objectives((str(place / "a.jsonl"),)), TuneOptions(points=3))


def test_only_what_changes_is_merged_and_models_run_once(place, tmp_path):
    """A free value for one part of the model: tensors of the other stay, and statistics are taken once."""
    recipe = write_recipe(place, "part.yaml", "aim", "parameters:\n  lambda:\n    - {filter: mlp, value: {search:"
                                                     " [0.1, 1.0]}}"
                          "\n    - {value: 0.3}\ncalibration: {data: a.jsonl, samples: 4, length: 12}\n")
    text = recipe.read_text().replace("{search: [0.0, 1.0]}", "0.5", 1)
    recipe.write_text(text)
    found = tune(recipe, tmp_path / "work", objectives(place), TuneOptions(points=3))
    assert [trial.merged for trial in found.trials] == [21, 6, 6]
    (caches,) = (tmp_path / "work" / "calibration").iterdir()
    assert len(list(caches.glob("stream-*"))) == 1
    import yaml

    import mipipe
    alone = yaml.safe_load(text)
    for item in [alone, *alone["models"]]:
        for key in ("base_model", "model"):
            if key in item:
                item[key] = str(place / item[key])
    alone["calibration"]["data"] = str(place / "a.jsonl")
    alone["parameters"]["lambda"][0]["value"] = found.trials[found.best].values[0]
    mipipe.merge(alone, tmp_path / "alone")
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (
        tmp_path / "work/best/model.safetensors").read_bytes()
    assert Measure(objectives(place)).scores(tmp_path / "alone") == found.trials[found.best].scores


def test_a_users_function_decides(place, tmp_path, monkeypatch):
    (tmp_path / "my_score.py").write_text(
        "from safetensors.torch import load_file\n"
        "def norm(folder):\n    return {'size': -float(load_file(folder +"
        " '/model.safetensors')['lm_head.weight'].norm())}\n"
        "def broken(folder):\n    raise ValueError('no such thing')\n"
        "def odd(folder):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = write_recipe(place)
    found = tune(recipe, tmp_path / "work", Objectives(functions=("my_score:norm",)), TuneOptions(points=2))
    assert found.trials[found.best].scores["size"] == max(trial.scores["size"] for trial in found.trials)
    for name, message in (("broken", "ValueError: no such thing"), ("odd", "expected a finite number")):
        with pytest.raises(RunError, match=message):
            tune(recipe, tmp_path / name, Objectives(functions=(f"my_score:{name}",)), TuneOptions(points=2))
    sys.modules.pop("my_score", None)


def test_measures_that_are_none_are_refused(place, tmp_path):
    with pytest.raises(InputError, match="nothing to measure"):
        Objectives()
    with pytest.raises(InputError, match=r"--perplexity .*lost.txt: no such file"):
        Measure(Objectives((str(tmp_path / "lost.txt"),)))
    with pytest.raises(InputError, match="--weight c: is no score; expected a, b"):
        tune(write_recipe(place), tmp_path / "work", objectives(place), TuneOptions(points=1, weights=(("c", 1.0),)))
    with pytest.raises(InputError, match="--search random: expected one of grid, cma, nsga3, map"):
        TuneOptions("random")


SUMS = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/sums.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_a_local_task_of_the_harness_is_a_score(place, tmp_path, monkeypatch):
    """The share of questions whose right option is the likelier one, as counted here."""
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [{"question": f"{a}+{b}=", "options": [str(a + b), str(b)], "answer": a % 2}
            for a in range(1, 5) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(SUMS.format(tmp_path))
    with pytest.raises(InputError, match=r"has no token that begins or ends a text|needs a tokenizer"):
        Measure(Objectives(tasks=(str(tmp_path / "sums.yaml"),))).scores(place / "base")
    folder = with_tokenizer(place / "base", tmp_path / "model")
    task = str(tmp_path / "sums.yaml")
    found = Measure(Objectives(tasks=(task,))).scores(folder)
    assert found == {"sums": pytest.approx(right_answers(folder, rows))}
    models = {"base": "model", "experts": {"a": "model"}, "merged": {"same": "model"},
              "domains": {"a": {"lm_eval": task}}}
    (tmp_path / "models.yaml").write_text(json.dumps(models))
    judged = evaluate_models(read_models(tmp_path / "models.yaml"), (task,), "models.yaml")
    assert judged[-1].normalised == 1.0
    with pytest.raises(InputError, match=r"lost\.yaml: no such file"):
        Measure(Objectives(tasks=("lost.yaml",)))
    with pytest.raises(InputError, match="--minimise is of --evaluate's numbers"):
        Objectives(tasks=(task,), minimise=True)


def with_tokenizer(source, folder):
    """A copy of a model whose tokens are characters, with one that ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    shutil.copytree(source, folder)
    letters = ["<end>", *"0123456789+= "]
    tokenizer = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate(letters)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def right_answers(folder, rows):
    """By log probabilities of the options' tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def of(text, option):
        start = len(tokenizer(text)["input_ids"])
        ids = torch.tensor([tokenizer(f"{text} {option}")["input_ids"]])
        logs = model(input_ids=ids).logits.log_softmax(-1)[0]
        return sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))

    right = [max((0, 1), key=lambda place: of(row["question"], row["options"][place])) == row["answer"] for row in rows]
    return sum(right) / len(right)


# MergeBench -----------------------------------------------------------------------------------------------------------


def test_normalised_performance():
    assert normalised_performance({"a": .5, "b": .4}, {"a": .6, "b": .5}, ()) == pytest.approx(0.816667, abs=1e-6)
    assert normalised_performance({"a": 1.0}, {"a": 1.0}, ("a",)) == 1.0
    assert normalised_performance({"a": math.log(20)}, {"a": math.log(10)}, ("a",)) == pytest.approx(0.5)


MODELS = """base: base
experts: {a: expert1, b: expert2}
merged: {copy: expert1}
domains: {a: {perplexity: a.jsonl}, b: {perplexity: b.jsonl}}
general: {c: {perplexity: a.jsonl}}
samples: 4
length: 12
"""


def test_models_are_judged_against_experts_and_base(place):
    (place / "models.yaml").write_text(MODELS)
    rows = evaluate_models(read_models(place / "models.yaml"), (), "models.yaml")
    by_name = {(row.kind, row.name): row for row in rows}
    copy, expert, base = (by_name[key] for key in (("merged", "copy"), ("expert", "a"), ("base", "base")))
    assert copy.scores == expert.scores and base.forgetting == 0.0
    assert copy.normalised == pytest.approx((1 + math.exp(by_name["expert", "b"].scores["b"] - copy.scores["b"])) / 2)
    assert copy.forgetting == pytest.approx(copy.scores["general c"] - base.scores["general c"])


@pytest.mark.parametrize(("old", "new", "message"), [
    ("a: {perplexity: a.jsonl},", "a: {},", "expected perplexity: FILE, evaluate"),
    ("experts: {a: expert1, b: expert2}", "experts: {a: expert1}", "none for the domain b"),
    ("base: base\n", "", "give base"),
    ("merged: {copy: expert1}", "merged: {}", "has no merged models"),
    ("samples: 4", "sample: 4", "sample"),
    ("a: {perplexity: a.jsonl},", "a: {evaluate: 'my:score'},", "a file calls no code; name it on the command line"),
    ("a: {perplexity: a.jsonl},", "a: {lm_eval: arc_easy},", r"too \(--lm-eval arc_easy\)"),
])
def test_wrong_files_of_models_are_refused(place, tmp_path, old, new, message):
    assert old in MODELS
    (place / "wrong.yaml").write_text(MODELS.replace(old, new))
    with pytest.raises(InputError, match=message):
        evaluate_models(read_models(place / "wrong.yaml"), (), "wrong.yaml")
