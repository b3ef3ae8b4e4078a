"""Parameters of which every device that holds the same updates a part: gathered before a step reads them, gradients
scattered.

What sharded optimizer state asks of these, copies of the plan and their members along the context axis (Rajbhandari et
al., "ZeRO", SC 2020, stages 1 and 2): the sums of gradients are needed in parts alone, a reduce-scatter, and the
updated parts by all, an all-gather, together what one all-reduce moves. On CUDA a group of them is one launch. On CPUs
gloo's all-reduce is faster than its reduce-scatter (`benchmarks/results/NOTES.md`), so gradients are summed whole
there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from mipipe.runtime.engine.compiling.buckets import BUCKET_BYTES
from mipipe.runtime.engine.compiling.compiled import LocalRank
from mipipe.runtime.ranks import comm
from mipipe.runtime.weights.weights import OwnPart

GATHER_BYTES = BUCKET_BYTES
"""Parts that are gathered together: as many as gradients are summed together."""


class Gathers:
    """The parts of parameters that this device updates, and how all that hold the same come to have the whole."""

    def __init__(self, local: LocalRank, waits: comm.Waits) -> None:
        self._weights, self._mesh, self._waits = local.weights, local.mesh, waits
        self._groups: list[list[str]] = []
        filling: dict[tuple[torch.dtype, str], tuple[list[str], int]] = {}
        for name, part in self._weights.own.items():
            key = part.dtype, self._weights.parts[name].division.axis
            names, size = filling.get(key, ([], 0))
            filling[key] = [*names, name], size + part.nbytes
            if filling[key][1] >= GATHER_BYTES:
                self._groups.append(filling.pop(key)[0])
        self._groups += [names for names, _ in filling.values()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what the optimizer changed to where phase functions read it, on all devices that hold the same.

        Raises:
            RunError: another one does not come.
        """
        self._weights.refresh()
        weights, groups, begun = self._weights, self._mesh.alike, []
        for names in self._groups:
            part = weights.parts[names[0]].division
            begun.append((names, *comm.start_gather_parts(groups[part.axis], [weights.compute[name] for name in names],
                                                          [weights.own[name] for name in names], part.size, part.dim)))
        for names, works, put in begun:
            self._waits.wait(works, functools.partial("all-gather of {} parameters".format, len(names)))
            put()


def scattered(group: Any, parts: Sequence[OwnPart], sums: Sequence[torch.Tensor], flat: torch.Tensor) -> list[Any]:
    """The works of a sum over a group of gradients that lie in ``flat``; afterwards this device's part of each of
    ``sums`` is summed, the rest is not to be read."""
    if not flat.is_cuda:
        return [comm.start_all_reduce(group, flat)]
    return comm.start_reduce_scatters(group, [part.of(item) for part, item in zip(parts, sums, strict=True)], sums)
