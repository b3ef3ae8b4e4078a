"""Measured links: what a transfer between two ranks takes, as a cluster file's latency and bandwidth.

    torchrun --nproc-per-node 4 -m mipipe.runtime.train.links CLUSTER.yaml -o MEASURED.yaml

The ranks are the cluster's devices. Each pair in turn bounces messages of growing sizes between its ranks, while the
others wait; half of a round trip is one transfer. The latency is that of the smallest message, the bandwidth what the
largest one adds to the one before it; a class of links (within a host, between hosts) gets the median over its pairs.
Left out: several transfers at once, and transfers while the ranks compute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.cluster import load_cluster
from mipipe.graphs.errors import InputError, MipipeError
from mipipe.graphs.serialize import load_data, write_text, yaml_text
from mipipe.graphs.topology import Topology

SIZES = {"cpu": (8, 4 << 20), "cuda": (8, 64 << 20, 256 << 20)}
"""Bytes of the messages; on GPUs 4 MiB would pass in little more than the latency."""
TOGETHER = {"cpu": 1, "cuda": 10}
"""Round trips that are started before the host waits for its device."""


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """A class of links: medians over ``pairs`` pairs, and the largest deviation of a pair's rate from its median."""

    latency_ns: int
    bytes_per_s: int
    pairs: int
    spread: float


def measure_links(topology: Topology, device: torch.device, rounds: int = 20, sizes: Sequence[int] | None = None,
                  together: int | None = None) -> dict[str, MeasuredLink]:
    """The links between the ranks of the default process group, by class: ``within_host``, ``between_hosts``.

    ``rounds`` samples of ``together`` round trips each; ``sizes`` of the messages in bytes, at least two.

    Raises:
        InputError: the cluster has another number of devices than there are ranks, or only one.
    """
    if topology.num_devices != dist.get_world_size():
        raise InputError(f"calibrate links: {dist.get_world_size()} ranks, but the cluster has {topology.num_devices}"
                         " devices; start one process for each")
    if topology.num_devices < 2:
        raise InputError("calibrate links: one device has no links; expected at least two")
    sizes, together = sizes or SIZES[device.type], together or TOGETHER[device.type]
    found: dict[str, list[tuple[float, float]]] = {}
    for pair in combinations(range(topology.num_devices), 2):
        times = [_transfer_ns(pair, size, rounds, together, device) for size in sizes]
        dist.barrier()
        same = topology.devices[pair[0]].host == topology.devices[pair[1]].host
        latency, rate = times[0], (sizes[-1] - sizes[-2]) * 1e9 / max(times[-1] - times[-2], 1.0)
        found.setdefault("within_host" if same else "between_hosts", []).append((latency, rate))
    return {name: _summary(pairs) for name, pairs in found.items()}


def _summary(pairs: list[tuple[float, float]]) -> MeasuredLink:
    rate = statistics.median(rate for _, rate in pairs)
    return MeasuredLink(round(statistics.median(latency for latency, _ in pairs)), round(rate), len(pairs),
                        round(max(abs(item / rate - 1) for _, item in pairs), 4))


def _transfer_ns(pair: tuple[int, int], size: int, rounds: int, together: int, device: torch.device) -> float:
    """The median half round trip between two ranks, the same on all ranks."""
    rank = dist.get_rank()
    result = torch.zeros(1, dtype=torch.float64, device=device)
    if rank in pair:
        message = torch.zeros(size, dtype=torch.uint8, device=device)
        samples = list(_bounces(message, pair[1 - pair.index(rank)], rank == pair[0], rounds, together))
        result[0] = statistics.median(samples[len(samples) // 5:])  # the first ones open connections
    dist.broadcast(result, pair[0])
    return float(result)


def _bounces(message: torch.Tensor, peer: int, first: bool, rounds: int, together: int) -> Iterator[float]:
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        for sends in (first, not first) * together:
            if sends:
                dist.send(message, peer)
            else:
                dist.recv(message, peer)
        if message.is_cuda:
            torch.cuda.synchronize()
        yield (time.perf_counter_ns() - begin) / (2 * together)


def write_cluster(path: Path, cluster: Path, measured: dict[str, MeasuredLink]) -> None:
    """The cluster file with its links replaced by the measured ones."""
    data: dict[str, Any] = dict(load_data(cluster))
    links = dict(data.get("links") or {})
    links |= {name: {"latency": f"{link.latency_ns}ns", "bandwidth": f"{link.bytes_per_s}B/s"}
              for name, link in measured.items()}
    write_text(path, yaml_text(data | {"links": links}))


def main() -> None:
    """Measure under torchrun; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    topology = load_cluster(options.cluster).topology
    cuda = torch.cuda.is_available() and any(device.kind != "cpu" for device in topology.devices)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        measured = measure_links(topology, device)
        if dist.get_rank() == 0:
            write_cluster(options.output, options.cluster, measured)
            for name, link in measured.items():
                print(f"{name}: latency {link.latency_ns / 1e3:.1f} us, bandwidth {link.bytes_per_s / 1e9:.3f} GB/s"
                      f" ({link.pairs} pairs, within {link.spread:.0%})", flush=True)
    except MipipeError as error:
        if dist.get_rank() == 0:
            sys.stderr.write(f"mipipe: error: {error}\n")
        sys.exit(error.exit_code)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
