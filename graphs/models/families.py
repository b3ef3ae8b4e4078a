"""Transformers' architectures as training graphs: configuration, class, module.

Every family goes one way: configuration -> class -> module on any device, with the attention and experts of
`mipipe.graphs.operators.layers`. What a family needs beyond that is one line in `ADJUSTMENTS`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.models.fixed_grids import fix_grids, grid_of
from mipipe.graphs.models.real_images import keep_all_images
from mipipe.graphs.operators.layers import NAME, register, settle_routers, visit_every_expert, watch_positions
from mipipe.graphs.serialize import load_data


@dataclass(frozen=True)
class Adjustment:
    """What a model type needs: its class, another attention implementation, fixed forward arguments.

    ``fixed_grids``: image and video grids become constants (`mipipe.graphs.models.fixed_grids`). ``layers_apart``: text
    (a time) stands between a video's layers, so that each is laid out as an image. ``images``: how a microbatch's
    images are given, ``in a row``, ``by sample`` or ``in tiles`` (`mipipe.graphs.models.example_inputs`). ``masks``:
    attention masks that it cannot do without.
    """

    architecture: str | None = None
    attention: str = NAME
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed_grids: bool = False
    layers_apart: bool = False
    images: str = "in a row"
    masks: tuple[str, ...] = ()


ADJUSTMENTS: dict[str, Adjustment] = {
    "clip": Adjustment("CLIPModel", constants={"return_loss": True}),
    "siglip": Adjustment("SiglipModel", constants={"return_loss": True}),
    "qwen2_vl": Adjustment(fixed_grids=True),
    "qwen2_5_vl": Adjustment(fixed_grids=True),
    "qwen3_vl": Adjustment(fixed_grids=True, layers_apart=True),
    "qwen3_vl_moe": Adjustment(fixed_grids=True, layers_apart=True),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm", "modernvbert", "ultravbert"), Adjustment(images="by sample")),
    "mllama": Adjustment(images="in tiles"),
    "switch_transformers": Adjustment(masks=("attention_mask", "decoder_attention_mask")),
    "nllb-moe": Adjustment(masks=("attention_mask", "decoder_attention_mask")),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of one microbatch. ``images`` per sample; ``image`` is their height and width, 0 for the model's own.

    ``frames``: instead of images, videos of that many frames.
    """

    seq: int = 128
    batch: int = 1
    images: int = 1
    image: int = 0
    frames: int = 0


