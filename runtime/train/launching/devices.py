"""Which device the workers of a run compute on: what the user says, else what the plan was made for.

Nothing is guessed: a plan for accelerators does not quietly train on CPUs, nor one for CPUs on a GPU, and workers that
chose differently end before they wait for one another.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from mipipe.graphs.errors import InputError, RunError
from mipipe.planner.plan import Plan

ANY = "device"
"""The kind of devices that stand for any (`Topology.uniform`)."""


def kinds_of(plan: Plan) -> set[str]:
    """The device kinds a plan was made for."""
    if plan.team is not None:
        return {plan.team.kind}
    return {device.kind for device in plan.problem.topology.devices}


def choose(name: str | None, kinds: Iterable[str], count: int) -> str:
    """``cpu`` or ``cuda`` for ``count`` workers on this host: the named one, else the one for the plan's kinds.

    Raises:
        InputError: there are fewer CUDA devices than workers; or nothing was named, and the kinds are of several sorts,
            or of one that is not here.
    """
    named = sorted(set(kinds))
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"device: found {name!r}, expected cpu or cuda")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = "no CUDA device" if not here else f"{here} CUDA device{'s' if here > 1 else ''}"
    workers = f"{count} worker{'s' if count > 1 else ''}"
    if name == "cuda":
        if here < count:
            raise InputError(f"device: cuda asked for, but torch sees {found} for {workers} on this host; start fewer"
                             " here, or use --device cpu")
        return name
    if name == "cpu" or named == ["cpu"]:
        return "cpu"
    if "cpu" in named:
        raise InputError(f"device: the plan is for devices of kinds {', '.join(named)}, which do not run together; plan"
                         " for one of them, or say --device cpu or --device cuda")
    if here >= count:
        return "cuda"
    if named == [ANY]:
        return "cpu"
    raise InputError(f"device: the plan is for {', '.join(named)}, but torch sees {found} for {workers} on this host;"
                     " say --device cpu to run it on CPUs, or start it where the devices are")


def within_reach(name: str | None, kinds: Iterable[str], count: int) -> int:
    """How many of ``count`` workers this host has devices for, where some are lost: fewer only where these are to be
    CUDA devices (named, or as the plan says), and there are any."""
    named = set(kinds)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cuda = name == "cuda" or (name is None and not named & {"cpu", ANY})
    return min(count, here) if on_cuda and here else count


def check_spare(kind: str, count: int) -> None:
    """Raise `InputError` where not all of ``count`` devices of a host, spare ones too, are there."""
    here = torch.cuda.device_count() if kind == "cuda" else count
    if here < count:
        raise InputError(f"--processes {count}: torch sees {here} CUDA device{'s' if here > 1 else ''} on this host;"
                         " give at most as many")


class visible_devices(contextlib.AbstractContextManager[None]):
    """Let child processes see only these CUDA devices, where there are any."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = devices
        self._before = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            known = self._before.split(",") if self._before else [str(i) for i in range(torch.cuda.device_count())]
            if max(self._devices) < len(known):
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(known[device] for device in self._devices)

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self._before
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def bind(kind: str) -> torch.device:
    """This worker's device of a kind; with CUDA it is the current one from now on.

    Kernels of several communicators must start in one order on all GPUs, and nothing that waits for a whole GPU, such
    as loading a kernel at its first use, may come while a receive occupies it: NCCL and CUDA are told so where the
    user has not (NVIDIA, NCCL documentation, "Using multiple NCCL communicators concurrently"). The allocator is told
    as well: its segments grow in place, so that microbatches and rows of changing sizes leave no gaps between them.
    """
    if kind == "cpu":
        return torch.device("cpu")
    for name, value in (("NCCL_LAUNCH_ORDER_IMPLICIT", "1"), ("CUDA_MODULE_LOADING", "EAGER")):
        os.environ.setdefault(name, value)
    if not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        _tell_allocator("expandable_segments:True")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _tell_allocator(settings: str) -> None:
    """Set options of torch's allocator as its environment variable does, which torch reads when it is imported."""
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or getattr(
        torch._C, "_cuda_cudaCachingAllocator_set_allocator_settings", None)  # its name until torch 2.9
    if tell is not None:
        tell(settings)


def deterministic() -> None:
    """Only use kernels that give the same bits for the same operands from now on; those without such a form raise.

    On CUDA sums by atomics (``index_add_``, flash attention's gradient of queries) take slower forms, and cuBLAS works
    in a workspace of fixed size, 8 x 4 MiB on each device, which it must be told before its first use.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    fills = torch.utils.deterministic
    fills.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
    torch.backends.cudnn.benchmark = False


def agree(store: dist.Store, place: int, device: torch.device, timeout_s: float) -> None:
    """Return when this worker knows that its device is of the first worker's sort.

    Raises:
        RunError: it is not, or the first worker has not said so in time.
    """
    mine = f"{device.type} on {socket.gethostname()}"
    key = "mipipe/device"
    if place == 0:
        store.set(key, mine)
        return
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except RuntimeError:  # torch's DistStoreError
        raise RunError(f"rank {place}: nothing from rank 0 for {timeout_s:g} s; it hangs or never started") from None
    first = store.get(key).decode()
    if first.partition(" ")[0] != device.type:
        raise RunError(f"device: rank {place} would compute with {mine}, but rank 0 with {first}; say the same --device"
                       " on all hosts, or see that every worker has a device there")
