"""A model becomes an operator graph: export, cut into segments, trace each distinct segment once, annotate.

`capture` takes whatever names a model (see `mipipe.graphs.models.sources`), `capture_module` a module in memory. The
loss is part of the graph and the gradient that starts its backward is an argument of the last segment, so the runtime
chooses the scale: 1 / (valid labels of all microbatches) where ``source["loss"]`` says that the loss is a sum over
labels, 1 / (number of microbatches) where it is a mean (`mipipe.graphs.models.loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.capture import verify as verifying
from mipipe.graphs.capture.annotate import Patterns, annotate
from mipipe.graphs.capture.assemble import TraceProgress, assemble
from mipipe.graphs.capture.expert_groups import routed_experts, slice_parameters, split_banks
from mipipe.graphs.capture.export import aliases_of, export_model, flatten_program
from mipipe.graphs.capture.labels import Granularity
from mipipe.graphs.capture.program_files import load_program
from mipipe.graphs.capture.segment import cut_segments
from mipipe.graphs.errors import GraphError
from mipipe.graphs.exchange import check_exchange
from mipipe.graphs.models import loss as losses
from mipipe.graphs.models.sources import open_source
from mipipe.graphs.operator_graph import OperatorGraph, ParameterSpec
from mipipe.graphs.recipes.options import RecipeConfig
from mipipe.graphs.recipes.source import with_recipe
from mipipe.graphs.tracing.trace import spec_of


def capture(source: str | Path, *, seq: int = 128, batch: int = 1, dtype: str | None = None,
            overrides: Mapping[str, Any] | None = None, images: int = 1, image: int = 0, frames: int = 0,
            expert_groups: int = 1, expert_parallel: int = 1, expert_loads: Sequence[Sequence[float]] | None = None,
            router_loss: float = 0.0, freeze: Sequence[str] = (), inputs: str | None = None,
            granularity: Granularity = "block", patterns: Patterns | None = None, verify: bool | None = None,
            recipe: RecipeConfig | None = None,
            progress: TraceProgress | None = None) -> OperatorGraph:
    """The operator graph of what ``source`` names; arguments as of `open_source` and `capture_module`.

    ``expert_loads`` (tokens per MoE layer and expert) weigh the costs of expert parallelism; None: all equal. What is
    verified is built again on the CPU, with the weights of the folder if it has any; half precision in float32, where
    rounding does not hide what is looked for.

    Raises:
        InputError: the source is unknown or does not give a model.
        GraphError: the model cannot be captured.
    """
    say = progress or (lambda text: None)
    if str(source).endswith(".pt2"):
        return capture_program(load_program(source), name=Path(source).stem, granularity=granularity, patterns=patterns,
                               source={"source": str(source)}, progress=progress)
    opened = open_source(source, seq=seq, batch=batch, dtype=dtype, overrides=overrides, images=images, image=image,
                         frames=frames, expert_groups=expert_groups, expert_parallel=expert_parallel,
                         router_loss=router_loss, freeze=freeze, inputs=inputs)
    if recipe:
        opened = with_recipe(opened, recipe)
    loads = {} if expert_loads is None else {"expert_loads": [list(row) for row in expert_loads]}
    say(f"building {opened.name}")
    graph = capture_module(opened.build(opened.device), opened.inputs(opened.device), loss=opened.loss,
                           loss_info=opened.loss_info, name=opened.name, granularity=granularity, patterns=patterns,
                           source={**opened.record, **loads}, withheld=opened.withheld, constants=opened.constants,
                           verify=False, progress=progress)
    if not verifying.asked(graph, verify):
        return graph
    half = getattr(torch, dtype or "float32").itemsize < 4
    if half:
        checked = capture(source, seq=seq, batch=batch, dtype="float32", overrides=overrides, images=images,
                          image=image, frames=frames, expert_groups=expert_groups, expert_parallel=expert_parallel,
                          router_loss=router_loss, freeze=freeze, inputs=inputs, granularity=granularity, verify=verify,
                          recipe=recipe)
        return replace(graph, source={**graph.source, **{
            key: item for key, item in checked.source.items() if key == "warnings"}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = WithLoss(opened.build("cpu"), opened.loss, opened.withheld, opened.constants)
    if opened.weights is not None:
        module.wrapped.load_state_dict(opened.weights(), strict=False)
    examples = opened.inputs("cpu") if opened.device != "meta" else None
    return verifying.noted(graph, module, examples, verify, say, opened.places)


def capture_module(module: nn.Module, example_inputs: Mapping[str, Any], *, loss: Callable[..., Any] | None = None,
                   loss_info: Mapping[str, Any] | None = None, name: str | None = None,
                   granularity: Granularity = "block", patterns: Patterns | None = None,
                   source: Mapping[str, Any] | None = None, withheld: Collection[str] = (),
                   constants: Mapping[str, Any] | None = None, verify: bool | None = None,
                   progress: TraceProgress | None = None) -> OperatorGraph:
    """The operator graph of ``module(**example_inputs)`` and its backward.

    Args:
        module: in training mode or not, as it is to run; parameters without ``requires_grad`` are frozen. Any device.
        example_inputs: tensors by forward argument, with the sizes of one microbatch; other values are fixed.
        loss: ``loss(outputs, inputs) -> scalar`` if the module does not return its loss itself (as its only scalar,
            or under the name ``loss``).
        loss_info: how the loss is normalised, see `mipipe.graphs.models.loss`; by default a mean over microbatches.
        granularity: ``layer``, ``block`` (attention, MLP, parts of a MoE layer), ``module`` (each linear, attention
            and the like with what is around it) or ``operator`` (each of their operators).
        patterns: corrections of the annotation.
        source: recorded in the graph.
        withheld: inputs that go to ``loss`` alone, not to the module.
        constants: fixed arguments of the module's forward.
        verify: run graph and module on the example inputs and compare loss and gradients
            (`mipipe.graphs.capture.verify`); None: if that is a matter of seconds and the module has values.
        progress: called with a line now and then.

    Raises:
        GraphError: the model cannot be exported, has no scalar loss, nothing in it trains, or the graph differs.
    """
    say = progress or (lambda text: None)
    wrapped = WithLoss(module, loss, withheld, constants or {})
    say("exporting the model")
    exported = export_model(wrapped, example_inputs, prefix=WithLoss.PREFIX)
    exported, rows = split_banks(exported)
    check_exchange(source or {}, routed_experts(exported))
    cuts = cut_segments(exported, granularity)
    say(f"{len(list(exported.graph.nodes))} nodes, {len(cuts)} segments")
    parameters = slice_parameters(parameters_of(module), rows)
    graph = assemble(name or type(module).__name__, exported, cuts, parameters, say)
    record = {"torch": torch.__version__, "granularity": granularity, **dict(source or {}),
              "loss": dict(loss_info or losses.MEAN)}
    if exported.code is not None and exported.code.warnings():
        record["warnings"] = exported.code.warnings()
    graph = annotate(replace(graph, source=record), patterns)
    return verifying.noted(graph, wrapped, example_inputs, verify, say) if verifying.asked(graph, verify) else graph


def capture_program(program: torch.export.ExportedProgram, *, name: str = "program", granularity: Granularity = "block",
                    patterns: Patterns | None = None, source: Mapping[str, Any] | None = None,
                    progress: TraceProgress | None = None) -> OperatorGraph:
    """The operator graph of an exported program whose results hold a scalar loss (see `capture_module`).

    A program knows tied tensors by their memory, no longer by identity.
    """
    say = progress or (lambda text: None)
    first: dict[Any, str] = {}
    state = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    places = {key: (tensor.data_ptr(), tensor.shape) if tensor.data_ptr() else key for key, tensor in state.items()}
    aliases = {key: first.setdefault(place, key) for key, place in places.items()}
    trained = set(program.graph_signature.parameters)
    passing = set(program.graph_signature.non_persistent_buffers)
    parameters = tuple(
        ParameterSpec(key, spec_of(tensor), key in trained and tensor.requires_grad,
                      None if aliases[key] == key else aliases[key], key not in trained, key not in passing)
        for key, tensor in state.items())
    exported = flatten_program(program, "", aliases)
    graph = assemble(name, exported, cut_segments(exported, granularity), parameters, say)
    record = {"torch": torch.__version__, "granularity": granularity, **dict(source or {}), "loss": dict(losses.MEAN)}
    return annotate(replace(graph, source=record), patterns)


class WithLoss(nn.Module):
    """A module whose results are a dict with the scalar ``loss``, computed by ``loss`` if one is given."""

    PREFIX = "wrapped."

    def __init__(self, wrapped: nn.Module, loss: Callable[..., Any] | None, withheld: Collection[str] = (),
                 constants: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.wrapped, self.loss, self.withheld, self.constants = wrapped, loss, withheld, dict(constants or {})
        self.training = wrapped.training

    def forward(self, **inputs: Any) -> dict[str, Any]:
        own = {name: item for name, item in inputs.items() if name not in self.withheld}
        recipe = getattr(self.loss, "on_module", None)  # a frozen model comes first, so that the loss is with this one
        frozen = None if recipe is None else self.loss.before(inputs, self.wrapped)  # type: ignore[union-attr]
        result = self.wrapped(**own, **self.constants)
        if self.loss is not None:
            made = self.loss(result, inputs) if recipe is None else recipe(result, inputs, self.wrapped, frozen)
            return dict(made) if isinstance(made, Mapping) else {"loss": made}
        if isinstance(result, Mapping):
            return {key: item for key, item in result.items() if isinstance(item, Tensor)}
        if isinstance(result, Tensor):
            return {"output" if result.dim() else "loss": result}
        if isinstance(result, (tuple, list)):
            return {f"output_{index}": item for index, item in enumerate(result) if isinstance(item, Tensor)}
        name, found = type(self.wrapped).__name__, type(result).__name__
        raise GraphError(f"model {name} returns a {found}: expected tensors (one, a tuple or a dict) with a scalar loss"
                         " among them; return tensors, or give a loss function")


def parameters_of(module: nn.Module) -> tuple[ParameterSpec, ...]:
    """All parameters, then all buffers, by FQN; tied ones point to their first FQN."""
    first = aliases_of(module)
    passing = {f"{path}.{name}".lstrip(".") for path, child in module.named_modules()
               for name in child._non_persistent_buffers_set}
    found: list[tuple[str, Tensor, bool]] = []
    found += [(name, item, False) for name, item in module.named_parameters(remove_duplicate=False)]
    found += [(name, item, True) for name, item in module.named_buffers(remove_duplicate=False)]
    return tuple(
        ParameterSpec(name, spec_of(item), trainable=item.requires_grad and not buffer,
                      tied_to=None if first[name] == name else first[name], buffer=buffer,
                      persistent=name not in passing)
        for name, item, buffer in found)
