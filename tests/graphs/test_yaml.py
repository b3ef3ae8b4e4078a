"""Numbers in YAML files are numbers, however they are written, in every file that people write."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mipipe.cli.requests.settings import parse_settings
from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.recipes.read import read_recipes
from mipipe.graphs.serialize import load_data, yaml_text, yaml_value
from mipipe.runtime.train.config import read_train_config

SPELLINGS = ["1e-8", "1E-8", "1e8", "+1e8", "-1e+8", "3.0e4", "3.e4", ".5e3", "-.5E-3", "12e03", "1.5e-2", "+.5", "-.5",
             "017.5"]


@pytest.mark.parametrize("text", SPELLINGS)
def test_exponents_are_numbers(text):
    assert yaml_value(text) == float(text) and isinstance(yaml_value(text), float)


@pytest.mark.parametrize("text", ["010", "-017", "0100", "00", "08", "1:30", "12:30:45", "1:30.5", "0o17", "1,000"])
def test_numbers_that_may_mean_two_things_are_texts(text: str) -> None:
    """``steps: 0100`` is 64 in YAML 1.1 and 100 in YAML 1.2: where a number is expected it is refused, not guessed."""
    assert yaml_value(text) == text
    assert yaml_value(yaml_text({"v": text})) == {"v": text}


@pytest.mark.parametrize("text", ["e8", "1e", "1e-", "1e8x", "v1e8", "1.2.3e4", "1e8 2", "--1e8", "e-8", "_1e8"])
def test_texts_stay_texts(text):
    assert yaml_value(text) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_as_python_writes_it(value):
    assert yaml_value(repr(value)) == value and yaml_value(f"{value:e}") == float(f"{value:e}")


@given(st.dictionaries(st.text("0123456789eE+-. ax", max_size=6), st.text("0123456789eE+-. ax", max_size=6)))
def test_what_is_written_is_read_back(data):
    """A name such as 1e5 gets quotes."""
    assert yaml_value(yaml_text(data)) == data


@pytest.mark.parametrize("place", ["steps: {}", "steps: 1\nseed: {}", "steps: 1\nclip: {}",
                                   "steps: 1\noptimizer: {{lr: {}}}", "steps: 1\ncheckpoint: {{folder: c, keep: {}}}",
                                   "steps: 1\nschedule: {{decay: {}}}",
                                   "steps: 1\nexperts: {{moves: {{{}: map.json}}}}"])
@pytest.mark.parametrize("value", ["010", "1:30", "true", "on", "yes", '"3"', '" 5"', '"1_0"', "'nan'", "[1]"])
def test_where_a_number_is_expected_nothing_else_is_one(tmp_path, place, value):
    """Neither texts nor truth values, which pydantic would convert."""
    if "moves" in place and value in ("[1]", '"3"'):
        return  # a key of a mapping is text in JSON, and no list in YAML
    (tmp_path / "train.yaml").write_text(place.format(value))
    with pytest.raises(InputError, match=r"expected a (whole )?number") as caught:
        read_train_config(tmp_path / "train.yaml")
    assert "\n" not in str(caught.value)


def test_in_every_kind_of_file(tmp_path):
    """Training configurations, recipes, clusters, sizes, and overrides on the command line."""
    config = tmp_path / "train.yaml"
    config.write_text("steps: 3\noptimizer: {options: {eps: 1e-8}, groups: [{match: b, options: {lr: 1e-5}}]}\n"
                      "data: {options: {shift: 2e-3}}\n")
    read = read_train_config(config)
    assert read.optimizer.options["eps"] == 1e-8 and read.optimizer.groups[0].options["lr"] == 1e-5
    assert read.data.options["shift"] == 2e-3
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1e-1}}\n"
                      "  - {model: b, parameters: {weight: [1e-1, 5e-1]}}\ndtype: float32\n")
    assert read_recipes(recipe)[0].models[0].parameters["weight"] == 0.1
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("format: mipipe.cluster\nversion: 1\nhosts: [{name: a, devices: 2, kind: k, memory: 1e9B}]\n"
                       "links: {within_host: {latency: 1us, bandwidth: 1GB/s}}\n"
                       "device_kinds: {k: {efficiency: 5e-1, flops: {float32: 1e3GFLOPS}, bandwidth: 1GB/s,"
                       " launch_overhead: 1e1us, source: test}}\n")
    kind = load_cluster(cluster).kinds["k"]
    assert kind.efficiency == 0.5 and kind.flops["float32"] == 5 * 10**11
    sizes = tmp_path / "sizes.yaml"
    sizes.write_text("vision: [1e0, 2.5e-1]\n")
    assert load_data(sizes) == {"vision": [1.0, 0.25]}
    assert parse_settings(["rms_norm_eps=1e-6", "name=1e"]) == {"rms_norm_eps": 1e-6, "name": "1e"}
    assert yaml.safe_load("1e-8") == "1e-8"  # why there is a loader of our own
