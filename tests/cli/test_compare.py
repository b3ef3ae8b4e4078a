"""`mipipe compare`: the fields, accountings and closed forms the issue names, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

FIELDS = {"name", "accounting", "makespan", "bubble", "bubble_ratio", "devices", "parameter_copies",
          "peak_activations"}
PLANNED_FIELDS = {"bound", "gap", "placement", "seconds", "bound_scope", "rung", "without_baselines", "how"}


def rows_of(ended) -> dict[tuple[str, str], dict]:
    assert ended.code == 0, ended.stderr
    return {(row["name"], row["accounting"]): row for row in ended.data["rows"]}


def chain(ranks: int, microbatches: int, f: float, i: float, w: float, *more: object) -> tuple[object, ...]:
    return ("compare", "--ranks", ranks, "--microbatches", microbatches, "--f", f, "--i", i, "--w", w, "--json", *more)


def test_dualpipe_in_all_accountings(mipipe) -> None:
    """Published 15, as one block 15, split 9; two copies, P + 1 activations; published rows carry only a bubble."""
    rows = rows_of(mipipe(*chain(8, 20, 2, 2, 1, "--schedules", "DualPipe")))
    assert {key: row["bubble"] for key, row in rows.items()} == {
        ("DualPipe", "published"): 15, ("DualPipe", "indivisible"): 15, ("DualPipe", "split"): 9}
    published = rows["DualPipe", "published"]
    assert published["makespan"] is None and published["bubble_ratio"] is None
    for accounting, makespan in (("indivisible", 115), ("split", 109)):
        row = rows["DualPipe", accounting]
        assert set(row) >= FIELDS
        assert row["makespan"] == makespan
        assert row["bubble_ratio"] == pytest.approx(row["bubble"] / makespan)
        assert (row["devices"], row["parameter_copies"], row["peak_activations"]) == (8, 2, 9)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (2, 2, 1), (10, 11, 9)])
def test_closed_forms_hold_exactly(mipipe, ranks: int, microbatches: int, f: int, i: int, w: int) -> None:
    rows = rows_of(mipipe(*chain(ranks, microbatches, f, i, w, "--schedules", "gpipe,1f1b,zb-h1,dualpipe")))
    assert rows["1F1B", "indivisible"]["bubble"] == rows["1F1B", "published"]["bubble"] == (ranks - 1) * (f + i + w)
    assert rows["GPipe", "indivisible"]["bubble"] == rows["GPipe", "published"]["bubble"] == (ranks - 1) * (f + i + w)
    assert rows["ZB-H1", "split"]["bubble"] == rows["ZB-H1", "published"]["bubble"] == (ranks - 1) * (f + i - w)
    form = (ranks / 2 - 1) * (f + i + w + i + w - 3 * w)
    assert rows["DualPipe", "published"]["bubble"] == form
    blocks = (ranks / 2 - 1) * ((f + i + w) + f - 2 * w)
    assert rows["DualPipe", "indivisible"]["bubble"] == blocks
    assert rows["GPipe", "indivisible"]["peak_activations"] == microbatches
    assert rows["1F1B", "indivisible"]["peak_activations"] == ranks


def test_a_schedule_that_does_not_exist_for_a_size_says_so(mipipe) -> None:
    rows = rows_of(mipipe(*chain(8, 12, 1, 1, 1, "--schedules", "dualpipe,1f1b")))
    missing = [row for row in rows.values() if row["name"] == "DualPipe"]
    assert missing and all(row["makespan"] is None and row["bubble"] is None for row in missing)
    assert any("twice the ranks" in row["note"] for row in missing)
    assert rows["1F1B", "split"]["makespan"] is not None


def test_an_overlapped_pair_takes_what_fb_says(mipipe) -> None:
    """Only the indivisible accounting uses it; the published form does too, the split order does not."""
    plain = rows_of(mipipe(*chain(8, 20, 2, 2, 1, "--schedules", "dualpipe")))
    faster = rows_of(mipipe(*chain(8, 20, 2, 2, 1, "--schedules", "dualpipe", "--fb", 4)))
    assert faster["DualPipe", "published"]["bubble"] == 3 * (4 + 3 - 3)
    assert faster["DualPipe", "indivisible"]["makespan"] < plain["DualPipe", "indivisible"]["makespan"]
    assert faster["DualPipe", "split"] == plain["DualPipe", "split"]


@pytest.fixture(scope="module")
def planned(mipipe) -> dict:
    ended = mipipe(*chain(4, 8, 1, 1, 1, "--copies", 1, "--activations", 4, "--placement", "chain",
                          "--schedules", "1f1b,mipipe", "--time-limit", 20))
    return rows_of(ended)["mipipe", "split"]


def test_the_planned_chain_is_proven(planned: dict) -> None:
    """F = I = W = 1, 4 ranks, 8 microbatches, 4 activations: makespan 27 is the optimum of a chain."""
    assert set(planned) >= FIELDS | PLANNED_FIELDS
    assert planned["makespan"] == 27
    assert planned["bound"] == 27 and planned["gap"] == 0
    assert planned["bound_scope"] == "placement chain" and planned["placement"] == "chain"
    assert planned["peak_activations"] <= 4 and planned["parameter_copies"] == 1
    assert planned["without_baselines"] == 27 and planned["seconds"] <= 20


def test_the_planned_two_way_is_proven(mipipe) -> None:
    """F, I, W = 2, 2, 1, 4 ranks, 8 microbatches, 5 activations: bubble 2."""
    ended = mipipe(*chain(4, 8, 2, 2, 1, "--activations", 5, "--placement", "two-way", "--schedules", "mipipe",
                          "--layers", 4, "--time-limit", 20))
    row = rows_of(ended)["mipipe", "split"]
    assert row["bubble"] == 2
    assert row["bound"] == row["makespan"] == 42
    assert row["parameter_copies"] == 2 and row["peak_activations"] <= 5


def test_the_planned_row_is_never_worse_than_a_baseline_within_the_caps(mipipe) -> None:
    """Even with no time to search: published schedules are starts of last resort."""
    ended = mipipe(*chain(8, 20, 10, 12, 8, "--comm", 1, "--time-limit", 0.5))
    rows = rows_of(ended)
    mine = rows.pop(("mipipe", "split"))
    known = [row["makespan"] for (_, accounting), row in rows.items()
             if accounting == "split" and row["makespan"] is not None
             and row["parameter_copies"] <= 2 and row["peak_activations"] <= 9]
    assert known and mine["makespan"] <= min(known)


def test_a_problem_file_instead_of_equal_stages(mipipe, folder: Path) -> None:
    for name in ("problem.json", "plan.json"):
        ended = mipipe("compare", "--problem", folder / name, "--schedules", "1f1b", "--json")
        assert rows_of(ended)["1F1B", "indivisible"]["bubble"] == 15
    ended = mipipe("compare", "--problem", folder / "problem.json", "--ranks", 4, "--json")
    assert ended.code == 1 and "--ranks" in ended.error


def test_the_problem_states_its_assumptions(mipipe) -> None:
    data = mipipe(*chain(4, 8, 1, 1.5, 1, "--schedules", "1f1b", "--comm", 0.5, "--first", 0.2)).data["problem"]
    assert data["ranks"] == 4 and data["microbatches"] == 8 and data["i"] == 1.5 and data["comm"] == 0.5
    assert data["copies"] == 2 and data["activations"] == 5
    assert data["reduction"] == "none"


def test_unknown_schedules_and_bad_numbers(mipipe) -> None:
    assert "expected some of" in mipipe("compare", "--ranks", 4, "--microbatches", 8, "--schedules", "magic").error
    ended = mipipe("compare", "--ranks", 4, "--microbatches", 8, "--f", -1)
    assert ended.code == 1 and "f" in ended.error


def test_the_table_for_people(mipipe, tmp_path: Path) -> None:
    ended = mipipe("compare", "--ranks", 4, "--microbatches", 6, "--schedules", "1f1b,dualpipe", "--html",
                   tmp_path / "compare.html")
    assert ended.code == 0, ended.stderr
    assert "(1) DualPipe: 6 microbatches on 4 ranks" in ended.stdout
    assert "1F1B (indivisible)" in (tmp_path / "compare.html").read_text()


STREAMS = ("compare", "--ranks", 8, "--microbatches", 20, "--attention", "10,13,7", "--dispatch", "8,8", "--experts",
           "10,10,10", "--combine", "8,8", "--comm", 2, "--fb", 60, "--json")


def test_stages_on_two_streams(mipipe) -> None:
    """DualPipe as its authors count: 60 for an overlapped pair, 526 more than the 1,200 of compute."""
    ended = mipipe(*STREAMS, "--schedules", "dualpipe")
    rows = rows_of(ended)
    assert rows["DualPipe", "indivisible"]["makespan"] == 1726
    assert ("DualPipe", "streams") in rows
    assert (ended.data["problem"]["groups"], ended.data["problem"]["attention"]) == (32, "10,13,7")


@pytest.mark.parametrize(("change", "words"), [
    (("--combine", "8"), "--combine 8: expected 2 numbers, F,I"),
    (("--dispatch", "8,x"), "--dispatch 8,x: expected 2 numbers"),
    (("--w", "2"), "--w does not apply to stages on two streams")])
def test_what_two_streams_need(mipipe, change: tuple[str, str], words: str) -> None:
    ended = mipipe(*STREAMS, *change, "--schedules", "dualpipe")
    assert ended.code == 1 and words in ended.stderr


def test_two_streams_need_all_four_operators(mipipe) -> None:
    ended = mipipe("compare", "--ranks", 4, "--microbatches", 8, "--attention", "1,1,1", "--json")
    assert ended.code == 1 and "--dispatch is missing" in ended.stderr


def test_the_table_says_what_its_columns_and_letters_mean(mipipe) -> None:
    """Each accounting and column that occurs, and no other; the legend has the letters of every drawn row."""
    line = ("compare", "--ranks", 2, "--microbatches", 4)
    told = mipipe(*line, "--schedules", "1f1b,dualpipe", "--draw").stdout
    for start in ("published: ", "indivisible: B, the backward", "split: ", "bubble: ", "copies: ", "activations: "):
        assert f"\n{start}" in told, start
    assert "a half-stage keeps 0.5" in told and "overlapped forward and backward (X)" in told
    assert "B both gradients" in told and "I input gradient" in told and "FB or X" in told
    assert "\nstreams: " not in told and "\nbound: " not in told
    split_only = mipipe(*line, "--schedules", "zb-v").stdout
    assert "\nindivisible: " not in split_only and "\nsplit: " in split_only


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_takes_any_number_of_chunks(mipipe, chunks: int) -> None:
    """(P - 1)(F + B) / chunks; with transfers the row says whose order it is."""
    asked = ("--chunks", chunks, "--schedules", "Interleaved 1F1B")
    rows = rows_of(mipipe(*chain(4, 8, 2, 2, 2, *asked)))
    bubbles = {key[1]: row["bubble"] for key, row in rows.items()}
    assert bubbles["published"] == bubbles["indivisible"] == pytest.approx(18 / chunks)
    assert not any(row["note"] for row in rows.values())
    moved = rows_of(mipipe(*chain(4, 8, 2, 2, 2, "--comm", "0.1", *asked)))
    assert "Megatron-LM's order" in moved["Interleaved 1F1B", "indivisible"]["note"]
