"""What every verb shares: the ``--json`` option, the consoles, and progress that is silent off a terminal.

People's output goes to stdout as text; with ``--json`` stdout carries exactly one JSON object. Everything else (logs,
progress, errors) goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mipipe.graphs.errors import InputError
from mipipe.graphs.write_files import WRITTEN, check_apart, check_output, same_file

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; logs go to stderr.")]
MOST_SECONDS = 1e6
"""The longest time limit: 11 days."""
TimeLimit = Annotated[float, typer.Option("--time-limit", help="Seconds the planner may take.", min=0.1,
                                          max=MOST_SECONDS)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random in the planner.", min=0, max=2**31 - 1)]
Without = Annotated[list[str] | None, typer.Option(
    "--without", help="Switch a part of the planner off, to see what it is worth: mip (HiGHS), search (annealing),"
                      " published (schedules of papers as starts); may be repeated.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write a self-contained HTML timeline here.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="Also write a Perfetto trace (JSON) here.")]


class _Stdout(Console):
    """A console that lets `mipipe.cli.main` see that the reader of its output has gone."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this where it has caught the BrokenPipeError


def stdout() -> Console:
    """The console for results. Off a terminal it is 120 columns wide (or ``COLUMNS``) and without colours. Where a file
    went to stdout (``-o /dev/stdout``), the rest goes to stderr."""
    width = shutil.get_terminal_size((120, 40)).columns
    return _Stdout(stderr=1 in WRITTEN, width=max(width, 60), highlight=False, markup=False,
                   emoji=False)


def emit(data: dict[str, Any]) -> None:
    """Print the one JSON object of ``--json``; on stderr where a file went to stdout, which then holds that alone."""
    stream = sys.stderr if 1 in WRITTEN else sys.stdout
    stream.write(json.dumps(data, allow_nan=False) + "\n")
    stream.flush()


def log(text: str) -> None:
    """One line for people on stderr."""
    sys.stderr.write(text + "\n")


def number(value: float) -> int | float:
    """An integer where the value is one: 15 rather than 15.0."""
    return int(value) if value == int(value) else value


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr with a line that the caller updates; nothing when stderr is not a terminal, but for a line
    where kernels are compiled first, which no time limit covers."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with told_of_compiling(console):
        if not console.is_terminal:
            yield lambda text: None
            return
        with console.status(what) as status:
            yield lambda text: status.update(f"{what}: {text}")


COMPILING = ("compiling the planner's kernels: once on this machine, up to a minute, which the time limit does not"
             " count; python -m mipipe.planner.warm does it ahead")


@contextlib.contextmanager
def told_of_compiling(console: Console) -> Iterator[None]:
    """Inside, the first kernel that numba has not in its cache is announced in one line."""
    if "numba" not in sys.modules:
        yield
        return
    from numba.core import event

    said: list[str] = []

    class Listener(event.Listener):
        def on_start(self, event: Any) -> None:
            if not said:
                said.append(COMPILING)
                console.print(COMPILING, soft_wrap=True)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield


def check_files(*read: Path | str | None, **wanted: Path | None) -> None:
    """Raise `InputError` before long work if a file of the options of these names (``save_graph`` for
    ``--save-graph``) could not be written in the end, if two would be written to one place, or one over what is
    ``read``."""
    files = {"--" + name.replace("_", "-"): path for name, path in wanted.items()}
    for option, path in files.items():
        if path is not None:
            check_output(path, option)
    check_apart(files)
    for option, path in files.items():
        if path is not None and any(same_file(path, other) for other in read if other is not None):
            raise InputError(f"{option} {path} is also read: give what is written a name of its own")
