"""What a user may point at: a transformers configuration or class, a factory of a module, a saved export.

`open_source` gives a `ModelSource`, from which the same model can be built again anywhere: on the meta device for
capture, on a worker with real weights for training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.expressions import check_expression, search
from mipipe.graphs.models import loss as losses
from mipipe.graphs.models.silence import silence
from mipipe.graphs.named_code import import_named, is_named_code
from mipipe.graphs.serialize import load_data

Loss = Callable[[Any, Mapping[str, Tensor]], Any]


@dataclass(frozen=True)
class ModelSource:
    """A model that can be built: ``build(device)`` the module, ``inputs(device)`` example tensors of one microbatch.

    ``loss`` maps the module's output and the inputs to the scalar loss (None: the module returns it);
    ``withheld`` inputs go to the loss alone; ``constants`` are fixed forward arguments; ``record`` is what
    `open_source` needs to make the source again; ``weights`` reads those that lie beside a configuration;
    ``places`` are token ids that stand for images and the like, first that of this microbatch; ``task`` is the loss of
    a transformers model's class (`mipipe.graphs.models.tasks.TaskLoss`).
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[str], dict[str, Tensor]]
    device: str
    loss: Loss | None = None
    loss_info: Mapping[str, Any] = field(default_factory=lambda: dict(losses.MEAN))
    withheld: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    places: tuple[int, ...] = ()
    task: Any = None


def open_source(source: str | Path, *, seq: int = 128, batch: int = 1, dtype: str | None = None,
                overrides: Mapping[str, Any] | None = None, images: int = 1, image: int = 0, frames: int = 0,
                expert_groups: int = 1, expert_parallel: int = 1, router_loss: float = 0.0, freeze: Sequence[str] = (),
                config: Mapping[str, Any] | None = None, inputs: str | None = None) -> ModelSource:
    """The source behind a path or name.

    Args:
        source: a ``config.json`` or a folder with one, a transformers model class or type, or
            ``package.module:factory``.
        seq, batch: tokens per sample and samples of one microbatch (transformers sources).
        dtype: of parameters and floating inputs, by torch's name; None: float32 for transformers, what a factory's
            module and inputs have already for a factory. Complex tensors stay complex.
        overrides: changed configuration entries, or keyword arguments of the factory.
        images, image: images per sample and their side (0: the model's own), for models that see.
        frames: videos of that many frames in place of images, for models that take videos of any length.
        expert_groups: into how many groups each expert bank is split.
        expert_parallel: over how many ranks the experts are shared, by all-to-all (transformers sources); 1: not.
        router_loss: the coefficient of a loss that sharpens the routers of a language model (Elastic MoE).
        freeze: regular expressions; parameters whose FQN matches one do not train.
        config: what the ``config.json`` of ``source`` held when a graph was captured; then ``source`` is not read.
        inputs: ``package.module:function`` that gives the example inputs of a transformers source in place of mipipe's.

    Raises:
        InputError: the source is unknown or does not give a model.
    """
    options: dict[str, Any] = {"seq": seq, "batch": batch, "dtype": dtype, "overrides": dict(overrides or {}),
                               "images": images, "image": image, "frames": frames,
                               "expert_groups": expert_groups, "expert_parallel": expert_parallel,
                               **({"router_loss": router_loss} if router_loss else {}),
                               "freeze": list(freeze)}
    record = {"source": str(source), **options}
    if router_loss < 0:
        raise InputError(f"router_loss: found {router_loss}, expected a coefficient of at least 0")
    for key in ("seq", "batch", "expert_groups", "expert_parallel"):
        if int(record[key]) < 1:
            raise InputError(f"{key}: found {record[key]}, expected at least 1")
    if expert_groups > 1 and expert_parallel > 1:
        raise InputError("expert groups (branches) and expert parallel (all-to-all) are two forms of the same layers;"
                         " give one of them")
    kind = torch.float32 if dtype is None else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"dtype: found {dtype!r}, expected a floating dtype such as float32 or bfloat16")
    if is_named_code(str(source)):
        if router_loss:
            raise InputError(f"{source}: a factory returns its loss itself; leave --router-loss out")
        if inputs is not None:
            raise InputError(f"{source}: a factory returns its example inputs itself; leave --inputs out")
        return _from_factory(str(source), record, None if dtype is None else kind)
    return _from_transformers(source, {**record, "dtype": dtype or "float32"}, kind, config, inputs)


