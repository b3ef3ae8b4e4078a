"""Rollouts as data: rows, ages, copies, and what a folder cannot hold."""

import json

import pytest
import recipe_models as recipes
import torch

from mipipe.graphs.errors import DataEnd, InputError
from mipipe.runtime.train.config import DataConfig
from mipipe.runtime.train.data import check_source, make_batches


def write(folder, groups=6, size=2, **more):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": [1, 2], "response": [3 + number % 5] * (1 + number % 3), "reward": float(member),
                         "group": number, "version": number, **more})
             for number in range(groups) for member in range(size)]
    (folder / "step-0.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def graph():
    return recipes.built("spo", negative_scale=0.3, chunk=23)[1]


def batches(folder, rows=4, copy=0, copies=1, **options):
    return make_batches(DataConfig("rollouts", options={"folder": folder, **options}), graph(), rows, 0, copy, copies)


def test_rows_are_whole_groups_and_a_pass_has_each_once(tmp_path):
    made = batches(write(tmp_path / "a"))
    first = [next(made) for _ in range(3)]
    ids = torch.cat([batch["group_ids"] for batch in first]).tolist()
    assert sorted(ids) == sorted([number for number in range(6) for _ in range(2)])
    for batch in first:
        assert batch["group_ids"][0::2].tolist() == batch["group_ids"][1::2].tolist()
        assert batch["rewards"].tolist() == [0.0, 1.0, 0.0, 1.0] and batch["rewards"].dtype is torch.float64
        for row in range(4):
            size = 1 + int(batch["group_ids"][row]) % 3
            assert (batch["labels"][row] != -100).tolist() == [2 <= place < 2 + size for place in range(8)]
            assert batch["input_ids"][row, :2].tolist() == [1, 2]


def test_copies_share_a_pass_and_a_position_is_a_number(tmp_path):
    folder = write(tmp_path / "a", groups=8)
    alone = batches(folder, rows=8)
    pair = [batches(folder, rows=4, copy=copy, copies=2) for copy in range(2)]
    for _ in range(3):
        whole = next(alone)["group_ids"].tolist()
        parts = [next(item)["group_ids"].tolist() for item in pair]
        assert parts[0] + parts[1] == whole and not set(parts[0]) & set(parts[1])
    state, expected = pair[0].state(), next(pair[0])
    again = batches(folder, rows=4, copy=0, copies=2)
    again.resume(state)
    assert torch.equal(next(again)["input_ids"], expected["input_ids"])


def test_old_rollouts_are_passed_over_and_then_missed(tmp_path):
    made = batches(write(tmp_path / "a"), max_age=2)
    for number in range(4):
        batch = next(made)
        assert all(number - group <= 2 for group in batch["group_ids"].tolist())
    for _ in range(3):
        next(made)
    with pytest.raises(DataEnd, match="step 8: 1 groups are at most 2 steps old, 2 are needed"):
        next(made)


@pytest.mark.parametrize("more, text", [
    ({"reward": None}, "reward as a finite number"),
    ({"reward": float("nan")}, "reward as a finite number"),
    ({"version": 1.5}, "expected group and version as whole numbers"),
    ({"foreign": "yes"}, "foreign: found 'yes', expected 0 or 1"),
    ({"prompt": []}, "0 tokens of prompt"),
    ({"prompt": [1] * 9}, "but a row has 8"),
    ({"response": ["a"]}, "response: expected a list of token ids"),
    ({"rewards": 1}, "found 'rewards'; expected an object with"),
])
def test_what_is_no_rollout_is_one_line(tmp_path, more, text):
    with pytest.raises(InputError, match=text) as error:
        batches(write(tmp_path / "a", **more))
    assert "line 1" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("loss, more, text", [
    ("grpo", {"old_log_probs": -3.4}, "old_log_probs: expected a list of finite numbers, one for each of the 1"),
    ("grpo", {"old_log_probs": ["a"]}, "old_log_probs: expected a list of finite numbers"),
    ("grpo", {"old_log_probs": [float("-inf")]}, "old_log_probs: expected a list of finite numbers"),
    ("grpo", {"old_log_probs": [-1.0, -2.0]}, "old_log_probs has 2 numbers for 1 response tokens"),
    ("dpo", {"reference_log_probs": [-1.0]}, "reference_log_probs: expected one finite number, of the whole response"),
])
def test_numbers_of_another_form_than_the_loss_reads_are_one_line(tmp_path, loss, more, text):
    with pytest.raises(InputError, match=text) as error:
        make_batches(DataConfig("rollouts", options={"folder": write(tmp_path / "a", **more)}), recipes.built(loss)[1],
                     4, 0)
    assert "line 1" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("age", ["16", -1, 1.5, True])
def test_an_age_that_is_no_number_of_steps_is_one_line(tmp_path, age):
    with pytest.raises(InputError, match="expected a folder's path, and a whole number of steps of at least 0"):
        batches(write(tmp_path / "a"), max_age=age)


def test_a_loss_names_what_a_line_lacks(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.jsonl").write_text(json.dumps({"prompt": [1], "response": [2], "group": 0}))
    with pytest.raises(InputError, match="has no 'reward', which the loss needs"):
        batches(str(folder))
    with pytest.raises(InputError, match="no folder with"):
        batches(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"groups of 2 responses, but a step has 3 rows"):
        batches(write(tmp_path / "b"), rows=3)
    with pytest.raises(InputError, match="source rollouts needs options"):
        check_source(DataConfig("rollouts"))