def config_file(path: str | Path) -> Path | None:
    """The configuration's file, where ``path`` is one or a folder with one; None for the name of a class or type."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    return file if file.is_file() else None


def read_model_config(path: str | Path, overrides: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> Any:
    """A transformers configuration from a ``config.json``, a folder with one, or the name of a model class or type.

    Args:
        data: what ``config.json`` holds, where it is known already; then nothing is read.

    Raises:
        InputError: unreadable, an unknown model type or class, or an override that the configuration does not have.
    """
    from transformers import CONFIG_MAPPING

    file = config_file(path)
    if data is None and file is not None:
        data = load_data(file, foreign=True)
    if data is not None:
        data = without_code(data)
        kind, where = data.get("model_type"), file or path
        converted = converted_classes(kind)
        if converted is not None:
            return _make_config(converted[0], _with_floats(data), overrides, str(where))
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise InputError(f"{where}: model_type {shown(kind)} is unknown to transformers {_version()}; expected one"
                             " such as 'llama', 'qwen3_moe' or 'deepseek_v3'")
        return _make_config(CONFIG_MAPPING[kind], _with_floats(data), overrides, str(where))
    name = str(path)
    if name in CONFIG_MAPPING:
        return _make_config(CONFIG_MAPPING[name], {}, overrides, name)
    config = getattr(_find_class(name), "config_class", None)
    if config is None:
        raise InputError(f"{name}: no file, and not a model class of transformers {_version()}")
    return _make_config(config, {"architectures": [name]}, overrides, name)


def _with_floats(value: Any) -> Any:
    """Configuration data with numbers for transformers' ``{"__float__": "Infinity"}`` (JSON has no infinity)."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and str(value["__float__"]) in ("Infinity", "-Infinity", "NaN"):
            return float(str(value["__float__"]))
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def as_written(value: Any) -> Any:
    """Configuration data as our files may hold it: without code's names, infinities as transformers writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: as_written(item) for key, item in without_code(dict(value)).items()}
    return [as_written(item) for item in value] if isinstance(value, list) else value


def _version() -> str:
    import transformers

    return transformers.__version__


def _find_class(name: str) -> Any:
    """A model class of transformers by its name; None where there is none (a file may name anything)."""
    import transformers

    try:
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{name}: transformers cannot load it: {first_line(error)}") from None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


_CODE = re.compile(r"auto_map|custom_pipelines|.*(attn|experts)_implementation.*|use_kernels|use_timm_backbone")
"""Entries of a configuration that make transformers fetch code, or weights, from elsewhere."""


def without_code(data: Any) -> Any:
    """The data of a configuration without the entries that name code of the model's publisher or kernels of a hub."""
    if isinstance(data, dict):
        kept = {key: without_code(item) for key, item in data.items() if not _CODE.fullmatch(str(key))}
        return {**kept, "use_pretrained_backbone": False} if kept.get("use_pretrained_backbone") else kept
    return [without_code(item) for item in data] if isinstance(data, list) else data


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _make_config(kind: Any, data: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Any:
    """The configuration from its data with changed values; ``text_config.hidden_size`` reaches into parts.

    What the configuration derives from other entries (head sizes, kinds of layers) is derived after the change.
    """
    made: dict[str, Any] = copy.deepcopy(dict(data))
    known = _from_dict(kind, dict(data), where)
    for key, value in overrides.items():
        *path, last = str(key).split(".")
        plain = all(name.isidentifier() and not name.startswith("__") for name in (*path, last))
        if not plain or _CODE.fullmatch(last):
            raise InputError(f"{where}: override {shown(key)} is no entry of its {kind.__name__}")
        part, owner = made, known
        for name in path:
            owner = getattr(owner, name, None)
            part = part.setdefault(name, {})
        last = getattr(owner, "attribute_map", {}).get(last, last)
        if owner is None or not (hasattr(owner, last) or _model_reads(owner, last)):
            raise InputError(f"{where}: override {key!r} is no entry of its {kind.__name__}")
        if last == "num_hidden_layers":
            for name in ("layer_types", "mlp_layer_types"):
                part.pop(name, None)
        part[last] = value
    return _from_dict(kind, made, where)


def _from_dict(kind: Any, data: dict[str, Any], where: str) -> Any:
    """The configuration; whatever its constructor raises is about the values."""
    try:
        return kind.from_dict(data)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__).strip()
        raise InputError(f"{where}: {kind.__name__} refuses these values: {shown(line, quoted=False, most=300)}"
                         ) from None


def _model_reads(config: Any, name: str) -> bool:
    """Whether the modeling code of a configuration reads an entry that the configuration leaves undeclared."""
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    try:  # beside the module of a config class that is loaded already: one of transformers' or ours, named by no file
        text = inspect.getsource(importlib.import_module(modeling))
    except (ImportError, OSError):
        return False
    return re.search(rf"config\.{name}\b|config, \"{name}\"", text) is not None


def model_class(config: Any) -> Any:
    """The class to train: the configuration's own architecture, else the first training head known for its type.

    Raises:
        InputError: there is none.
    """
    from transformers.models.auto import modeling_auto as auto

    converted = converted_classes(config.model_type)
    if converted is not None:
        return converted[1]
    adjusted, named = ADJUSTMENTS.get(config.model_type, Adjustment()).architecture, config.architectures
    if named is not None and not isinstance(named, (list, tuple)):
        raise InputError(f"model type {config.model_type!r}: architectures: found {shown(named)}, expected a list")
    for name in named or ([adjusted] if adjusted else ()):
        found = _find_class(name)
        if found is not None:
            return found
    tables = ["MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
              "MODEL_MAPPING"]
    if config.is_encoder_decoder:
        tables = ["MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", *tables]
    elif hasattr(config, "vision_config"):
        tables = ["MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", *tables]
    for table in tables:
        mapping = getattr(auto, table)
        if type(config) in mapping:
            return mapping[type(config)]
    raise InputError(f"model type {config.model_type!r}: transformers has no model for it that can be trained")


def converted_classes(model_type: object) -> tuple[Any, Any] | None:
    """The config and model class of a converted mixture's ``model_type``; None for other types.

    They are those of this installation, not the code that lies in the model's folder, which is never run.
    """
    if not isinstance(model_type, str) or not model_type.startswith("mipipe_"):
        return None
    from mipipe.graphs.models import mipipe_moe

    return mipipe_moe.classes(model_type) if model_type[len("mipipe_"):] in mipipe_moe.HOSTS.values() else None


