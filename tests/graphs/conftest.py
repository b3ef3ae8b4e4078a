"""Small operator graphs made by hand: executable, with sizes that can be counted in the head."""

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mipipe.graphs.operator_graph import (
    Operator,
    OperatorGraph,
    ParameterSpec,
    Phase,
    Role,
    SavedTensor,
    Segment,
    SegmentTrace,
    Tags,
    TensorSpec,
    Value,
)

sys.path.insert(0, str(Path(__file__).parent))  # for graph_checks

ROWS = 4


def linear_trace(width=8, *, trainable=True, wants_input_grad=True, inputs=1, all_to_all=False):
    """y = (x_0 + .. + x_n) W for x of ROWS x width: F adds and multiplies, I and W are products with the gradient."""
    x, w = TensorSpec((ROWS, width), "float32"), TensorSpec((width, width), "float32")
    names = [f"x{i}" for i in range(inputs)]
    product = 0 if all_to_all else 2 * ROWS * width * width  # a collective has no products
    moved = (2 * x.num_bytes + w.num_bytes)
    operators = []
    last = "x0"
    for number, name in enumerate(names[1:]):
        operators.append(Operator(f"s{number}", "aten.add.Tensor", Phase.F, [{"ref": last}, {"ref": name}], {}, (x,), 0,
                                  2 * x.num_bytes, x.num_bytes))
        last = f"s{number}"
    kind = "aten.mm.default"
    operators.append(Operator("y", kind, Phase.F, [{"ref": last}, {"ref": "w"}], {}, (x,), product, moved - x.num_bytes,
                              x.num_bytes))
    if all_to_all:
        operators.append(Operator("z", "mipipe.all_to_all.default", Phase.F, [{"ref": "y"}], {}, (x,)))
    if wants_input_grad:
        operators += [Operator("wt", "aten.t.default", Phase.I, [{"ref": "w"}], {}, (w,)),
                      Operator("gx", kind, Phase.I, [{"ref": "gy"}, {"ref": "wt"}], {}, (x,), product,
                               moved - x.num_bytes, x.num_bytes)]
    saved = []
    if trainable:
        operators += [Operator("xt", "aten.t.default", Phase.W, [{"ref": last}], {}, (x,)),
                      Operator("gw", kind, Phase.W, [{"ref": "xt"}, {"ref": "gy"}], {}, (w,), product,
                               2 * x.num_bytes, w.num_bytes)]
        saved.append(SavedTensor(last, x.num_bytes, Phase.F, Phase.W, last if inputs == 1 else None))
        if wants_input_grad:
            saved.append(SavedTensor("gy", x.num_bytes, Phase.I, Phase.W, "gy"))
    grads = trainable or wants_input_grad
    specs = {**dict.fromkeys(names, x), "w": w, "gy": x}
    key = f"linear{width}{trainable}{wants_input_grad}{inputs}{all_to_all}"
    return SegmentTrace(hashlib.sha256(key.encode()).hexdigest()[:16], tuple(names), ("w",), (),
                        ("gy" if grads else None,), specs, tuple(operators), ("z" if all_to_all else "y",), {},
                        tuple("gx" if wants_input_grad else None for _ in names), ("gw" if trainable else None,),
                        tuple(saved), {Phase.F: 0, Phase.I: 0, Phase.W: 0})


@dataclass
class Builder:
    """Collects segments in a topological order; each makes the value named after it."""

    segments: list = field(default_factory=list)
    values: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)
    traces: dict = field(default_factory=dict)

    def source(self, name="x", width=8):
        self.values[name] = Value(name, TensorSpec((ROWS, width), "float32"), None, False)
        return name

    def linear(self, name, *inputs, layer=None, branch=None, role=Role.MLP, expert_group=None, tied=None, **options):
        """A segment that multiplies the sum of its inputs with a weight of its own (or ``tied`` to another's)."""
        options.setdefault("wants_input_grad", any(self.values[i].differentiable for i in inputs))
        trace = linear_trace(inputs=len(inputs), **options)
        self.traces[trace.digest] = trace
        weight = f"{name}.weight"
        self.parameters[weight] = ParameterSpec(weight, trace.specs["w"], options.get("trainable", True), tied)
        differentiable = trace.output_grads[0] is not None
        self.values[name] = Value(name, trace.specs["x0"], name, differentiable)
        self.segments.append(Segment(name, name, trace.digest, tuple(inputs), (name,), (weight,), (),
                                     Tags(layer, branch, role, expert_group)))
        return name

    def graph(self):
        inputs = tuple(name for name, value in self.values.items() if value.source is None)
        last = self.segments[-1].outputs[0]
        return OperatorGraph("handmade", inputs, (last,), last, tuple(self.segments), tuple(self.values.values()),
                             tuple(self.parameters.values()), tuple(self.traces.values()))


@pytest.fixture
def builder():
    """An empty `Builder`."""
    return Builder()


@pytest.fixture
def transformer():
    """A function layers -> graph: embedding, per layer (norm, attention, norm, mlp), head; equal layers."""
    def make(layers, width=8, experts=0):
        made = Builder()
        x = made.linear("embed", made.source(width=width), role=Role.EMBEDDING, width=width, wants_input_grad=False)
        for layer in range(layers):
            normed = made.linear(f"layers.{layer}.norm1", x, layer=layer, role=Role.NORM, width=width)
            attended = made.linear(f"layers.{layer}.attn", normed, layer=layer, role=Role.ATTENTION, width=width)
            second = made.linear(f"layers.{layer}.norm2", attended, x, layer=layer, role=Role.NORM, width=width)
            if experts:
                parts = [made.linear(f"layers.{layer}.expert{expert}", second, layer=layer, role=Role.EXPERTS,
                                     expert_group=expert, width=width) for expert in range(experts)]
                x = made.linear(f"layers.{layer}.combine", *parts, layer=layer, role=Role.COMBINE, width=width)
            else:
                x = made.linear(f"layers.{layer}.mlp", second, layer=layer, role=Role.MLP, width=width)
        made.linear("head", x, role=Role.HEAD, width=width)
        return made.graph()
    return make
