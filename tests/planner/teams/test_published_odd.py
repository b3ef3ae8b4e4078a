"""Tables of published measurements whose cells say odd things: every row is built or listed with its reason, a wrong
file is one line, and nothing ends in a traceback."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from predictions import rows, sailor, zero_bubble
from predictions.build import Builder
from predictions.report import predict, show, summary

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
RUN = {"group": "korthikanti_table5", "id": "a", "model": "GPT tiny", "layers": "4", "hidden": "256", "heads": "4",
       "hardware": "A100 80GB", "n_gpus": "8", "precision": "FP16", "seq_len": "128", "global_batch": "16",
       "micro_batch": "2", "tp": "2", "pp": "2", "cp": "1", "vpp": "2", "dp_or_fsdp": "dp=2",
       "schedule": "interleaved 1F1B", "recompute": "selective recompute + sequence parallel",
       "optimizer_sharding": "none", "layout_or_notes": "vocab 512", "meas_step_time_s": "0.5"}
KINDS: tuple[dict[str, str], ...] = (
    {}, {"group": "nvidia_megatron_bridge", "hardware": "DGX-GB200", "precision": "NVFP4", "recompute": "",
         "meas_step_time_s": "", "meas_tokens_per_s_per_gpu": "256"},
    {"group": "torchtitan", "dp_or_fsdp": "fsdp=2", "vpp": "", "schedule": "", "micro_batch": ""},
    {"group": "megatron_sc21_table1", "meas_step_time_s": "", "meas_tflops_per_gpu": "100"},
    {"group": "never seen", "hardware": "8x MI300X", "precision": "BF16 mixed", "cp": "2", "tp": "1"})
"""Rows of several groups, of which one cell at a time is made odd."""
ODD = ("", "n/a", "-", "not stated", "nan", "inf", "0", "-1", "3", "64", "2.5", "1e3", "1000000", "999999999", "many",
       "8 (2)", "x" * 5000, "∞ ملف", "[1,2]", "{}", "full", "fsdp=0", "layers per stage [1, 0]",
       "layers per stage [99999,1]", "vocab 0", "[red]")
SAILOR = {"file": "a/b.json", "model": "OPT-350M", "layers_per_stage": "[13, 13]", "dp": "[2, 2]", "tp": "[1, 1]",
          "gpus": "4", "gpu_kinds": '["GH-96", "GH-96"]', "mbs": "1", "gbs": "8", "real_step_s": "1.5",
          "max_mem_bytes": "1e10"}
BUBBLE = {"p": "4", "m": "8", "model": "tiny", "micro_batch": "2", "T_F": "10", "T_B": "11", "T_W": "9",
          "T_comm": "0.5", "bubble_1F1B": "0.2", "bubble_ZB-H1": "0.1", "samples_s_gpu_1F1B": "5",
          "samples_s_gpu_ZB-1p": "6"}


def table(path: Path, columns: Sequence[str], *changed: Mapping[str, str]) -> Path:
    """A CSV file of rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: row.get(name, "") for name in columns} for row in changed)
    return path


def profiles(path: Path) -> Path:
    """Times of the 26 layers of OPT-350M."""
    times = {str(number): [1e-3, 2e-3, 1e-4] for number in range(26)}
    path.write_text(json.dumps({"OPT-350": {"GH-96": {"1": {"1": times}}}}))
    return path


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(folder=tmp_path_factory.mktemp("captures"))


def judged(path: Path, builder: Builder) -> tuple[int, list[str]]:
    """How many rows are built, and why the others are not; both are printed and summed up."""
    built, left = predict(rows.read_runs(path), builder, lambda _: None)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        show(Console(file=nowhere), built, left)
    json.dumps(summary(built, left), allow_nan=False)
    assert all(run.why and "\n" not in run.why for run in left)
    return len(built), [run.why for run in left]


@pytest.mark.slow
@pytest.mark.parametrize("column", rows.COLUMNS)
def test_one_odd_cell_at_a_time(builder: Builder, tmp_path: Path, column: str) -> None:
    changed = [{**RUN, **kind, column: odd} for kind in KINDS for odd in ODD]
    count, why = judged(table(tmp_path / "runs.csv", rows.COLUMNS, *changed), builder)
    assert count + len(why) == len(changed)


HERE = {"group": "nvidia_megatron_bridge", "hardware": "DGX-H100", "precision": "BF16", "n_gpus": "8",
        "layout_or_notes": "", "tp": "1", "pp": "1", "vpp": "", "schedule": "", "recompute": "", "micro_batch": "1"}


@pytest.mark.parametrize("change", [
    {"hardware": "DGX-B200", "precision": "FP8-MX"}, {"hardware": "GB300 NVL72", "precision": "nvfp4"},
    {"hardware": "AMD MI300X"}, {"precision": "FP8 rowwise"}, {"precision": "bf16 + fp8 delayed scaling"},
    {"cp": "2", "tp": "2"}, {"cp": "8"}, {"dp_or_fsdp": "fsdp=8"}, {"dp_or_fsdp": "hsdp=2x4"},
    {"tp": "2", "pp": "2", "schedule": "ZB-V"}, {"pp": "4", "schedule": "ZB-H1"}, {"pp": "2", "schedule": "1F1B"},
    {"pp": "2", "schedule": "GPipe"}, {"pp": "2", "schedule": "interleaved 1F1B", "vpp": "2"},
    {"recompute": "full"}, {"recompute": "full uniform 1"}, {"recompute": "selective (core_attn)"},
    {"recompute": 'recompute_modules=["mla_up_proj"] granularity="selective"'},
    {"pp": "2", "schedule": "dualpipe"}, {"n_gpus": "12", "global_batch": "24"}])
