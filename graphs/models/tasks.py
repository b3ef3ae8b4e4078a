"""What a transformers model is trained on: its loss, and example inputs of a microbatch's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.capture import loss as losses
from mipipe.graphs.errors import InputError
from mipipe.graphs.models.families import ADJUSTMENTS, Adjustment, Sizes, grid_for
from mipipe.graphs.models.fixed_grids import pixels


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
        entry = "pixel_values_videos" if sizes.frames else "pixel_values"
        made |= {} if not sizes.images else {entry: pixels(vision, grid_for(config, sizes), device, dtype)}
    elif sizes.frames:
        raise InputError(f"frames: model type {config.model_type!r} takes no videos of any length that mipipe knows of;"
                         " leave --frames out (a configuration with num_frames takes --set num_frames=N)")
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
    frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
    return torch.zeros(count, *frames, getattr(vision, "num_channels", 3), height, width, dtype=dtype, device=device)
