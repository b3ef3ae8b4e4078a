"""Four persistent worker processes that run test functions as the ranks of a gloo group.

Workers are forked from a server that has imported torch and what most tasks use: seconds of CPU, once for a session. A
task is a file and the name of a function in it; the function gets its arguments inside an initialised process group of
the asked size and returns something picklable. What else its file imports is done before a task's time begins.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

WORKERS = 4
IMPORT_S = 240.0
"""How long the workers may take to import torch and a task's module."""
IMPORTED = ("hypothesis", "mipipe.graphs.capture.model", "mipipe.runtime.worker", "pytest", "torch._dynamo",
            "torch.distributed.checkpoint", "transformers")
"""What the server imports: most files of tests, and the first optimizer torch._dynamo."""


class TaskError(AssertionError):
    """A rank raised, or did not answer in time; the message has every rank's traceback and output."""


def worker_main(rank: int, connection: Any, log: str) -> None:
    """Serve tasks until the pipe closes."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage, and takes long to look through
    modules: dict[str, Any] = {}
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        path, name, args, world, store, timeout = task
        try:
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                modules[path] = importlib.util.module_from_spec(spec)
                sys.modules[Path(path).stem] = modules[path]
                spec.loader.exec_module(modules[path])
                gc.freeze()
            connection.send(("ready", None))
            connection.recv()  # all are
            dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world),
                                    timeout=timedelta(seconds=timeout))
            answer = ("ok", getattr(modules[path], name)(*args))
            dist.barrier()
        except BaseException:
            answer = ("error", traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        gc.collect()  # an engine in a failed task's frames keeps its connections open, as no ended process would
        connection.send(answer)


class Pool:
    """The workers; `run` one task on the first ``world`` of them."""

    def __init__(self, workers: int = WORKERS) -> None:
        self._size = workers
        self._folder = tempfile.TemporaryDirectory()
        self._workers: list[tuple[Any, Any, Path]] = []
        self._count = 0

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            log = Path(self._folder.name) / f"rank{rank}-{self._count}.log"
            process = context.Process(target=worker_main, args=(rank, theirs, str(log)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours, log))

    def run(self, world: int, path: str, name: str, *args: Any, timeout: float = 60.0) -> list[Any]:
        """The answers of all ranks.

        Raises:
            TaskError: a rank raised or gave no answer within ``timeout`` seconds.
            ValueError: there are fewer workers than ranks, which would wait for each other.
        """
        if world > self._size:
            raise ValueError(f"{world} ranks: expected at most {self._size}, the pool's workers")
        self._count += 1
        try:
            if not self._workers:
                self._start()
            starts = [log.stat().st_size if log.exists() else 0 for _, _, log in self._workers]
            answers = self._ask(world, (path, name, args, world, f"{self._folder.name}/store{self._count}", timeout))
        except BaseException:  # a test out of time, Ctrl-C: what the workers say later is no answer to the next task
            self.close()
            raise
        if all(state == "ok" for state, _ in answers):
            return [value for _, value in answers]
        lines = []
        for rank, (state, text) in enumerate(answers):
            log = self._workers[rank][2]
            output = log.read_text()[starts[rank]:] if log.exists() else ""
            lines.append(f"--- rank {rank}: {state}\n{text if state == 'error' else ''}\n{output}")
        self.close()
        raise TaskError(f"{name} on {world} ranks failed\n" + "\n".join(lines))

    def _ask(self, world: int, task: tuple[Any, ...]) -> list[Any]:
        """What every rank says to a task, once all have imported its file."""
        for _, connection, _ in self._workers[:world]:
            connection.send(task)
        answers = self._answers(world, IMPORT_S)
        if all(state == "ready" for state, _ in answers):
            for _, connection, _ in self._workers[:world]:
                connection.send("go")
            answers = self._answers(world, task[-1] + 20)
        return answers

    def _answers(self, world: int, patience: float) -> list[Any]:
        """What every rank says within so many seconds."""
        deadline = time.monotonic() + patience
        answers: list[Any] = []
        for _, connection, _ in self._workers[:world]:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                try:
                    answers.append(connection.recv())
                except EOFError:
                    answers.append(("error", "the process died"))
            else:
                answers.append(("error", f"no answer within {patience:g} s"))
        return answers

    def close(self) -> None:
        """End all workers."""
        for process, connection, _ in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()
