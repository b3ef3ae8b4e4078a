"""Which operators are heavy: what segments are made around."""

from __future__ import annotations

import re

from torch import fx

from mipipe.graphs.operators.recurrent import LAYERS
from mipipe.graphs.tracing.joint import attention_call

_HEAVY = re.compile(r"linear|mm\b|matmul|conv|embedding|attention|einsum|bilinear|grouped_mm|label_log_probs"
                    r"|teacher_distance")


def is_heavy(node: fx.Node) -> bool:
    """Whether an operator is a matrix product, a convolution, an embedding, attention or a recurrent layer."""
    known = node.target is attention_call or node.target in LAYERS.values()
    return known or _HEAVY.search(str(node.target)) is not None