def _from_transformers(source: str | Path, record: dict[str, Any], dtype: torch.dtype,
                       data: Mapping[str, Any] | None = None, given: str | None = None) -> ModelSource:
    try:
        from mipipe.graphs.models import configuration, example_inputs, families, tasks
        from mipipe.graphs.operators.layers import exchange_experts
        from mipipe.graphs.operators.routers import sharpen_routers
    except ImportError as error:
        raise InputError(f"{source}: needs transformers (pip install 'mipipe[hf]'): {error}") from None
    file = configuration.config_file(source)
    if data is None and file is not None:
        data = load_data(file, foreign=True)
    if data is not None:
        record["config"] = data = configuration.as_written(data)  # so that a graph trains from any folder
    config = configuration.read_model_config(source, record["overrides"], data)
    kind, task = families.model_class(config), tasks.task_of(config, families.model_class(config))
    if record.get("router_loss"):
        if task.kind != "language":
            raise InputError(f"{source}: --router-loss goes with the loss of a language model, which {kind.__name__} is"
                             " not")
        task = replace(task, sharpness=record["router_loss"])
    sizes = families.Sizes(record["seq"], record["batch"], record["images"], record["image"], record["frames"])

    def build(device: str) -> nn.Module:
        made = families.build_model(config, device, dtype, record["expert_groups"], sizes)
        if record["expert_parallel"] > 1:
            exchange_experts(made)
        if record.get("router_loss"):
            sharpen_routers(made)
        return _freeze(made, record["freeze"])

    def weights() -> Mapping[str, Tensor]:
        with silence():  # safetensors of the folder, into a class of transformers' or ours: neither pickle nor its code
            return kind.from_pretrained(source, config=config, dtype=dtype, use_safetensors=True, local_files_only=True,
                                        trust_remote_code=False).state_dict()

    def inputs(device: str) -> dict[str, Any]:
        if given is not None:
            return example_inputs.given_inputs(given, config, device, dtype)
        return example_inputs.example_inputs(config, kind, sizes, device, dtype)

    if given is not None and "labels" not in inputs("meta"):
        task = tasks.TaskLoss("own", constants=task.constants)  # from what the model itself takes
    stored = Path(source).is_dir() and any(Path(source).glob("*.safetensors"))
    return ModelSource(kind.__name__, build, inputs, "meta", task, task.info, task.withheld, task.constants, record,
                       weights if stored else None, _places(config, bool(sizes.frames)), task)


def _places(config: Any, video: bool) -> tuple[int, ...]:
    """The token ids that stand for images, videos and sound, the one that a microbatch has first."""
    names = ["image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
             "audio_token_index"]
    names.sort(key=lambda name: name.startswith("video") is not video)
    return tuple(dict.fromkeys(value for name in names if isinstance(value := getattr(config, name, None), int)))


def _from_factory(source: str, record: dict[str, Any], dtype: torch.dtype | None) -> ModelSource:
    factory = import_named(source)
    result = _call_factory(factory, source, record)
    extra = result[2] if len(result) == 3 else None

    def build(device: str) -> nn.Module:
        with torch.device(device):
            module = _call_factory(factory, source, record)[0]
        return _freeze(module._apply(lambda item: _cast(item, dtype)), record["freeze"])

    def inputs(device: str) -> dict[str, Tensor]:
        return {key: _cast(item, dtype).to(device) if isinstance(item, Tensor) else item
                for key, item in result[1].items()}

    return ModelSource(type(result[0]).__name__, build, inputs, "cpu", extra, getattr(extra, "info", losses.MEAN),
                       frozenset(getattr(extra, "withheld", ())), {}, record)


def _cast(item: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in a dtype, a complex one in the complex dtype of its precision; None: as it is."""
    if dtype is None or not (item.is_floating_point() or item.is_complex()):
        return item
    if item.is_complex():
        return item.to(torch.complex128 if dtype is torch.float64 else torch.complex64)
    return item.to(dtype)


def _call_factory(factory: Any, source: str, record: Mapping[str, Any]) -> tuple[Any, ...]:
    """(module, inputs) or (module, inputs, loss) from a user's factory."""
    try:
        result = factory(**record["overrides"])
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise InputError(f"{source}: the factory raised {type(error).__name__}: {line}") from error
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise InputError(f"{source}: found {type(result).__name__}, expected (module, example_inputs) or (module,"
                         " example_inputs, loss)")
    module, inputs = result[:2]
    if not isinstance(module, nn.Module):
        raise InputError(f"{source}: its first result is a {type(module).__name__}, expected a torch.nn.Module")
    if not isinstance(inputs, Mapping) or not any(isinstance(item, Tensor) for item in inputs.values()):
        raise InputError(f"{source}: its second result must be a dict of example tensors by forward argument")
    return result


def _freeze(module: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """The module with ``requires_grad`` off for parameters whose FQN matches a pattern; each pattern matches some."""
    for text in patterns:
        check_expression(text, "freeze")
        found = [parameter for name, parameter in module.named_parameters() if search(text, name)]
        if not found:
            raise InputError(f"freeze: {shown(text)} matches no parameter of the model, whose first is"
                             f" {next((name for name, _ in module.named_parameters()), 'none')}")
        for parameter in found:
            parameter.requires_grad_(False)
    return module
