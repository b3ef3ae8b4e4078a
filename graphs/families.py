"""Transformers' architectures as training graphs: configuration, class, inputs, loss.

Every family goes one way: configuration -> class -> module on any device, with the attention and experts of
`mipipe.graphs.layers`. What a family needs beyond that is one line in `ADJUSTMENTS`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs import loss as losses
from mipipe.graphs.errors import InputError
from mipipe.graphs.fixed_grids import fix_grids, grid_of, pixels
from mipipe.graphs.layers import NAME, register


@dataclass(frozen=True)
class Adjustment:
    """What a model type needs: its class, another attention implementation, fixed forward arguments.

    ``fixed_grids``: image grids become constants (`mipipe.graphs.fixed_grids`).
    """

    architecture: str | None = None
    attention: str = NAME
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed_grids: bool = False


ADJUSTMENTS: dict[str, Adjustment] = {
    "clip": Adjustment("CLIPModel", constants={"return_loss": True}),
    "siglip": Adjustment("SiglipModel", constants={"return_loss": True}),
    "qwen2_vl": Adjustment(fixed_grids=True),
    "qwen2_5_vl": Adjustment(fixed_grids=True),
    "qwen3_vl": Adjustment(fixed_grids=True),
    "qwen3_vl_moe": Adjustment(fixed_grids=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of one microbatch. ``images`` per sample; ``image`` is their height and width, 0 for the model's own."""

    seq: int = 128
    batch: int = 1
    images: int = 1
    image: int = 0


def read_config(path: str | Path, overrides: Mapping[str, Any]) -> Any:
    """A transformers configuration from a ``config.json``, a folder with one, or the name of a model class or type.

    Raises:
        InputError: unreadable, an unknown model type or class, or an override that the configuration does not have.
    """
    from transformers import CONFIG_MAPPING

    folder = Path(path)
    file = folder / "config.json" if folder.is_dir() else folder
    if file.is_file():
        try:
            data = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{file}: not readable as JSON: {error}") from None
        kind = data.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise InputError(f"{file}: model_type {kind!r} is unknown to transformers {_version()}; expected one such"
                             " as 'llama', 'qwen3_moe' or 'deepseek_v3'")
        return _make_config(CONFIG_MAPPING[kind], data, overrides, str(file))
    name = str(path)
    if name in CONFIG_MAPPING:
        return _make_config(CONFIG_MAPPING[name], {}, overrides, name)
    config = getattr(_find_class(name), "config_class", None)
    if config is None:
        raise InputError(f"{name}: no file, and not a model class of transformers {_version()}")
    return _make_config(config, {"architectures": [name]}, overrides, name)


def _version() -> str:
    import transformers

    return transformers.__version__


def _find_class(name: str) -> Any:
    import transformers

    try:
        return getattr(transformers, name, None)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"{name}: transformers cannot load it: {str(error).splitlines()[0]}") from None


