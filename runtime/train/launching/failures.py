"""What a run's processes leave for their launcher in its report folder, and what it makes of it: one error.

``error-rankN.json`` by a worker that failed or stopped, ``failures.json`` by the agent (exit codes and times of the
workers that ended first), ``said.txt`` (lines for people), ``started.json`` (the first step and its source),
``done.txt`` (when all is done).
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mipipe.graphs import errors
from mipipe.graphs.errors import MipipeError, RunError, StoppedError

OWN_CODES = {1, RunError.exit_code, StoppedError.exit_code}
"""With which workers end that have said why, in a report or on stderr."""
SAID, STARTED, DONE, FAILURES = "said.txt", "started.json", "done.txt", "failures.json"


def explain_failure(folder: Path, log: Path, code: int, show: bool = True) -> MipipeError:
    """The error to raise for a failed run: what the first failing rank reported, who was killed by a signal, else what
    torchrun said.

    ``show``: the traceback of an unexpected error goes to stderr.
    """
    found = reports(folder)
    stopped = next((item for item in found if item["type"] == StoppedError.__name__), None)
    if stopped is not None:
        return StoppedError(stopped["message"])
    causes = [item for item in found if not is_consequence(item)]
    killed = signals_of(folder, bool(found))
    if killed and not causes:
        return RunError(f"{killed}; --resume continues from the newest checkpoint, if one was saved, and --max-restarts"
                        " restarts workers")
    quiet = {rank: item.code for rank, item in sorted(exits(folder).items())
             if item.code > 0 and item.code not in OWN_CODES and rank not in {report["rank"] for report in found}}
    if quiet and not causes:
        rank, status = next(iter(quiet.items()))
        return RunError(f"rank {rank} ended with exit code {status} and without a word: code of the model's or the"
                        " loader's ended it (os._exit); --resume continues from the newest checkpoint, if one was"
                        " saved")
    if not found:
        if code < 0:
            return RunError(f"torchrun was ended by {signal_name(-code)}")
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        tail = next((line for line in reversed(lines) if "Error" in line or "Signal" in line), "".join(lines[-1:]))
        return RunError(f"torchrun ended with status {code}: {tail.strip() or 'no message; see the output above'}")
    first = min(causes or found, key=lambda item: item["time"])
    kind = vars(errors).get(first["type"])
    if isinstance(kind, type) and issubclass(kind, MipipeError):
        text = first["message"]
    else:
        kind, text = RunError, f"rank {first['rank']}: {first['type']}: {first['message']}"
    if show:
        sys.stderr.write(first["traceback"])
    return kind(text)


def reports(folder: Path) -> list[dict[str, Any]]:
    """What the workers of the last attempt left."""
    found = [json.loads(path.read_text()) for path in folder.glob("error-rank*.json")]
    return [item for item in found if item["attempt"] == max(other["attempt"] for other in found)]


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended: its exit code, a signal's negated, and when that was seen, in seconds since the epoch."""

    code: int
    time: float


def exits(folder: Path) -> dict[int, Exit]:
    """How the workers that ended first in the last attempt that failed did, by rank."""
    path = folder / FAILURES
    return {int(rank): Exit(**item) for rank, item in json.loads(path.read_text()).items()} if path.exists() else {}


ENDED_BY_OTHERS = {-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT}
"""Signals by which a launcher or agent ends healthy workers, once another has failed."""


def killed_ranks(folder: Path, world: int) -> set[int]:
    """The ranks that signals took, out of ``world``.

    A worker that the launcher ended is healthy. One that aborted (SIGABRT: the watchdog of its backend) waited for
    somebody: for those that a signal killed, else for those that did neither fail nor abort; only where there are none
    did the first of them by time fail by itself.
    """
    found = {rank: item for rank, item in exits(folder).items() if item.code < 0 and item.code not in ENDED_BY_OTHERS}
    aborted = {rank for rank, item in found.items() if item.code == -signal.SIGABRT}
    if set(found) - aborted or not aborted:
        return set(found) - aborted
    reported = reports(folder)
    if any(not is_consequence(item) for item in reported):
        return set()  # one said what went wrong
    silent = set(range(world)) - aborted - {item["rank"] for item in reported}
    return silent or {min(aborted, key=lambda rank: (found[rank].time, rank))}


def signals_of(folder: Path, reported: bool) -> str:
    """Who was killed by a signal, or asked to end, for people; else who was ended by one of those that end healthy
    workers, where that is all that happened; empty: nobody. ``reported``: whether a worker left an error."""
    return _killed(folder) or _ended_by_hand(folder, reported)


def _killed(folder: Path) -> str:
    codes = {rank: item.code for rank, item in exits(folder).items()}
    taken = {rank: -code for rank, code in codes.items() if code < 0 and code not in ENDED_BY_OTHERS}
    first = {rank: number for rank, number in taken.items() if number != signal.SIGABRT}
    killed = first or taken
    said = "; ".join([f"rank {rank} was killed by {signal_name(number)}" for rank, number in sorted(killed.items())]
                     + [f"rank {rank} was asked to end, SIGTERM" for rank, code in sorted(codes.items())
                        if code == StoppedError.exit_code])
    memory = " (by hand, or by the kernel for want of memory: see dmesg)" if signal.SIGKILL in killed.values() else ""
    return said + memory


def _ended_by_hand(folder: Path, reported: bool) -> str:
    """Who was ended by a signal with which a launcher ends healthy workers, where that is all that happened: before it
    could note SIGTERM, or by SIGINT, which no launcher of ours sends. Empty: nobody."""
    if not reported and any(item.code not in ENDED_BY_OTHERS for item in exits(folder).values()):
        return ""  # that is why the launcher ended them
    found = {rank: item for rank, item in exits(folder).items()
             if item.code in ENDED_BY_OTHERS and (not reported or item.code == -signal.SIGINT)}
    if not found:
        return ""
    rank = min(found, key=lambda number: (found[number].time, number))
    return f"rank {rank} was ended by {signal_name(-found[rank].code)}"


def signal_name(number: int) -> str:
    """``signal 9 (SIGKILL)``."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def is_consequence(item: dict[str, Any]) -> bool:
    """Whether a rank failed only because another had: its connection was closed, or it waited in vain."""
    text = item["message"]
    return any(sign in text for sign in ("the peer has failed", "Connection closed by peer", "nothing for",
                                         "Connection reset by peer"))