def test_what_other_rows_may_bring_is_built(builder: Builder, tmp_path: Path, change: dict[str, str]) -> None:
    """Other hardware, precisions, degrees, schedules and recomputations."""
    assert judged(table(tmp_path / "runs.csv", rows.COLUMNS, {**RUN, **HERE, **change}), builder) == (1, [])


@pytest.mark.parametrize("change, why", [
    ({"model": "Mixtral-9x99B"}, "model Mixtral-9x99B: its configuration is not known here"),
    ({"hardware": "RTX 5090"}, "hardware RTX 5090: no such device kind ships"),
    ({"precision": "posit8"}, "precision posit8: expected one of"),
    ({"pp": "2", "schedule": "Hanayo"}, "schedule Hanayo: expected one of"),
    ({"pp": "8", "schedule": "interleaved 1F1B", "vpp": "7"}, "but the model has 6 pieces that can be apart"),
    ({"ep": "8"}, "no experts to divide"), ({"n_gpus": "32768"}, "expected 1 to 16384 devices"),
    ({"cp": "3", "n_gpus": "9", "global_batch": "15"}, "sequences of 128 tokens do not divide")])
def test_what_is_not_known_is_listed_with_its_reason(builder: Builder, tmp_path: Path, change: dict[str, str],
                                                      why: str) -> None:
    count, told = judged(table(tmp_path / "runs.csv", rows.COLUMNS, {**RUN, **HERE, **change}), builder)
    assert not count and why in told[0], told


@pytest.mark.slow
@pytest.mark.parametrize("column", sailor.COLUMNS)
def test_sailors_rows_with_an_odd_cell(builder: Builder, tmp_path: Path, column: str) -> None:
    """Without a measured step or memory a row is predicted all the same."""
    changed = [{**SAILOR, column: odd} for odd in (*ODD, "[0]", '["V100-16", "V100-16"]', "[[1]]", "[" * 5000)]
    found = sailor.sailor(table(tmp_path / "sailor.csv", sailor.COLUMNS, SAILOR, *changed),
                          profiles(tmp_path / "profiles.json"), builder, lambda _: None)
    assert len(found) == 1 + len(changed)
    assert all((row.predicted is None) == bool(row.why) for row in found)
    assert found[0].predicted is not None
    assert (found[1].predicted is not None) == (column in ("real_step_s", "max_mem_bytes", "file"))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sailor.show_sailor(Console(file=nowhere), found)


@pytest.mark.slow
@pytest.mark.parametrize("column", zero_bubble.COLUMNS)
def test_zero_bubble_rows_with_an_odd_cell(tmp_path: Path, column: str) -> None:
    changed = [{**BUBBLE, column: odd} for odd in ODD]
    rates, steps, left = zero_bubble.zero_bubble(table(tmp_path / "zb.csv", zero_bubble.COLUMNS, BUBBLE, *changed))
    assert {row.model for row in (*rates, *steps)} >= {"tiny"}
    assert all("\n" not in line for line in left)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        zero_bubble.show_zero_bubble(Console(file=nowhere), rates, steps, left)


@pytest.mark.slow
def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    """Exit codes: 1 for a wrong file, 2 for options that do not go together; the line names the file."""
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    table(tmp_path / "sailor.csv", sailor.COLUMNS, SAILOR)
    table(tmp_path / "missing.csv", rows.COLUMNS[1:], RUN)
    for options, code, told in (
            ((), 2, "give --runs FILE"), (("--sailor", "sailor.csv"), 2, "--sailor and --profiles go together"),
            (("--zero-bubble", "other.csv", "--plot", "a.svg"), 2, "--plot and --brief go with --runs"),
            (("--runs", "other.csv", "--plot", "no/a.svg"), 2, "--plot no/a.svg: no such folder"),
            (("--runs", "none.csv"), 1, "none.csv: No such file"), (("--runs", "empty.csv"), 1, "empty.csv: no rows"),
            (("--runs", "other.csv"), 1, "other.csv: no column 'group'; expected the columns"),
            (("--runs", "missing.csv"), 1, "missing.csv: no column 'group'"),
            (("--runs", "binary.csv"), 1, "expected a CSV file in UTF-8"), (("--runs", "."), 1, ".: Is a directory"),
            (("--zero-bubble", "sailor.csv"), 1, "sailor.csv: no column 'p'"),
            (("--sailor", "sailor.csv", "--profiles", "bad.json"), 1, "bad.json: not readable as JSON"),
            (("--sailor", "sailor.csv", "--profiles", "empty.json"), 1, "empty.json: found a dict of 0, expected"),
            (("--sailor", "sailor.csv", "--profiles", "none.json"), 1, "none.json: cannot be read")):
        ended = subprocess.run([sys.executable, BENCHMARKS / "published.py", *options], cwd=tmp_path, text=True,
                               capture_output=True, timeout=120)
        last = ended.stderr.splitlines()[-1]
        assert ended.returncode == code and told in last and not ended.stdout, (options, ended.stderr)