def _make_config(kind: Any, data: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Any:
    """The configuration from its data with changed values; ``text_config.hidden_size`` reaches into parts.

    What the configuration derives from other entries (head sizes, kinds of layers) is derived after the change.
    """
    made: dict[str, Any] = copy.deepcopy(dict(data))
    known = kind.from_dict(dict(data))
    for key, value in overrides.items():
        *path, last = key.split(".")
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
    try:
        return kind.from_dict(made)
    except Exception as error:
        raise InputError(f"{where}: {kind.__name__} refuses these values: {str(error).splitlines()[-1]}") from None


def _model_reads(config: Any, name: str) -> bool:
    """Whether the modeling code of a configuration reads an entry that the configuration leaves undeclared."""
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
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

    adjusted = ADJUSTMENTS.get(config.model_type, Adjustment()).architecture
    for name in config.architectures or ([adjusted] if adjusted else ()):
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


def build_model(config: Any, device: str, dtype: torch.dtype | None, expert_groups: int = 1,
                sizes: Sizes | None = None) -> nn.Module:
    """The module in training mode, with mipipe's attention and experts where the class takes them.

    ``sizes`` matter to families whose image grids are fixed.
    """
    register()
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
            except ValueError:
                if index + 1 == len(attempts):
                    raise
            else:
                break
    for part in model.modules():
        inner = getattr(part, "config", None)
        if inner is not None:
            inner.mipipe_expert_groups = expert_groups
            inner._experts_implementation = NAME
    if adjustment.fixed_grids:
        fix_grids(model, _grid(config, sizes or Sizes()))
    return model.train()


def _grid(config: Any, sizes: Sizes) -> Any:
    """The grid of a microbatch's images; an error if their tokens do not fit into the sequence."""
    grid = grid_of(config.vision_config, sizes.batch * sizes.images, sizes.image)
    if grid.tokens * sizes.images > sizes.seq:
        raise InputError(f"seq: found {sizes.seq} tokens, expected more than the {grid.tokens * sizes.images} of"
                         f" {sizes.images} images of {grid.rows} x {grid.columns} tokens each; raise --seq or lower"
                         " --image")
    return grid


@dataclass(frozen=True)
class TaskLoss:
    """The loss of a task on a model's output object, and which inputs it keeps from the model.

    ``kind``: ``language`` (sum of token cross-entropies; ``shift`` where position t predicts t + 1), ``classes``, or
    ``own`` (the model returns its loss). A router's auxiliary loss is added times the count of valid labels, so that
    after the division by their global count it is the average over tokens.
    """

    kind: str
    shift: bool = False
    coefficient: float = 0.0
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def withheld(self) -> frozenset[str]:
        return frozenset() if self.kind == "own" else frozenset({"labels"})

    @property
    def info(self) -> dict[str, Any]:
        return dict(losses.MEAN) if self.kind == "own" else losses.sum_over("labels", shift=self.shift)

    def __call__(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.kind == "own":
            return output.loss
        labels, logits = inputs["labels"], output.logits.float() if output.logits.dtype in _HALF else output.logits
        if self.shift:
            labels, logits = labels[:, 1:], logits[:, :-1]
        total = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
        auxiliary = getattr(output, "aux_loss", None)
        if self.coefficient and isinstance(auxiliary, Tensor):
            total = total + self.coefficient * auxiliary.to(total.dtype) * (labels != -100).sum()
        return total


_LANGUAGE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForSpeechSeq2Seq")
_HALF = (torch.float16, torch.bfloat16)


def task_of(config: Any, kind: Any) -> TaskLoss:
    """The loss that a model class trains with."""
    constants = dict(ADJUSTMENTS.get(config.model_type, Adjustment()).constants)
    name = kind.__name__
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if name.endswith(_LANGUAGE):
        constants["use_cache"] = False
        coefficient = 0.0
        if getattr(text, "output_router_logits", False):
            constants["output_router_logits"] = True
            coefficient = float(getattr(text, "router_aux_loss_coef", 0.0))
        return TaskLoss("language", not config.is_encoder_decoder, coefficient, constants)
    if name.endswith(("Classification", "ForMaskedLM", "ForTokenClassification")):
        return TaskLoss("classes", constants=constants)
    return TaskLoss("own", constants=constants)


Inputs = dict[str, Tensor]


def example_inputs(config: Any, kind: Any, sizes: Sizes, device: str, dtype: torch.dtype) -> Inputs:
    """Tensors of one microbatch's shapes (zeros; on meta nothing at all), by forward argument."""
    name, vision = kind.__name__, getattr(config, "vision_config", None)

    def tokens() -> Tensor:
        return torch.zeros(sizes.batch, sizes.seq, dtype=torch.int64, device=device)

    made: Inputs = {}
    if kind.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        made["input_features"] = torch.zeros(sizes.batch, config.num_mel_bins, frames, dtype=dtype, device=device)
        made |= {"decoder_input_ids": tokens(), "labels": tokens()}
        return made
    if kind.main_input_name == "input_ids":
        made["input_ids"] = tokens()
        if config.is_encoder_decoder:
            made["decoder_input_ids"] = tokens()
    if ADJUSTMENTS.get(config.model_type, Adjustment()).fixed_grids:
        made |= {} if not sizes.images else {"pixel_values": pixels(vision, _grid(config, sizes), device, dtype)}
    elif vision is not None or kind.main_input_name == "pixel_values":
        made["pixel_values"] = _pixels(vision or config, sizes, device, dtype)
    if name.endswith((*_LANGUAGE, "ForMaskedLM", "ForTokenClassification")):
        made["labels"] = tokens()
    elif name.endswith("Classification"):
        made["labels"] = torch.zeros(sizes.batch, dtype=torch.int64, device=device)
    return made


def _pixels(vision: Any, sizes: Sizes, device: str, dtype: torch.dtype) -> Tensor:
    side = sizes.image or getattr(vision, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else tuple(side)
    count = sizes.batch * sizes.images
    return torch.zeros(count, getattr(vision, "num_channels", 3), height, width, dtype=dtype, device=device)
