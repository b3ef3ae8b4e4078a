"""Rows of published runs: what they are built into, what is assumed, why some are not, and a fit that finds what it was
made with."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from predictions.build import Builder
from predictions.fit import Fit, Point
from predictions.report import bests, predict, ranks, ratios
from predictions.rows import COLUMNS, read_runs

from mipipe.graphs.cluster import shipped_kinds
from mipipe.graphs.errors import InputError

ROW = {"group": "korthikanti_table5", "id": "a", "model": "GPT tiny", "layers": "4", "hidden": "256", "heads": "4",
       "hardware": "A100 80GB", "n_gpus": "8", "precision": "FP16", "seq_len": "128", "global_batch": "16",
       "micro_batch": "2", "tp": "2", "pp": "2", "cp": "1", "vpp": "2", "ep": "", "dp_or_fsdp": "dp=2",
       "schedule": "interleaved 1F1B", "recompute": "selective recompute + sequence parallel",
       "optimizer_sharding": "none", "layout_or_notes": "vocab 512", "meas_step_time_s": "0.5"}


def table(path: Path, *changes: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(dict.fromkeys(COLUMNS, "") | ROW | change for change in changes)
    return path


def test_rows_become_configurations(tmp_path: Path) -> None:
    """Degrees, schedule, recomputation and precision as given; what is not stated is said to be assumed."""
    runs = read_runs(table(tmp_path / "runs.csv", {}, {
        "group": "nvidia_megatron_bridge", "hardware": "DGX-GB200", "precision": "NVFP4", "micro_batch": "",
        "recompute": "", "dp_or_fsdp": "fsdp=2", "meas_step_time_s": "", "meas_tokens_per_s_per_gpu": "256"}))
    first, second = (run.build for run in runs)
    assert first is not None and second is not None
    assert first.degrees.text() == "ranks=2,sequence=2,copies=2,chunks=2"
    assert (first.degrees.recompute, first.degrees.zero, first.flash, first.overlap) == ("selective", 0, False, False)
    assert (second.kind, second.low, second.degrees.zero, second.overlap) == ("gb200", "float4", 3, True)
    assert second.assumed == ("microbatch 1",)
    assert runs[1].step_s == pytest.approx(16 * 128 / 256 / 8)


@pytest.mark.parametrize("change, why", [
    ({"model": "Panda 7B"}, "model Panda 7B: its configuration is not known here"),
    ({"hidden": ""}, "gives no layers, hidden size and heads"),
    ({"hardware": "TPU v5"}, "hardware TPU v5: no such device kind"),
    ({"precision": "INT3"}, "precision INT3: expected one of"),
    ({"tp": "0"}, "tp: found '0', expected a whole number of at least 1"),
    ({"tp": "-2"}, "tp: found '-2'"), ({"n_gpus": "many"}, "n_gpus: found 'many'"),
    ({"meas_step_time_s": "fast"}, "meas_step_time_s: found 'fast', expected a number above 0"),
    ({"meas_memory_GB": "nan"}, "meas_memory_GB: found 'nan'"), ({"layers": "2.5"}, "found '2.5' among layers"),
    ({"heads": "5"}, "heads that divide the hidden size"), ({"ep": "0"}, "ep: found '0'"),
    ({"tp": "3"}, "tp 3 x pp 2 x cp 1 does not divide 8 devices"),
    ({"schedule": "wavelike"}, "schedule wavelike: expected one of"),
    ({"layout_or_notes": "LoRA Performance"}, "fine-tuning with adapters")])
def test_rows_that_are_not_built_say_why(tmp_path: Path, change: dict[str, str], why: str) -> None:
    run, = read_runs(table(tmp_path / "runs.csv", change))
    assert run.build is None and why in run.why
    assert predict([run], Builder(), str) == ([], [run])


def test_cells_that_a_row_lacks_are_empty(tmp_path: Path) -> None:
    """A row shorter than the header, and one with cells too many."""
    path = table(tmp_path / "runs.csv", {})
    head, row = path.read_text().splitlines()
    path.write_text("\n".join([head, row.rpartition("vocab 512")[0], row + ",more,cells", "only"]) + "\n")
    short, longer, only = read_runs(path)
    assert short.build is not None and short.step_s is None
    assert longer.build == read_runs(table(tmp_path / "runs.csv", {}))[0].build
    assert only.build is None and only.why.startswith("seq_len: found '', expected")


def test_torchtitan_divides_a_copys_batch_into_as_many_microbatches_as_stages(tmp_path: Path) -> None:
    run, = read_runs(table(tmp_path / "runs.csv", {
        "group": "torchtitan", "dp_or_fsdp": "fsdp=2", "micro_batch": "(local batch 8 split)", "global_batch": "16"}))
    assert run.build is not None and (run.build.degrees.microbatch, run.build.degrees.zero) == (2, 1)
    assert run.build.assumed == ("microbatch 2",)


def test_a_table_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column 'group'; expected the columns group, id"):
        read_runs(tmp_path / "runs.csv")


def test_ratios_ranks_and_bests_by_hand(tmp_path: Path) -> None:
    """A row measured as predicted and one measured twice as slow: the ratio of their rates is off by 2."""
    path = table(tmp_path / "runs.csv", {"id": "slow"}, {"id": "fast", "schedule": "1F1B", "vpp": "1"})
    builder = Builder()
    rows, left = predict(read_runs(path), builder, str)
    assert not left and len(rows) == 2
    rows = [replace(rows[0], measured_s=2 * rows[0].predicted_s, measured_tokens_s=rows[0].predicted_tokens_s / 2),
            replace(rows[1], measured_s=rows[1].predicted_s, measured_tokens_s=rows[1].predicted_tokens_s)]
    assert ratios(rows) == [pytest.approx(1.0)]
    assert ranks(rows)[1] == 1
    (_, ways, loss), = bests(rows)
    best = max(rows, key=lambda row: row.predicted_tokens_s)
    assert ways == 2
    assert loss == pytest.approx(1 - (best.measured_tokens_s or 0) / max(row.measured_tokens_s or 0 for row in rows))


@pytest.mark.slow
def test_a_fit_finds_the_shares_that_made_its_rows(tmp_path: Path) -> None:
    """Steps predicted with another share of products and overhead are explained by these, not by the assumed ones."""
    changes = [{"id": str(size), "hidden": str(size), "layers": "4", "seq_len": "1024", "micro_batch": micro,
                "vpp": "1", "schedule": "1F1B"} for size in (1024, 4096) for micro in ("1", "8")]
    runs = read_runs(table(tmp_path / "runs.csv", *changes))
    builder, kinds = Builder(), shipped_kinds(fitted=False)
    true = replace(kinds["a100"], achieved=kinds["a100"].achieved.but(product=0.5, action_ns=300_000))
    points = [Point(run.build, run.name, [run], builder.evaluate(run.build, true).seconds) for run in runs if run.build]
    fit = Fit(builder, kinds, points)
    values, at, _ = fit.run(1)
    assert max(abs(at)) < 0.03 < max(abs(fit.logs(fit.start)))
    found = {name: math.exp(value) for (name, _), value in zip(fit.names, values, strict=True)}
    assert found["product"] == pytest.approx(0.5, rel=0.1) and found["action_ns"] > 150_000
    assert np.isfinite(values).all()


def test_kinds_of_one_chip_say_what_one_has_no_rows_for(tmp_path: Path) -> None:
    """Rows of one kind of Hopper are half as fast as assumed: the share of the other, whose one row says little (a
    weight of nothing), goes with them; that of another type of products, which no row has, is not fitted."""
    small = {"seq_len": "1024", "hidden": "1024", "vpp": "1", "schedule": "1F1B", "precision": "BF16"}
    changes = [{**small, "id": micro, "hardware": "H100", "micro_batch": micro} for micro in ("1", "2", "4", "8")]
    runs = read_runs(table(tmp_path / "runs.csv", *changes, {**small, "id": "other", "hardware": "H100 96GB HBM2e"}))
    builder, kinds = Builder(), shipped_kinds(fitted=False)
    points = [Point(run.build, run.name, [run], 1.0) for run in runs if run.build]
    fit = Fit(builder, kinds, points)
    assert ("product_fp8", "h100") not in fit.names
    own, other = (fit.names.index(("product", kind)) for kind in ("h100", "h100_hbm2e"))
    slopes = np.zeros((len(points), len(fit.names)))
    slopes[:4, own] = -1.0
    at = np.array([*[math.log(0.7)] * 4, 0.0])
    found = fit.solve(fit.start, at, slopes, np.array([1.0, 1.0, 1.0, 1.0, 0.0])) - fit.start
    assert found[own] == pytest.approx(math.log(0.7), rel=0.1)
    assert found[other] == pytest.approx(found[own], rel=0.1)
