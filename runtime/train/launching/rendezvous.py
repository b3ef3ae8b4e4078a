"""How the processes of a run find one another: torch's store, within a time limit, and the process group."""

from __future__ import annotations

import os
import threading
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


def start_processes(world: int, device: torch.device, timeout_s: float) -> dist.Store | None:
    """Join the process group, gloo on every device: what processes tell one another goes there, tensors on the groups
    of `mipipe.runtime.engine.mesh`. Returns torchrun's store, where torchrun started this process. One thread on a CPU:
    ranks share the cores, and reruns are bitwise equal.

    Raises:
        RunError: the rendezvous did not come about, or workers would compute on different sorts of devices.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    if world == 1 and "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    store, place, size = connect(timeout_s)
    if world > 1:
        # torchrun keeps one store over restarts: without a prefix, ranks would find the addresses of those that died.
        attempt = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        agree(attempt, place, device, timeout_s)
        dist.init_process_group("gloo", store=attempt, rank=place, world_size=size,
                                timeout=timedelta(seconds=timeout_s))
    return store
