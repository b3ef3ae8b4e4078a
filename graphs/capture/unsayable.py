"""What an operator graph cannot say of a model: recognised in an export, and said in one line with the model's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mipipe.graphs.capture.seen import seen_mode
from mipipe.graphs.capture.user_calls import line_of_error
from mipipe.graphs.errors import GraphError
from mipipe.graphs.models.silence import silence
from mipipe.graphs.tracing.dynamic_rows import is_dynamic

NUMBERS = ("a Python value depends on tensor data there; keep it a tensor (x.detach() in place of x.item()), use"
           " torch.where instead of if, leave out a test that only skips empty work, compute it outside the model, or"
           " pass it as a fixed argument")
_TO_NUMBER = ("aten.item.default", "aten._local_scalar_dense.default")


def _is_transformed(node: fx.Node) -> bool:
    """Whether a node's tensor is one of torch.func's transforms (vmap, grad), with dimensions that are not seen."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def fits_no_graph(node: fx.Node) -> bool:
    """Whether a node does what an operator graph cannot say, beside sizes that depend on data."""
    return str(node.target) in _TO_NUMBER or _is_transformed(node)


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers: its operator can, and it is no dropout of nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = {one.name: node.args[place] if place < len(node.args) else node.kwargs.get(one.name, one.default_value)
             for place, one in enumerate(target._schema.arguments)}
    return not any(given.get(name, 1) in (0, False) for name in ("p", "dropout_p", "dropout", "train", "training"))


class Unsayable(GraphError):
    """An operator of the model does what no trace can say, such as a result whose size depends on data."""

    advice = ("rows picked by a mask can be captured (torch.where(mask), x[mask], nonzero); write it with one of these,"
              " pad to a fixed number, or weigh by the mask instead")

    def __init__(self, node: fx.Node) -> None:
        self.kind = str(node.target)
        place = "".join(f" in {path} ({name})" for path, name, _ in node.meta.get("stack", ())[-1:] if path)
        self.text = f"the size of what {self.kind} returns{place} depends on data"
        if self.kind in _TO_NUMBER:
            self.text, self.advice = f"{self.kind}{place} makes a Python number of data", NUMBERS
        elif _is_transformed(node):
            self.text = f"{getattr(node.target, '__name__', self.kind)}{place} runs inside torch.vmap or the like"
            self.advice = "an operator graph cannot say it; write it with an extra dimension (broadcasting, einsum)"
        super().__init__(f"{self.text}; {self.advice}")


def line_in_model(module: nn.Module, inputs: Mapping[str, Any], kind: str) -> str:
    """Where the model calls such an operator: it is exported again, now with stack traces."""
    with silence(), seen_mode():
        program = torch.export.export(module, (), dict(inputs), strict=False)
    torch_folder, own = str(Path(torch.__file__).parent), str(Path(__file__).parent)
    for node in program.graph.nodes:
        if str(node.target) == kind and (is_dynamic(node) or fits_no_graph(node)):
            frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
            frames = [frame for frame in frames if not frame[0].startswith((torch_folder, own))]
            if frames:
                return " at {}:{} `{}`".format(*frames[-1])
    return ""


def explain_export(module: nn.Module, error: BaseException) -> str:
    """One line: the model's own source line at which the export stopped, what happened, and what to try."""
    chain = list[BaseException]()
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    message = next((line.strip() for item in reversed(chain) for line in str(item).splitlines() if line.strip()), "")
    text = " ".join(str(item) for item in chain)
    if "Size-like symbols: u" in text or "Size-like symbols: z" in text:
        advice = ("how many rows a mask picks depends on data, and any number is captured, none too: leave out a test"
                  " that skips empty work, loop over all experts, pick each one's rows with torch.where(index =="
                  " expert) in place of split sizes, and divide sums by max(1, count)")
    elif any(word in text for word in ("data-dependent", "DataDependent", "Tensor.item", "aten._local_scalar_dense")):
        advice = NUMBERS
    elif "pytree" in text or "input type" in text:
        advice = "return tensors (alone, in a tuple or a dict) and switch caches off (use_cache=False)"
    else:
        advice = ("check that module(**example_inputs) runs, with these input names and shapes; mipipe capture takes"
                  " others as --inputs module:function")
    found = f"{type(chain[-1]).__name__}: {message[:200]}" if message else type(error).__name__
    name = type(getattr(module, "wrapped", module)).__name__
    return f"model {name} cannot be exported: stopped{line_of_error(chain)}: {found}; {advice}"