def know_converted(folder: str | Path) -> None:
    """Let transformers load a folder of a converted mixture with this installation's class, without its code."""
    file = config_file(folder)
    converted = None if file is None else converted_classes(load_data(file, foreign=True).get("model_type"))
    if converted is not None:
        from transformers import AutoConfig, AutoModelForCausalLM

        AutoConfig.register(converted[0].model_type, converted[0], exist_ok=True)
        AutoModelForCausalLM.register(*converted, exist_ok=True)


def build_model(config: Any, device: str, dtype: torch.dtype | None, expert_groups: int = 1,
                sizes: Sizes | None = None) -> nn.Module:
    """The module in training mode, with mipipe's attention and experts where the class takes them.

    ``sizes`` matter to families whose image grids are fixed.

    Raises:
        InputError: the class refuses the configuration.
    """
    register()
    _refuse_host_randomness(config)
    shared = getattr(config, "mipipe_moe", None) or {}
    if expert_groups > 1 and shared.get("num_experts", 0) // expert_groups % shared.get("group", 1):
        raise InputError(f"expert groups: found {expert_groups}, which cut through MoLAE's groups of {shared['group']}"
                         f" experts; expected at most {shared['num_experts'] // shared['group']}")
    kind, adjustment = model_class(config), ADJUSTMENTS.get(config.model_type, Adjustment())
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    for part in parts:
        part.use_cache = False
        part.mipipe_expert_groups = expert_groups
    config._experts_implementation = NAME
    attempts = (adjustment.attention, "sdpa", "eager")
    with torch.device(device):
        for index, name in enumerate(attempts):
            try:
                model = kind._from_config(config, attn_implementation=name, dtype=dtype or torch.float32)
            except ImportError as error:
                raise InputError(_needs(kind.__name__, error)) from error
            except Exception as error:  # a ValueError may say that the class has no such attention
                if index + 1 < len(attempts) and isinstance(error, ValueError):
                    continue
                raise InputError(f"model {kind.__name__} cannot be built from this configuration:"
                                 f" {type(error).__name__}: {first_line(error)}; check its values and those of --set"
                                 ) from error
            break
    for part in model.modules():
        inner = getattr(part, "config", None)
        if inner is not None:
            inner.mipipe_expert_groups = expert_groups
            inner._experts_implementation = NAME
    visit_every_expert(model)
    settle_routers(model)
    watch_positions(model)
    if adjustment.images == "by sample":
        keep_all_images(model)
    if adjustment.fixed_grids:
        fix_grids(model, grid_for(config, sizes or Sizes()))
    return model.train()


def _needs(name: str, error: ImportError) -> str:
    """What is to be installed for a class, and the class that is its text part alone, where there is one."""
    found = re.search(r"requires the ([\w.-]+) library", str(error))
    package = found[1] if found else error.name
    if package is None:
        return f"model {name} cannot be built here: {first_line(error)}"
    alone = f"{name.partition('For')[0]}ForCausalLM"
    other = f", or capture {alone}, its text part" if alone != name and _exists(alone) else ""
    return f"model {name} needs the package {package}, which is not installed: pip install {package}{other}"


def _exists(name: str) -> bool:
    try:
        return _find_class(name) is not None
    except InputError:
        return False


def _refuse_host_randomness(config: Any) -> None:
    """Raise `InputError` where the model would draw random numbers on the host: a graph would repeat the same ones."""
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):
            raise InputError(f"{name}: found {getattr(config, name)}, but layers that are dropped at random are not the"
                             f" same graph in every step; --set {name}=0")
    masks = [name for name in ("mask_time_prob", "mask_feature_prob") if getattr(config, name, 0)]
    if masks and getattr(config, "apply_spec_augment", hasattr(config, "mask_time_length")):
        raise InputError(f"{masks[0]}: found {getattr(config, masks[0])}, but its masks are drawn outside the model's"
                         " graph, which would repeat the same for ever; --set apply_spec_augment=false")


def grid_for(config: Any, sizes: Sizes) -> Any:
    """The grid of a microbatch's images or videos; an error if their tokens do not fit into the sequence."""
    grid = grid_of(config.vision_config, sizes.batch * sizes.images, sizes.image, sizes.frames)
    needed = sizes.images * grid.layers * grid.tokens
    if needed > sizes.seq:
        times, less = (f"{grid.layers} x ", " or --frames") if grid.video else ("", "")
        raise InputError(f"seq: found {sizes.seq} tokens, expected more than the {needed} of {sizes.images}"
                         f" {'videos' if grid.video else 'images'} of {times}{grid.rows} x {grid.columns} tokens each;"
                         f" raise --seq or lower --image{less}")
    if ADJUSTMENTS[config.model_type].layers_apart:
        return replace(grid, images=grid.images * grid.layers, layers=1)
    return grid
