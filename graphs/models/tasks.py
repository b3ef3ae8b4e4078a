"""What a transformers model is trained on: its loss. Example inputs are in `mipipe.graphs.models.example_inputs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.models import loss as losses
from mipipe.graphs.models.families import ADJUSTMENTS, Adjustment

LANGUAGE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForSpeechSeq2Seq")
"""Endings of classes that predict tokens, one after another."""

_CLASSES = ("Classification", "ForMaskedLM")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TaskLoss:
    """The loss of a task on a model's output object, and which inputs it keeps from the model.

    ``kind``: ``language`` (sum of token cross-entropies; ``shift`` where position t predicts t + 1), ``classes``,
    ``ctc`` (labels padded with -100; ``options`` are ctc_loss's), or ``own`` (the model returns its loss). A router's
    auxiliary loss is added times the count of valid labels, so that after the division by their global count it is the
    average over tokens; so is a router's own loss (`mipipe.graphs.operators.routers.sharpen_routers`), by
    ``sharpness``.
    """

    kind: str
    shift: bool = False
    coefficient: float = 0.0
    sharpness: float = 0.0
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def withheld(self) -> frozenset[str]:
        return frozenset() if self.kind == "own" else frozenset({"labels"})

    @property
    def info(self) -> dict[str, Any]:
        return dict(losses.MEAN) if self.kind in ("own", "ctc") else losses.sum_over("labels", shift=self.shift)

    def __call__(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.kind == "own":
            return output.loss
        if self.kind == "ctc":
            return self._ctc(output.logits, inputs["labels"])
        labels, logits = inputs["labels"], output.logits.float() if output.logits.dtype in _HALF else output.logits
        if self.shift:
            labels = losses.shifted(labels)
        total = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
        auxiliary = getattr(output, "aux_loss", None)
        if self.coefficient and isinstance(auxiliary, Tensor):
            total = total + self.coefficient * auxiliary.to(total.dtype) * (labels != -100).sum()
        if self.sharpness:
            total = total + self.sharpness * output.router_loss.to(total.dtype) * (labels != -100).sum()
        return total

    def _ctc(self, logits: Tensor, labels: Tensor) -> Tensor:
        """transformers' own: every frame counts, blank labels and -100 do not; always in float32."""
        valid = (labels != -100) & (labels != self.options["blank"])
        frames = torch.full((logits.shape[0],), logits.shape[1], dtype=torch.int64, device=logits.device)
        log_probs = logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
        return nn.functional.ctc_loss(log_probs, labels[valid], frames, valid.sum(-1), **self.options)


def task_of(config: Any, kind: Any) -> TaskLoss:
    """The loss that a model class trains with."""
    constants = dict(ADJUSTMENTS.get(config.model_type, Adjustment()).constants)
    name = kind.__name__
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if name.endswith(LANGUAGE):
        constants["use_cache"] = False
        coefficient = 0.0
        if getattr(text, "output_router_logits", False):
            constants["output_router_logits"] = True
            coefficient = float(getattr(text, "router_aux_loss_coef", 0.0))
        return TaskLoss("language", not config.is_encoder_decoder, coefficient, constants=constants)
    if name.endswith("ForCTC"):
        return TaskLoss("ctc", constants=constants, options={
            "blank": config.pad_token_id, "reduction": getattr(config, "ctc_loss_reduction", "mean"),
            "zero_infinity": getattr(config, "ctc_zero_infinity", False)})
    if name.endswith(_CLASSES):
        return TaskLoss("classes", constants=constants)
    return TaskLoss("own", constants=constants)
