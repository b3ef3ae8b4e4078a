"""Jobs on worker threads until a deadline, for the searches of `mipipe.planner.devices.place`.

The kernels and HiGHS release the GIL, so threads use all cores. Every job gets a one-element flag array that turns
true when it should end at once; kernels read it every thousand moves, HiGHS in its callback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

TimedJob = Callable[[np.ndarray], Callable[[], None]]
"""Takes the flag, works, and returns what to do with the result; that part runs in the calling thread."""

POLL = 0.1
"""Seconds between two looks at whether it is enough."""


def run_jobs(jobs: Iterator[TimedJob], *, threads: int, seconds: float, enough: Callable[[], bool]) -> None:
    """Run jobs, ``threads`` at a time, until none is left, the time is over or ``enough``, which is asked often.

    ``jobs`` is advanced and results are taken in the calling thread, so a generator may look at what was found.
    Running jobs are told to end on a deadline, on ``enough`` and on Ctrl-C; Ctrl-C is then raised again.
    """
    deadline = time.monotonic() + seconds
    stop = np.zeros(1, dtype=np.bool_)
    pool = ThreadPoolExecutor(threads)
    running: set[Future[Callable[[], None]]] = set()
    try:
        while True:
            while len(running) < threads and not stop[0] and (job := next(jobs, None)) is not None:
                running.add(pool.submit(job, stop))
            if not running:
                return
            done, running = wait(running, min(POLL, max(0.0, deadline - time.monotonic())) if not stop[0] else None,
                                 FIRST_COMPLETED)
            for future in done:
                future.result()()
            if enough() or time.monotonic() >= deadline:
                stop[0] = True
    finally:
        stop[0] = True
        for future in running:
            future.result()()
        pool.shutdown()
