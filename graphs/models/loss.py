"""How a graph's loss is normalised: what the runtime must know to scale it, and the losses that capture puts inside.

``graph.source["loss"]`` is ``{"reduction": "mean"}`` (each microbatch's loss is a mean; a step is their average) or
``{"reduction": "sum", "labels": name, "ignore_index": i, "shift": bool}`` (the loss is a sum over valid labels; a
step is the sum over all microbatches divided by the global count of valid labels).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mipipe.graphs.operator_graph import OperatorGraph

MEAN: dict[str, Any] = {"reduction": "mean"}


def sum_over(labels: str, *, ignore_index: int = -100, shift: bool = False) -> dict[str, Any]:
    """The loss is a sum over the entries of input ``labels`` that differ from ``ignore_index``.

    With ``shift`` position t predicts label t + 1, so that the first label of each sequence does not count
    (`shifted`).
    """
    return {"reduction": "sum", "labels": labels, "ignore_index": ignore_index, "shift": shift}


def shifted(x: Tensor, last: float = -100) -> Tensor:
    """What each position predicts: x [B,T,..] one position to the left, with ``last`` where nothing is left to predict.

    So every row of logits stays, also where members of a team have positions each. A loss that cuts the last row off
    (``labels[:, 1:], logits[:, :-1]``) is as right, but T - 1 rows do not divide: every member then computes them all.
    """
    return nn.functional.pad(x[:, 1:], (0, 0) * (x.dim() - 2) + (0, 1), value=last)


def weight(graph: OperatorGraph, microbatch: Mapping[str, Any]) -> int:
    """What one microbatch adds to the denominator: its count of valid labels, or 1 where the loss is a mean.

    The step's loss is sum(loss_m) / sum(weight_m), so every backward starts with the gradient 1 / sum(weight_m).
    """
    info = graph.source.get("loss", MEAN)
    if info["reduction"] != "sum":
        return 1
    labels = microbatch[info["labels"]]
    labels = labels[..., 1:] if info["shift"] else labels
    return int((labels != info["ignore_index"]).sum())
