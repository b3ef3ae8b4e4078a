"""How the processes of a run find one another: torch's store, within a time limit, and the process group."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mipipe.graphs.errors import RunError
from mipipe.runtime.train.launching.devices import agree


def connect(timeout_s: float, grace_s: float = 5.0) -> tuple[dist.Store, int, int]:
    """torch's store of this run, this process's rank and the number of processes.

    Raises:
        RunError: nobody answers there, or no torchrun.
    """
    found: list[tuple[dist.Store, int, int]] = []
    failed: list[BaseException] = []

    def meet() -> None:
        try:
            found.append(next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=meet, daemon=True)  # the store waits for ever for an answer it does not understand
    thread.start()
    thread.join(timeout_s + grace_s)
    if found:
        return found[0]
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = (str(failed[0]).strip().splitlines() or ["no reason"])[0] if failed else \
        f"no answer within {timeout_s:g} s (timeout_s); another program may be listening there"
    raise RunError(f"rendezvous at {place}: {reason}")


@dataclass(frozen=True, slots=True)
class Joined:
    """How a process came into its run: torchrun's store (None: torchrun did not start it), one that is new after every
    restart, and the number of its branch."""

    store: dist.Store | None
    attempt: dist.Store
    branch: int = 0


def start_processes(world: int, device: torch.device, timeout_s: float, branches: int = 1) -> Joined:
    """Join the process group, gloo on every device: what processes tell one another goes there, tensors on the groups
    of `mipipe.runtime.ranks.mesh`. Each of ``branches`` blocks of processes has a group, and a part of the store, of
    its own. One thread on a CPU: ranks share the cores, and reruns are bitwise equal.

    Raises:
        RunError: the rendezvous did not come about, or workers would compute on different sorts of devices.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    if world == 1 and "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return Joined(None, dist.HashStore())
    store, place, size = connect(timeout_s)
    number, each = place * branches // size, size // branches
    # torchrun keeps one store over restarts: without a prefix, ranks would find the addresses of those that died.
    attempt = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if world > 1:
        agree(attempt, place, device, timeout_s)
    if each > 1:
        own = attempt if branches == 1 else dist.PrefixStore(f"branch{number}", attempt)
        dist.init_process_group("gloo", store=own, rank=place % each, world_size=each,
                                timeout=timedelta(seconds=timeout_s))
    return Joined(store if branches == 1 else dist.PrefixStore(f"branch{number}", store), attempt, number)
