"""The command line: one module per verb, listed once, and one place where errors become exit codes.

Exit codes: 0 done; 1 the user's input is wrong; 2 wrong usage; 3 no plan fits; 4 a run failed; 5 a plan or program
violates a rule; 6 time was up without a plan; 130 interrupted (Ctrl-C or SIGTERM). To add
a verb: write its module, list its function.
"""

from __future__ import annotations

import functools
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Annotated, Any

import typer

from mipipe.cli import (
    calibrate,
    capture,
    check,
    compare,
    convert,
    evaluate,
    experts,
    export,
    merge,
    place,
    plan,
    profile,
    show,
    simulate,
    train,
    tune,
)
from mipipe.cli.requests.given import NotingCommand
from mipipe.graphs.errors import MipipeError, PlanError, shown
from mipipe.graphs.named_code import no_exit

VERBS: tuple[ModuleType, ...] = (
    capture, profile, plan, place, check, simulate, show, compare, export, calibrate, train, merge, convert,
    tune, evaluate, experts)
"""Each module has a function of the module's name, and an ``EXAMPLE`` that its ``--help`` ends with."""

LINE = 1000
"""Characters of an error's line: more is no message but a file that was echoed."""

app = typer.Typer(
    name="mipipe", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Plans pipeline and expert parallelism with mixed-integer programs, and runs the plan under torchrun.",
    epilog="Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 no plan fits, 4 a run failed, 5 a plan violates a"
           " rule, 6 time was up, 130 interrupted (Ctrl-C or SIGTERM).")


def _version(wanted: bool) -> None:
    """Print the version, and leave."""
    if wanted:
        from mipipe import __version__

        sys.stdout.write(f"mipipe {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True,
                                          callback=_version)] = False,
) -> None:
    del version  # its callback has done it


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the user's errors as one line on stderr and the documented exit code."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            with no_exit():
                verb(*arguments, **options)
            sys.stdout.flush()
        except MipipeError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except MemoryError:
            fail("this machine has no memory left for it; end other programs, or ask for less", 1)
        except BrokenPipeError:  # the reader of our output (head, less) has gone
            _leave_pipe()
            raise typer.Exit(0) from None
        except OSError as error:
            fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)

    return run


def fail(message: str, code: int) -> None:
    """Print the error on stderr and end with ``code``."""
    lines = message.splitlines() if code == PlanError.exit_code else [message]  # a deadlock is shown as a grid
    line = "\n".join(shown(re.sub(r"\S{300,}", _cut, part), quoted=False, most=LINE) for part in lines)
    sys.stderr.write(f"mipipe: {'' if code == 130 else 'error: '}{line}\n")
    raise typer.Exit(code)


def _leave_pipe() -> None:
    """Let what is still to be printed go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]


def _cut(word: re.Match[str]) -> str:
    """The start of a word that is too long for a name or a path."""
    return shown(word[0], quoted=False)


for _module in VERBS:
    _verb = getattr(_module, _module.__name__.rpartition(".")[2])
    app.command(cls=NotingCommand, epilog=f"Example: {_module.EXAMPLE}")(guarded(_verb))


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does in this verb: the best plan is kept, processes and temporary files are not."""
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual):  # ignored, as in a shell's background
        raise KeyboardInterrupt
    usual(number, frame)


COLLECT = (200_000, 20, 20)
"""Objects between two collections of garbage: plans are hundreds of thousands of small values without cycles, and
looking through them again and again took a third of the time in which they are made."""


def main() -> None:
    """Run the command line and end the process with its exit code."""
    gc.set_threshold(*COLLECT)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell; the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal of few letters, or a file's name that is no text
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:  # click and rich end with 1 where the reader of a help has gone
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        _leave_pipe()
        sys.exit(getattr(ended.__context__.__context__, "exit_code", 0))  # of wrong usage that nobody read
    except OSError as error:  # the help of a verb, on a full disk
        sys.stderr.write(f"mipipe: error: {error.filename or 'system'}: {error.strerror or error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
