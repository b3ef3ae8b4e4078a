"""The time, processor time and peak memory of a Python process with all that it forks, sampled from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

WATCH = """
import json, resource, runpy, sys
sys.argv = sys.argv[1:]

def status(key):
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

try:
    {body}
except SystemExit as ended:
    if ended.code:
        raise
finally:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {{"peak": status("VmHWM"), "anonymous": status("RssAnon"),
              "cpu": sum(item.ru_utime + item.ru_stime for item in used)}}
    sys.stderr.write("\\nMEASURED " + json.dumps(found) + "\\n")
"""
"""What the measured process runs. It has no thread of its own: mipipe forks only where there is none."""
SAMPLE_S = 0.02
"""Between two looks at a process's memory."""


def forks(process: int) -> list[int]:
    """The processes that one has started, and theirs."""
    try:
        found = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in found for each in (child, *forks(child))]


def held(process: int) -> tuple[int, int]:
    """Bytes that a process and its forks hold, shared pages counted once: of all memory (0 without forks, where the
    process knows its peak), and of anonymous memory."""
    others = forks(process)
    total, anonymous = 0, 0
    with contextlib.suppress(OSError, StopIteration):
        if not others:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            return 0, 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        for each in (process, *others):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            sizes = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Pss")}
            total, anonymous = total + sizes["Pss:"], anonymous + sizes["Pss_Anon:"]
    return total, anonymous


def measured(python: Path, body: str, arguments: list[str], cache: Path | None = None) -> dict[str, float]:
    """Seconds of wall and of processor time (forks included) and peak bytes, resident and anonymous."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else neither program's modules are compiled but once
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    peaks = [0, 0]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen([str(python), "-c", WATCH.format(body=body), *arguments], stdout=out, stderr=err,
                                   env=environment)
        while process.poll() is None:
            peaks = list(map(max, peaks, held(process.pid)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_S)
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        told = out.read(), err.read()
    lines = [line for line in told[1].splitlines() if line.startswith("MEASURED ")]
    if process.returncode or not lines:
        raise SystemExit(f"{arguments}: failed\n{told[0][-2000:]}\n{told[1][-4000:]}")
    found = json.loads(lines[-1].removeprefix("MEASURED "))
    return {"cpu": found["cpu"], "peak": max(peaks[0], found["peak"]), "anonymous": max(peaks[1], found["anonymous"]),
            "seconds": seconds}
