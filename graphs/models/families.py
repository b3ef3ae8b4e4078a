"""Transformers' architectures as training graphs: configuration, class, module.

Every family goes one way: configuration -> class -> module on any device, with the attention and experts of
`mipipe.graphs.operators.layers`. What a family needs beyond that is one line in `ADJUSTMENTS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.models.configuration import converted_classes, find_class, first_line
from mipipe.graphs.models.fixed_grids import fix_grids, grid_of
from mipipe.graphs.models.real_images import keep_all_images
from mipipe.graphs.operators.layers import NAME, register, watch_positions
from mipipe.graphs.operators.routers import settle_routers, visit_every_expert


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
        found = find_class(name)
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
    attempts = implementations(kind, adjustment.attention)
    with torch.device(device):
        for index, name in enumerate(attempts):
            try:
                model = kind._from_config(config, attn_implementation=name, dtype=dtype or torch.float32)
            except ImportError as error:
                raise InputError(_needs(kind.__name__, error)) from error
            except Exception as error:  # a ValueError may say that the class has no such attention
                if index + 1 < len(attempts) and isinstance(error, (ValueError, KeyError)):
                    continue
                raise InputError(f"model {kind.__name__} cannot be built from this configuration:"
                                 f" {type(error).__name__}: {first_line(error)}; check its values and those of --set"
                                 ) from error
            break
    _settle_attention(model, adjustment.attention)
    _settle_device(model, device)
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


def implementations(kind: Any, wanted: str) -> tuple[str, ...]:
    """The attention implementations to try for a class, best first: one that is registered from outside only where the
    class asks for such. What it does not ask for it would take for its own, without the mask that goes with it."""
    return (*((wanted,) if getattr(kind, "_supports_attention_backend", False) else ()),
            *(("sdpa",) if getattr(kind, "_supports_sdpa", False) else ()), "eager")


def _settle_attention(model: nn.Module, wanted: str) -> None:
    """Give parts with a configuration of their own (a tower, a Q-Former) the attention that their class can have."""
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    asking = {id(part.config) for part in parts if wanted in implementations(type(part), wanted)}
    for part in parts:
        if id(part.config) not in asking and part.config._attn_implementation == wanted:
            part.config._attn_implementation_internal = implementations(type(part), wanted)[0]


def _settle_device(model: nn.Module, device: str) -> None:
    """Move what the class made elsewhere (``torch.FloatTensor(3, 4)`` asks no device context), ties kept; what is
    without values (`mipipe.runtime.train.models.empty_module`) stays so."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for part in model.modules():
        for table in (part._parameters, part._buffers):
            for name, item in table.items():
                if item is not None and item.device.type not in ("meta", torch.device(device).type):
                    if item not in moved:
                        there = item.detach().to(device)
                        moved[item] = nn.Parameter(there, item.requires_grad) if table is part._parameters else there
                    table[name] = moved[item]  # type: ignore[assignment]


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
        return find_class(name) is not None
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
