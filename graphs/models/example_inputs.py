"""Example inputs of a transformers model: tensors with one microbatch's shapes, by argument of the model's forward.

Shapes follow from the configuration, the class and what its forward takes. Values are zeros (on meta there are none),
so nothing here says what a model is trained on; where the shapes are not known, the caller's own function gives them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.models.families import ADJUSTMENTS, Adjustment, Sizes, grid_for
from mipipe.graphs.models.fixed_grids import pixels
from mipipe.graphs.models.tasks import LANGUAGE

Inputs = dict[str, Tensor]

TUNED = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
         "ForNextSentencePrediction", "ForPreTraining")
"""Endings of classes that are fine-tuned on padded texts, often pairs: masks and token types are inputs."""

CHOICES = 2
"""Answers of one question in a multiple-choice sample."""

SAMPLES = 320
"""Samples of sound for one position of ``seq``, where a configuration does not say (20 ms at 16 kHz)."""

ADVICE = "give them by --inputs package.module:function, which returns a dict of tensors by forward argument"


@dataclass(frozen=True)
class _Maker:
    """Zeros of a kind: ``ids`` integers, ``reals`` numbers of the model's dtype."""

    sizes: Sizes
    device: str
    dtype: torch.dtype

    def ids(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def reals(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def tokens(self) -> Tensor:
        return self.ids(self.sizes.batch, self.sizes.seq)


def example_inputs(config: Any, kind: Any, sizes: Sizes, device: str, dtype: torch.dtype) -> Inputs:
    """Tensors of one microbatch's shapes for a model class, by forward argument.

    Raises:
        InputError: the class takes something whose shape is not known here.
    """
    make, takes = _Maker(sizes, device, dtype), inspect.signature(kind.forward).parameters
    main, vision = kind.main_input_name, getattr(config, "vision_config", None)
    made: Inputs = {}
    if main == "input_features":
        made["input_features"] = _features(config, kind, make)
    elif main == "input_values":
        made["input_values"] = _sound(config, make)
    if main == "input_ids" or (main == "pixel_values" and "input_ids" in takes):
        made["input_ids"] = make.ids(sizes.batch, CHOICES, sizes.seq) if _ends(kind, "ForMultipleChoice") \
            else make.tokens()
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = make.tokens()
    if ADJUSTMENTS.get(config.model_type, Adjustment()).fixed_grids:
        entry = "pixel_values_videos" if sizes.frames else "pixel_values"
        made |= {} if not sizes.images else {entry: pixels(vision, grid_for(config, sizes), device, dtype)}
    elif sizes.frames:
        raise InputError(f"frames: model type {config.model_type!r} takes no videos of any length that mipipe knows of;"
                         " leave --frames out (a configuration with num_frames takes --set num_frames=N)")
    elif (vision is not None or main == "pixel_values") and "pixel_values" in takes:
        made |= _images(config, vision or config, make)
    made |= _masks(config, kind, takes, made, make) | _labels(config, kind, takes, made, make)
    missing = [name for name, item in takes.items() if item.default is inspect.Parameter.empty and name not in made
               and item.kind is item.POSITIONAL_OR_KEYWORD and name != "self"]
    if missing or (main not in made and main in takes):
        raise InputError(f"model {kind.__name__} takes {missing[0] if missing else main!r}, whose shape mipipe does not"
                         f" know; {ADVICE}")
    return made


def _ends(kind: Any, *endings: str) -> bool:
    return str(kind.__name__).endswith(endings)


def _masks(config: Any, kind: Any, takes: Mapping[str, Any], made: Inputs, make: _Maker) -> Inputs:
    """What fine-tuning on padded pairs of texts needs beside the tokens, where the class takes it."""
    names = ADJUSTMENTS.get(config.model_type, Adjustment()).masks
    if _ends(kind, *TUNED) and "input_ids" in made:
        names = (*names, "attention_mask")
    if (_ends(kind, *TUNED) and getattr(config, "type_vocab_size", 0) > 1) or "pixel_values" in made:
        names = (*names, "token_type_ids")
    shape = made["input_ids"].shape if "input_ids" in made else (make.sizes.batch, make.sizes.seq)
    return {name: make.ids(*shape) for name in names if name in takes}


def _labels(config: Any, kind: Any, takes: Mapping[str, Any], made: Inputs, make: _Maker) -> Inputs:
    """What the model is to predict."""
    batch, seq = make.sizes.batch, make.sizes.seq
    if _ends(kind, *LANGUAGE, "ForMaskedLM", "ForTokenClassification"):
        return {"labels": make.tokens()}
    if _ends(kind, "ForCTC"):
        return {"labels": make.ids(batch, max(1, seq // 4))}
    if _ends(kind, "ForSemanticSegmentation"):
        return {"labels": make.ids(batch, *made["pixel_values"].shape[-2:])}
    if _ends(kind, "Classification", "ForMultipleChoice", "ForNextSentencePrediction"):
        return {"labels": make.ids(batch)}
    found: Inputs = {}
    if "start_positions" in takes and "end_positions" in takes:
        return {"start_positions": make.ids(batch), "end_positions": make.ids(batch)}
    if "input_ids" in made and "labels" in takes:
        found["labels"] = make.ids(*made["input_ids"].shape)
    if "next_sentence_label" in takes:
        found["next_sentence_label"] = make.ids(batch)
    return found


def _images(config: Any, vision: Any, make: _Maker) -> Inputs:
    """Images as the family takes them: one after another, by sample, or by sample in tiles (Mllama)."""
    sizes, form = make.sizes, ADJUSTMENTS.get(config.model_type, Adjustment()).images
    side = sizes.image or getattr(vision, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else tuple(side)
    channels = getattr(vision, "num_channels", 3)
    if form == "by sample":
        return {"pixel_values": make.reals(sizes.batch, sizes.images, channels, height, width)}
    if form == "in tiles":
        tiles, lead = vision.max_num_tiles, (sizes.batch, sizes.images)
        return {"pixel_values": make.reals(*lead, tiles, channels, height, width),
                "aspect_ratio_ids": make.ids(*lead), "aspect_ratio_mask": make.ids(*lead, tiles),
                "cross_attention_mask": make.ids(sizes.batch, sizes.seq, sizes.images, tiles)}
    frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
    return {"pixel_values": make.reals(sizes.batch * sizes.images, *frames, channels, height, width)}


def _sound(config: Any, make: _Maker) -> Tensor:
    """A spectrogram where the configuration has one's sizes, else a waveform of ``seq`` positions."""
    batch, length = make.sizes.batch, make.sizes.seq
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return make.reals(batch, config.max_length, config.num_mel_bins)
    if not hasattr(config, "conv_kernel") or not hasattr(config, "conv_stride"):
        return make.reals(batch, length * SAMPLES)
    for size, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        length = (length - 1) * stride + size
    return make.reals(batch, length)


def _features(config: Any, kind: Any, make: _Maker) -> Tensor:
    """Frames of sound features: all that Whisper's encoder takes, or as many as make ``seq`` positions."""
    batch, seq = make.sizes.batch, make.sizes.seq
    if hasattr(config, "input_feat_per_channel"):  # two convolutions halve the length
        return make.reals(batch, seq * 2 ** getattr(config, "num_conv_layers", 2), config.input_feat_per_channel)
    if hasattr(config, "feature_projection_input_dim"):
        return make.reals(batch, seq, config.feature_projection_input_dim)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return make.reals(batch, config.num_mel_bins, 2 * config.max_source_positions)
    raise InputError(f"model {kind.__name__} takes 'input_features', whose shape mipipe does not know; {ADVICE}")


def given_inputs(name: str, config: Any, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the user's ``package.module:function`` gives, on ``device`` and in the model's dtype.

    It is called with the configuration if it takes an argument. Values that are no tensors are fixed.

    Raises:
        InputError: it cannot be called, or gives no dict with tensors.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:  # a name of the command line (--inputs) or of a caller in Python; no graph records it
        function = getattr(importlib.import_module(module_name), attribute)
        result = function(config) if inspect.signature(function).parameters else function()
    except ImportError as error:
        raise InputError(f"--inputs {name}: cannot import {module_name!r}: {error}") from None
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise InputError(f"--inputs {name}: {type(error).__name__}: {line}") from error
    if not isinstance(result, Mapping) or not any(isinstance(item, Tensor) for item in result.values()):
        raise InputError(f"--inputs {name}: found {type(result).__name__}, expected a dict of tensors by forward"
                         " argument")
    return {key: item.to(device=device, dtype=dtype if item.is_floating_point() else item.dtype)
            if isinstance(item, Tensor) else item for key, item in result.items()}
