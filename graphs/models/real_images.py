"""Models that drop padding images by looking at their pixels (Idefics, SmolVLM and those made of them), made static.

Here a microbatch has the same number of images in every sample, and all of them are real: an image that is all zeros is
an image, not padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _all_real(torch.overrides.TorchFunctionMode):
    """Inside, picking ``count`` images by a mask picks all, and counts by sample are ``images``."""

    def __init__(self, count: int, images: int) -> None:
        super().__init__()
        self.count, self.images = count, images

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype is torch.bool \
                and args[1].shape == (self.count,) == args[0].shape[:1]:
            return args[0]
        if func == Tensor.item and args[0].dtype is torch.int64:  # one entry of counts.tolist()
            return self.images
        return func(*args, **(kwargs or {}))


def keep_all_images(model: nn.Module) -> None:
    """Let the model's `get_image_features` take all images of a microbatch [B,images,C,H,W] as real ones."""
    for part in model.modules():
        if hasattr(part, "get_image_features") and hasattr(part, "vision_model"):
            part.get_image_features = _with_all_images(part.get_image_features)  # type: ignore


def _with_all_images(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch, images = pixel_values.shape[:2]
        with _all_real(batch * images, images):
            return original(pixel_values, *args, **kwargs)

    return run
