"""The command line: one module per verb, listed once, and one place where errors become exit codes.

Exit codes: 0 done; 1 the user's input is wrong; 2 wrong usage; 3 no plan exists; 4 a run failed; 5 a plan or program
violates a rule; 6 time was up without a plan; 130 interrupted (Ctrl-C, or SIGTERM to a
training run). To add a verb: write its module, list its function.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import typer

from mipipe.cli import (
    calibrate,
    capture,
    check,
    compare,
    experts,
    export,
    merge,
    place,
    plan,
    profile,
    show,
    simulate,
    train,
)
from mipipe.graphs.errors import MipipeError

VERBS: tuple[ModuleType, ...] = (
    capture, profile, plan, place, check, simulate, show, compare, export, calibrate, train, merge, experts)
"""Each module has a function of the module's name, and an ``EXAMPLE`` that its ``--help`` ends with."""

app = typer.Typer(
    name="mipipe", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Plans pipeline and expert parallelism with mixed-integer programs, and runs the plan under torchrun.",
    epilog="Exit codes: 0 done, 1 wrong input, 2 wrong usage, 3 no plan exists, 4 a run failed, 5 a plan violates a"
           " rule, 6 time was up, 130 interrupted (Ctrl-C, or SIGTERM in training).")


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the user's errors as one line on stderr and the documented exit code."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
            sys.stdout.flush()
        except MipipeError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:  # the reader of our output (head, less) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)

    return run


def fail(message: str, code: int) -> None:
    """Print the error on stderr and end with ``code``."""
    sys.stderr.write(f"mipipe: {'' if code == 130 else 'error: '}{message}\n")
    raise typer.Exit(code)


for _module in VERBS:
    _verb = getattr(_module, _module.__name__.rpartition(".")[2])
    app.command(epilog=f"Example: {_module.EXAMPLE}")(guarded(_verb))


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
