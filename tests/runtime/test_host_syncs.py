"""How often a step makes the host wait for its device: once, for the loss and the norm together.

On a CPU nothing waits, so what would wait is counted: every place where the value of a tensor of the step becomes a
number, a list or an array of the host, or where a result's size depends on values.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import pytest
import runtime_dags as dags
import runtime_equal as equal
import runtime_experts as ex
import runtime_models as models
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mipipe.runtime
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.config import OptimizerConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.training import Trainer

ROOT = Path(mipipe.runtime.__file__).parents[1]
READS = {"tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
SIZED = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default",
         "aten.unique_consecutive.default", "aten._unique2.default", "aten.repeat_interleave.Tensor"}
ON_HOST = ("graphs/recipes/rows.py", "graphs/models/loss.py:weight", "engine/engine.py:_prepare",
           "engine/engine.py:_groups_fault", "engine/engine.py:_end_sum",
           "exchange.py:send", "exchange.py:give_back", "torch/optim", "grouped_mm", "engine/batches.py",
           "train/data.py")
"""Who reads tensors that are on the host on every device: labels before they are moved, counts on gloo, step counters
of an optimizer that is not fused. Loops over experts' rows are the CPU's; CUDA has a kernel for them."""


def place() -> str:
    """The innermost function of ours, or of torch's optimizers, that is at work."""
    for frame in reversed(traceback.extract_stack()):
        if str(ROOT) in frame.filename and "/tests/" not in frame.filename:
            return f"{Path(frame.filename).relative_to(ROOT).as_posix()}:{frame.name}"
        if "torch/optim" in frame.filename:
            return "torch/optim"
    return "elsewhere"


class Reads(TorchFunctionMode):
    """Counts reads of values by methods of tensors, by place."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen, self.inside = seen, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and not self.inside:
            self.inside = True
            self.seen[place()] += 1
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.inside = False
        return func(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """Counts operators that give the host a value, or need one for their result's size, by place."""

    def __init__(self, seen: Counter[str], reads: Reads) -> None:
        super().__init__()
        self.seen, self.reads = seen, reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sized = str(func) in SIZED and not (str(func) == "aten.repeat_interleave.Tensor"
                                            and (kwargs or {}).get("output_size") is not None)
        if sized and not self.reads.inside:
            self.seen[place()] += 1
        return func(*args, **(kwargs or {}))


def count_step(call) -> dict[str, int]:
    """Where one call reads values of tensors on the device, and how often."""
    seen: Counter[str] = Counter()
    reads = Reads(seen)
    with Sizes(seen, reads), reads:
        call()
    return {where: number for where, number in seen.items() if not any(part in where for part in ON_HOST)}


def training_step(made, graph, state, batches, barrier="step"):
    """A rank's third step of training with clipping; where it read values."""
    config = TrainConfig(3, optimizer=OptimizerConfig("adamw", 1e-2), clip=0.1, barrier=barrier)
    engine = Engine(made, graph, state)
    trainer = Trainer(engine, config, Batches(iter(batches)))
    trainer.begin()
    trainer._step(0)
    trainer._step(1)
    return count_step(lambda: trainer._step(2))


@pytest.mark.distributed
@pytest.mark.parametrize("barrier", ["step", "none"])
def test_a_step_has_one(pool, barrier):
    """Two copies of a tied model on two ranks: sums in buckets, tied sums, clipping, an optimizer's step."""
    import random
    case = equal.case("skip")
    made = dags.random_plan(random.Random(3), case.graph, 2, 2)
    batches = [models.token_batch(equal.ROWS * 2, equal.LENGTH, 11, seed=number) for number in range(3)]
    for found in pool.run(4, __file__, "training_step", made, case.graph, case.state(), batches, barrier):
        assert found == {"runtime/engine/engine.py:_begin_sum": 1}


def exchange_step(plan, graph, state, batches):
    """A rank's second step with experts on all copies; where it read values."""
    engine = Engine(plan, graph, state)
    engine.step(batches[0][engine.mesh.copy])
    return count_step(lambda: engine.step(batches[1][engine.mesh.copy]))


@pytest.mark.distributed
def test_experts_add_one_for_each_layer_and_microbatch(pool):
    """The splits of a layer's rows, which its all-to-all needs: on the collective stream, if the plan has one."""
    module, graph = ex.captured()
    plan = ex.plan_for(graph, 1)
    batches = [[ex.batch_of(step, copy, 2) for copy in range(2)] for step in range(2)]
    for found in pool.run(2, __file__, "exchange_step", plan, graph, ex.state_of(module), batches):
        rows = found.pop("runtime/experts/exchange.py:route")
        assert rows == ex.LAYERS * ex.COUNT and found == {"runtime/engine/engine.py:_begin_sum": 1}
