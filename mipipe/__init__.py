"""Plans pipeline and expert parallelism with mixed-integer programs, and runs the plan under torchrun.

The path from a model to a run; each function is a verb of the command line, on values or on the paths of their files:

    graph = mipipe.capture("models/qwen3-moe", seq=4096, dtype="bfloat16")
    result = mipipe.plan(graph, "cluster.yaml", microbatches=64)
    mipipe.show(result.plan)
    mipipe.train(result.plan, graph, "train.yaml")

Nothing is imported before it is used: torch by `capture`, `profile`, `train` and `Engine`, a solver by `plan` and
`compare`. `mipipe.graphs`, `mipipe.planner` and `mipipe.runtime` have faces of their own for what is built from parts.
"""

from __future__ import annotations

import os

__version__ = "0.1.0"

_clone = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_clone, "graphs", "hardware.yaml")):
    __path__.append(_clone)  # in a clone the folders of the package lie beside this one

from mipipe.graphs.lazy import attach  # noqa: E402

__getattr__, __dir__ = attach(__name__, __file__)
