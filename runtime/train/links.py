"""Measured links: what a transfer between two ranks takes, as a cluster file's latency and bandwidth.

    torchrun --nproc-per-node 4 -m mipipe.runtime.train.links CLUSTER.yaml -o MEASURED.yaml

The ranks are the cluster's devices. Each pair in turn bounces a small and a large message between its ranks, while the
others wait; half of a round trip is one transfer. The latency is that of the small message, the bandwidth what the
large one adds to it; a class of links (within a host, between hosts) gets the median over its pairs. Left out: several
transfers at once, and transfers while the ranks compute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
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

SMALL, LARGE = 8, 1 << 22
"""Bytes of the two messages."""


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """A class of links: medians over ``pairs`` pairs, and the largest deviation of a pair's rate from its median."""

    latency_ns: int
    bytes_per_s: int
    pairs: int
    spread: float


def measure_links(topology: Topology, device: torch.device, rounds: int = 20) -> dict[str, MeasuredLink]:
    """The links between the ranks of the default process group, by class: ``within_host``, ``between_hosts``.

    Raises:
        InputError: the cluster has another number of devices than there are ranks, or only one.
    """
    if topology.num_devices != dist.get_world_size():
        raise InputError(f"calibrate links: {dist.get_world_size()} ranks, but the cluster has {topology.num_devices}"
                         " devices; start one process for each")
    if topology.num_devices < 2:
        raise InputError("calibrate links: one device has no links; expected at least two")
    found: dict[str, list[tuple[float, float]]] = {}
    for pair in combinations(range(topology.num_devices), 2):
        times = [_transfer_ns(pair, size, rounds, device) for size in (SMALL, LARGE)]
        dist.barrier()
        same = topology.devices[pair[0]].host == topology.devices[pair[1]].host
        latency, rate = times[0], (LARGE - SMALL) * 1e9 / max(times[1] - times[0], 1.0)
        found.setdefault("within_host" if same else "between_hosts", []).append((latency, rate))
    return {name: _summary(pairs) for name, pairs in found.items()}


def _summary(pairs: list[tuple[float, float]]) -> MeasuredLink:
    rate = statistics.median(rate for _, rate in pairs)
    return MeasuredLink(round(statistics.median(latency for latency, _ in pairs)), round(rate), len(pairs),
                        round(max(abs(item / rate - 1) for _, item in pairs), 4))


def _transfer_ns(pair: tuple[int, int], size: int, rounds: int, device: torch.device) -> float:
    """The median half round trip between two ranks, the same on all ranks."""
    rank = dist.get_rank()
    result = torch.zeros(1, dtype=torch.float64, device=device)
    if rank in pair:
        message = torch.zeros(size, dtype=torch.uint8, device=device)
        samples = list(_bounces(message, pair[1 - pair.index(rank)], rank == pair[0], rounds))
        result[0] = statistics.median(samples[len(samples) // 5:])  # the first ones open connections
    dist.broadcast(result, pair[0])
    return float(result)


def _bounces(message: torch.Tensor, peer: int, first: bool, rounds: int) -> Iterator[float]:
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        for sends in (first, not first):
            if sends:
                dist.send(message, peer)
            else:
                dist.recv(message, peer)
        if message.is_cuda:
            torch.cuda.synchronize()
        yield (time.perf_counter_ns() - begin) / 2


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
    dist.init_process_group("nccl" if cuda else "gloo")
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
