"""Running a verb on a mutant, in this process, within limits of time and memory, with every run of code watched."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from mipipe.cli.main import app, guarded
from mipipe.graphs import write_files

CODES = {0, 1, 2, 3, 5, 6}
"""Exit codes a file alone may cause. (4 is a run that failed, 130 an interruption.)"""
LINE = 1100
SECONDS = 10.0
COMMAND = typer.main.get_command(app)
"""Made once: that takes longer than most mutants."""


class OutOfTime(BaseException):
    """A case took too long. No `Exception`, so that no handler takes it for an error of its own."""


@dataclass(frozen=True)
class Outcome:
    """How a verb ended; ``wrong`` says what broke the rules, empty where nothing did."""

    code: int
    stderr: str
    wrong: str


_RAN: list[str] = []
_WATCHED = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pty.spawn", "os.fork", "os.forkpty",
            "socket.connect", "webbrowser.open", "ctypes.dlopen/x", "shutil.rmtree"}
_watching = False


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in _WATCHED and threading.current_thread() is threading.main_thread():
        _RAN.append(f"{event} {arguments!r}"[:200])


_hooked = False


def watch() -> None:
    """Begin to note what runs programs or opens connections (an audit hook stays for the whole process)."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True


@contextlib.contextmanager
def limited(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Inside: `OutOfTime` after ``seconds`` of CPU or six times that on the clock (other jobs may have the machine),
    and `MemoryError` beyond ``extra_bytes`` more than now."""
    def stop(*_: object) -> None:
        raise OutOfTime

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + extra_bytes, before[1]))
    handlers = [(number, signal.signal(number, stop)) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds, 1.0)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in handlers:
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(arguments: Sequence[object], seconds: float = SECONDS, extra_bytes: int = 2**31) -> Outcome:
    """Run one command line; see `Outcome`."""
    return _watched(lambda: COMMAND([str(argument) for argument in arguments], "mipipe"), seconds, extra_bytes)


def run_function(function: Callable[..., object], *arguments: object, seconds: float = SECONDS,
                 extra_bytes: int = 2**31) -> Outcome:
    """Run what a verb does; errors of mipipe's own end it as they end a verb."""
    return _watched(lambda: guarded(function)(*arguments), seconds, extra_bytes)


def _watched(function: Callable[[], object], seconds: float, extra_bytes: int) -> Outcome:
    global _watching
    out, err, code, wrong = io.StringIO(), io.StringIO(), 0, ""
    _RAN.clear()
    write_files.WRITTEN.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with limited(seconds, extra_bytes):
                _watching = True
                function()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except typer.Exit as ended:
            code = ended.exit_code
        except OutOfTime:
            wrong = f"took more than {seconds:g} s at " + _where()
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]} at {_where()}"
        finally:
            _watching = False
    return Outcome(code, err.getvalue(), wrong or _faults(code, err.getvalue()))


def _where() -> str:
    """The innermost lines of ours in the error being handled."""
    found = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
             for frame in traceback.extract_tb(sys.exc_info()[2])
             if any(part in frame.filename for part in ("/graphs/", "/planner/", "/runtime/", "/cli/"))]
    return " < ".join(reversed(found[-4:]))


def _faults(code: int, stderr: str) -> str:
    if _RAN:
        return f"ran {_RAN[0]}"
    if code not in CODES:
        return f"exit code {code}: {stderr[-200:]}"
    if "Traceback" in stderr:
        return f"a traceback: {stderr[-300:]}"
    if code not in (0, 2):
        lines = stderr.splitlines()
        most = 40 if code == 5 else 1  # a deadlock shows its grid
        if not 1 <= len(lines) <= most or not lines[0].startswith("mipipe: error: ") or len(stderr) > LINE:
            return f"not one line: {len(lines)} lines, {len(stderr)} characters: {stderr[:200]!r}"
        if not lines[0].isprintable() and any(ord(letter) < 32 for letter in lines[0]):
            return f"control characters: {lines[0][:200]!r}"
    return ""
