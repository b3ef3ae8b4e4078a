"""Every verb: its help, its start without torch, usage errors, and the way errors become exit codes."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer

from mipipe.cli.main import VERBS, guarded
from mipipe.graphs import errors
from mipipe.graphs.serialize import save
from mipipe.planner.problems.uniform import uniform_problem

NAMES = [module.__name__.rpartition(".")[2] for module in VERBS]


@pytest.mark.parametrize("verb", NAMES)
def test_help_has_a_purpose_json_and_one_example(mipipe, verb: str) -> None:
    ended = mipipe(verb, "--help")
    text = " ".join(ended.stdout.split())
    assert ended.code == 0
    assert f"Usage: mipipe {verb}" in text or f"{verb} [OPTIONS]" in text
    assert text.count(f"Example: mipipe {verb}") == 1
    assert "--json" in text


def test_help_lists_all_verbs_and_the_exit_codes(mipipe) -> None:
    ended = mipipe("--help")
    assert ended.code == 0
    for verb in NAMES:
        assert re.search(rf"\b{verb}\b", ended.stdout)
    assert "130 interrupted" in " ".join(ended.stdout.split())


def test_examples_use_options_that_exist(mipipe) -> None:
    """Each example parses: every option it shows is in the verb's help."""
    for module in VERBS:
        verb, *words = module.EXAMPLE.split()[1:]
        text = mipipe(verb, "--help").stdout
        for word in words:
            if word.startswith("-"):
                assert word in text, f"{verb}: {word}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["plan"], ["plan", "x.json", "--no-such-option"],
                                       ["compare", "--ranks", "many"], ["simulate"]])
def test_wrong_usage_ends_with_2(mipipe, arguments: list[str]) -> None:
    ended = mipipe(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


CODES = {errors.InputError: 1, errors.GraphError: 1, errors.ProblemError: 1, errors.TimelineError: 1,
         errors.InfeasibleError: 3, errors.RunError: 4, errors.BatchError: 4, errors.DataEnd: 4,
         errors.PlanError: 5, errors.ProgramError: 5, errors.TimeUpError: 6, errors.StoppedError: 130,
         KeyboardInterrupt: 130}


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_every_error_class_has_its_exit_code(capsys, kind: type[BaseException]) -> None:
    def verb() -> None:
        raise kind("where: what; what to do")

    with pytest.raises(typer.Exit) as ended:
        guarded(verb)()
    assert ended.value.exit_code == CODES[kind]
    asked = CODES[kind] == 130  # to end: no error
    expected = "interrupted" if kind is KeyboardInterrupt else f"{'' if asked else 'error: '}where: what; what to do"
    assert capsys.readouterr().err == f"mipipe: {expected}\n"


@pytest.mark.parametrize("status", [0, None, 3, "a text"])
def test_code_that_ends_the_process_is_an_error(capsys, status: object) -> None:
    """A model's or loader's module that calls sys.exit: its work is not done, whatever status it gives."""
    def verb() -> None:
        sys.exit(status)  # type: ignore[arg-type]

    with pytest.raises(typer.Exit) as ended:
        guarded(verb)()
    assert ended.value.exit_code == 1
    message = capsys.readouterr().err
    assert re.search(r"test_main\.py, line \d+: ends the process \(sys\.exit\(status\)", message)
    assert message.count("\n") == 1


def test_no_error_class_is_without_a_tested_code() -> None:
    """A new class of errors must be added to the table above."""
    known = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MipipeError)}
    assert known - {errors.MipipeError} == set(CODES) - {KeyboardInterrupt}


def test_light_verbs_start_without_torch(folder: Path) -> None:
    """`plan`, `compare`, `check`, `simulate`, `show`, `export` and `--help` never import torch."""
    script = f"""
import sys, typer
from mipipe.cli.main import app
command = typer.main.get_command(app)
for line in {[["--help"], ["check", "plan.json"], ["simulate", "plan.json"], ["show", "plan.json"],
              ["export", "plan.json", "--trace", "trace.json"],
              ["plan", "problem.json", "--time-limit", "0.5"],
              ["compare", "--ranks", "2", "--microbatches", "4", "--time-limit", "0.5"],
              *([verb, "--help"] for verb in NAMES)]!r}:
    try:
        command(line, "mipipe")
    except SystemExit as ended:
        assert not ended.code, line
    loaded = {{"torch", "transformers"}} & set(sys.modules)
    assert not loaded, (line, loaded)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_output_into_a_closed_pipe_is_no_error(folder: Path) -> None:
    """`mipipe show plan.json | head -1` ends quietly."""
    process = subprocess.Popen([sys.executable, "-m", "mipipe.cli.main", "show", "plan.json"], cwd=folder,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_keeps_the_best_plan_so_far(tmp_path: Path, number: signal.Signals) -> None:
    """The first Ctrl-C ends the search, not the command: the plan is written and checks.

    stderr is a terminal here, so the test sees in the progress line when there is a first plan.
    """
    save(uniform_problem(ranks=8, microbatches=24, f=10, i=13, w=8, comm=2), tmp_path / "problem.json")
    command = [sys.executable, "-m", "mipipe.cli.main", "plan", "problem.json", "--time-limit", "250",
               "-o", "plan.json"]
    terminal, end = pty.openpty()
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=end, text=True,
                               env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})
    os.close(end)
    seen = b""
    while b"makespan" not in seen:
        seen += os.read(terminal, 4096)
    began = time.monotonic()
    os.kill(process.pid, number)
    drain = threading.Thread(target=_read_all, args=(terminal,), daemon=True)
    drain.start()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, seen
    assert time.monotonic() - began < 60
    assert "interrupted" in out
    check = subprocess.run([sys.executable, "-m", "mipipe.cli.main", "check", "plan.json"], cwd=tmp_path, timeout=60)
    assert check.returncode == 0


def _read_all(terminal: int) -> None:
    """Keep the terminal's buffer empty, so that the process never waits for it."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def test_the_version(mipipe) -> None:
    import mipipe as package

    ended = mipipe("--version")
    assert ended.code == 0 and ended.stdout == f"mipipe {package.__version__}\n"


WAITING = """import os, signal, sys, tempfile, time
from mipipe.cli import main

def wait():
    with tempfile.TemporaryDirectory(dir=folder):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

folder, sys.argv[1:] = sys.argv[1], ["wait"]
main.app.command("wait")(main.guarded(wait))
main.main()
"""


def test_sigterm_ends_any_verb_as_ctrl_c_does(tmp_path: Path) -> None:
    """Temporary folders go, and the code says why; also where a shell has set Ctrl-C to be ignored."""
    for ignored in (False, True):
        before = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None
        ended = subprocess.run([sys.executable, "-c", WAITING, str(tmp_path)], capture_output=True, text=True,
                               timeout=60, preexec_fn=before)
        assert ended.returncode == 130 and ended.stderr == "mipipe: interrupted\n"
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("letters", ["ascii", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp437"))])
def test_a_terminal_of_few_letters_is_printed_to(folder: Path, letters: str) -> None:
    """The timeline's signs are question marks there; a traceback helps nobody."""
    ended = subprocess.run([sys.executable, "-m", "mipipe", "show", str(folder / "plan.json")], capture_output=True,
                           env={**os.environ, "PYTHONIOENCODING": letters, "LC_ALL": "C"}, timeout=60, check=False)
    assert ended.returncode == 0 and b"makespan" in ended.stdout and not ended.stderr


def test_memory_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def verb() -> None:
        raise MemoryError

    with pytest.raises(typer.Exit) as ended:
        guarded(verb)()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err.startswith("mipipe: error: this machine has no memory left")
