"""What a run tells while it trains: lines at a bearable pace, or one line that is kept up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mipipe.graphs.errors import InputError
from mipipe.graphs.named_code import import_named
from mipipe.runtime.train.launching import telling
from mipipe.runtime.train.launching.telling import ProgressBar


def told(capsys: pytest.CaptureFixture[str], steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose lines are printed in a run of steps that take so many seconds each."""
    clock = iter(range(1, steps + 1))
    monkeypatch.setattr(telling.time, "monotonic", lambda: 1000 + seconds * next(clock))
    show = ProgressBar(steps, "lines")
    for step in range(1, steps + 1):
        show(step, 1.0 / step)
    return [int(line.split()[1].partition("/")[0]) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("steps", "seconds", "expected"), [
    (5, 0.1, [1, 2, 3, 4, 5]),
    (1000, 0.001, [1, *range(51, 1000, 50), 1000]),
    (1000, 20.0, list(range(1, 1001)))])
def test_lines_come_every_twentieth_or_ten_seconds(capsys, monkeypatch, steps, seconds, expected) -> None:
    assert told(capsys, steps, seconds, monkeypatch) == expected


def test_one_line_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show = ProgressBar(2, "-")
    show(1, 0.5)
    show(2, 0.25)
    err = capsys.readouterr().err
    assert err.count("\r") == 2 and err.endswith("\n") and "step 2/2  loss 0.2500" in err


def test_what_a_configuration_names_is_found_in_the_current_folder(tmp_path: Path, monkeypatch) -> None:
    """The console script's path has its own folder first, not the current one."""
    (tmp_path / "users_loader.py").write_text("def batches(graph, rows, seed):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [item for item in sys.path if item not in ("", str(tmp_path))])
    assert import_named("users_loader:batches").__name__ == "batches"
    with pytest.raises(InputError, match="users_loader:nothing"):
        import_named("users_loader:nothing")
