"""The training graph of a bottleneck network (ResNet-50 by default) as a placement workload, written without torch.

    python benchmarks/conv_training.py resnet50.json --devices 6

Operators as the layers of He et al., arXiv 1512.03385, give them: convolutions, normalisations, activations, additions,
pooling, classifier, each with its backward operator in the same colour class. Times in ms are a roofline (10 Tflop/s,
400 GB/s; a backward operator takes twice its forward's), memory 16 GB; a core is 20 times slower.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FLOPS, MEMORY_BANDWIDTH = 10e12, 400e9
SLOWER = 20.0


class _Graph:
    """Forward operators as they are added: (flops, bytes of output, bytes of parameters, inputs)."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.operators: list[tuple[float, float, float, list[int]]] = []

    def add(self, inputs: list[int], channels: int, side: int, flops: float = 0.0, parameters: float = 0.0) -> int:
        """An operator with an output of batch x channels x side x side floats."""
        out = 4.0 * self.batch * channels * side * side
        self.operators.append((flops * self.batch or out, out, 4.0 * parameters, inputs))
        return len(self.operators) - 1

    def convolution(self, before: int, into: int, out: int, kernel: int, side: int, relu: bool = True) -> int:
        """Convolution, normalisation and, if asked for, activation."""
        weights = into * out * kernel * kernel
        last = self.add([before], out, side, 2.0 * weights * side * side, weights)
        last = self.add([last], out, side, parameters=2 * out)
        return self.add([last], out, side) if relu else last


def conv_training(blocks: tuple[int, ...] = (3, 4, 6, 3), devices: int = 6, cores: int = 0,
                  batch: int = 32, link: float = 50e9) -> dict[str, Any]:
    """The workload in the exchange format of `mipipe.planner.devices.instances.instance`, as data; ``link``
    in bytes/s."""
    graph = _Graph(batch)
    into, side = 64, 56
    last = graph.add([graph.convolution(graph.add([], 3, 224), 3, 64, 7, 112)], 64, 56)
    for stage, count in enumerate(blocks):
        width = 64 << stage
        side = 56 >> stage
        for block in range(count):
            inner = graph.convolution(graph.convolution(last, into, width, 1, side), width, width, 3, side)
            inner = graph.convolution(inner, width, 4 * width, 1, side, relu=False)
            short = last if block else graph.convolution(last, into, 4 * width, 1, side, relu=False)
            last = graph.add([graph.add([inner, short], 4 * width, side)], 4 * width, side)
            into = 4 * width
    last = graph.add([graph.add([last], into, 1)], 1000, 1, 2.0 * into * 1000, into * 1000)
    graph.add([last], 1, 1)
    return _workload(graph, devices, cores, link)


def _workload(graph: _Graph, devices: int, cores: int, link: float) -> dict[str, Any]:
    """Forward and backward nodes: ``n`` and ``2 N - 1 - n`` are one class; a gradient is as large as what it is of."""
    count = len(graph.operators)
    nodes, edges = [], []
    for n, (flops, out, parameters, inputs) in enumerate(graph.operators):
        moved = out + parameters + sum(graph.operators[i][1] for i in inputs)
        time = 1e3 * max(flops / FLOPS, moved / MEMORY_BANDWIDTH)
        back = 2 * count - 1 - n
        for key, factor in ((n, 1.0), (back, 2.0)):
            nodes.append({"id": key, "supportedOnFpga": 1, "cpuLatency": SLOWER * factor * time,
                          "fpgaLatency": factor * time, "isBackwardNode": int(key == back), "colorClass": n,
                          "size": 3 * parameters if key == back else out + parameters})
        grad = 1e3 * sum(graph.operators[i][1] for i in inputs) / link
        for i in inputs:
            forward = 1e3 * graph.operators[i][1] / link
            edges += [{"sourceId": i, "destId": n, "cost": forward},
                      {"sourceId": i, "destId": back, "cost": forward},
                      {"sourceId": back, "destId": 2 * count - 1 - i, "cost": grad}]
    edges.append({"sourceId": count - 1, "destId": count, "cost": 1e3 * graph.operators[-1][1] / link})
    return {"maxFPGAs": devices, "maxCPUs": cores, "maxSizePerFPGA": 16e9, "nodes": nodes, "edges": edges}


def main() -> None:
    """Write the workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 4, 6, 3], help="bottlenecks per stage")
    parser.add_argument("--devices", type=int, default=6)
    parser.add_argument("--cores", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--link", type=float, default=50e9, help="bytes/s between an accelerator and the host")
    asked = parser.parse_args()
    data = conv_training(tuple(asked.blocks), asked.devices, asked.cores, asked.batch, asked.link)
    asked.file.write_text(json.dumps(data))


if __name__ == "__main__":
    main()
