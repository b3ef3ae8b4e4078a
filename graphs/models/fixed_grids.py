"""Image and video grids as constants: what Qwen's vision-language models compute on the host, made static.

These models read the grid of every image or video (``grid_thw.tolist()``) to lay out windows, positions and attention
spans, and the token types to number positions; neither can be exported. Here a microbatch has images of one known size,
or videos of one known size and length, so the layouts are constants, and the positions of text and image tokens are
tensor formulas on ``input_ids`` alone. The vision tower takes them through arguments that transformers has for this
(`transformers.vision_utils`).

Left out: different sizes, or images and videos, in one microbatch; videos not of one second per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.operators.layers import PACKED

DEFAULT_SIDE = 16
"""Tokens on a side of an image where the caller names no size in pixels."""


@dataclass(frozen=True)
class Grid:
    """``images`` images of ``rows`` x ``columns`` tokens, each made of ``merge`` x ``merge`` patches.

    Or as many videos (``video``) of ``layers`` such grids; a layer holds the frames of one temporal patch.
    """

    images: int
    rows: int
    columns: int
    merge: int
    layers: int = 1
    video: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that the language model sees of one image, or of one layer of a video."""
        return self.rows * self.columns

    @property
    def patches(self) -> int:
        """Patches of one image, or of one layer of a video."""
        return self.tokens * self.merge**2

    def in_blocks(self, x: Tensor) -> Tensor:
        """[patch rows, patch columns, ...] in the order of patches: one token's after another: [patches, ...]."""
        rest = x.shape[2:]
        blocks = x.reshape(self.rows, self.merge, self.columns, self.merge, *rest)
        return blocks.transpose(1, 2).reshape(self.patches, *rest)


def grid_of(vision: Any, images: int, side: int, frames: int = 0) -> Grid:
    """The grid of ``images`` square images with ``side`` pixels (0: `DEFAULT_SIDE` tokens) for a vision configuration.

    With ``frames``, of as many videos of that many frames.

    Raises:
        InputError: the side is no whole number of tokens, or the frames no whole number of temporal patches.
    """
    token = vision.patch_size * vision.spatial_merge_size
    side = side or DEFAULT_SIDE * token
    if side % token:
        raise InputError(f"image: found {side} pixels, expected a multiple of {token} (patches of {vision.patch_size}"
                         f" pixels, {vision.spatial_merge_size} x {vision.spatial_merge_size} of which make a token)")
    if frames % vision.temporal_patch_size:
        raise InputError(f"frames: found {frames}, expected a multiple of {vision.temporal_patch_size} (frames of one"
                         " temporal patch)")
    layers = frames // vision.temporal_patch_size or 1
    return Grid(images, side // token, side // token, vision.spatial_merge_size, layers, frames > 0)


def pixels(vision: Any, grid: Grid, device: str, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape in which the models take images: one row per patch [images * layers * patches, features]."""
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.zeros(grid.images * grid.layers * grid.patches, features, dtype=dtype, device=device)


def fix_grids(model: nn.Module, grid: Grid) -> None:
    """Make a Qwen-VL model compute with images or videos of this grid only, without reading it from tensors."""
    core: Any = model.model
    visual, config = core.visual, core.config
    visual.config._attn_implementation = PACKED
    interval = getattr(visual.config, "tokens_per_second", 1)

    def get_features(pixel_values: Tensor, *unused: Any, **options: Any) -> Any:
        found = visual(pixel_values.type(visual.dtype), None, **layout(visual, grid, pixel_values.device))
        found.pooler_output = (found.pooler_output,)
        if hasattr(found, "deepstack_features"):
            found.deepstack_features = [(feature,) for feature in found.deepstack_features]
        return found

    def compute_3d_position_ids(input_ids: Tensor, **unused: Any) -> Tensor:
        return positions(input_ids, config.video_token_id if grid.video else config.image_token_id, grid, interval)

    core.get_image_features = core.get_video_features = get_features
    core.compute_3d_position_ids = compute_3d_position_ids
    if hasattr(core.language_model, "_deepstack_process"):
        core.language_model._deepstack_process = add_at


def layout(visual: Any, grid: Grid, device: torch.device) -> dict[str, Any]:
    """The arguments by which a vision tower takes its layout: positions, attention spans, windows, embedding taps."""
    rows = torch.arange(grid.rows * grid.merge, device=device)
    columns = torch.arange(grid.columns * grid.merge, device=device)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    count = grid.images * grid.layers  # no layer of a video sees another one in the tower
    made: dict[str, Any] = {"position_ids": grid.in_blocks(places).repeat(count, 1),
                            "cu_seqlens": spans([grid.patches] * count), "max_seqlen": grid.patches}
    if hasattr(visual, "window_size"):
        order, lengths = windows(grid, visual.window_size // visual.spatial_merge_size // visual.patch_size)
        starts = torch.arange(count, device=device)[:, None] * grid.tokens
        made |= {"window_index": (starts + torch.tensor(order).to(device)).flatten(),
                 "cu_window_seqlens": spans(lengths * count), "max_window_seqlen": max(lengths)}
    if hasattr(visual, "num_grid_per_side"):
        made |= taps(grid, visual.num_grid_per_side, device)
    return made


def spans(lengths: Sequence[int]) -> tuple[int, ...]:
    """Where attention spans of these lengths begin and end, as Python numbers."""
    return (0, *accumulate(lengths))


def windows(grid: Grid, side: int) -> tuple[list[int], list[int]]:
    """One image's tokens in the order of windows of ``side`` x ``side`` tokens, and the patches of each window."""
    order: list[int] = []
    lengths: list[int] = []
    for top in range(0, grid.rows, side):
        for left in range(0, grid.columns, side):
            inside = [row * grid.columns + column for row in range(top, min(top + side, grid.rows))
                      for column in range(left, min(left + side, grid.columns))]
            order += inside
            lengths.append(len(inside) * grid.merge**2)
    return order, lengths


def taps(grid: Grid, side: int, device: torch.device) -> dict[str, Tensor]:
    """For each patch the four entries of a ``side`` x ``side`` table of embeddings around it, and their weights.

    Bilinear interpolation with aligned corners: [patches, 4] each.
    """
    def along(size: int) -> tuple[Tensor, Tensor]:
        place = torch.arange(size, device=device).float() * (side - 1) / max(size - 1, 1)
        low = place.floor()
        near = low.long()[:, None] + torch.arange(2, device=device)
        share = place - low
        return near.clamp(0, side - 1), torch.stack([1 - share, share], dim=1)

    (high, high_share), (wide, wide_share) = along(grid.rows * grid.merge), along(grid.columns * grid.merge)
    index = (high[:, None, :, None] * side + wide[None, :, None, :]).flatten(2)
    share = (high_share[:, None, :, None] * wide_share[None, :, None, :]).flatten(2)
    return {"interp_indices": grid.in_blocks(index).repeat(grid.images * grid.layers, 1),
            "interp_weights": grid.in_blocks(share).repeat(grid.images * grid.layers, 1)}


def positions(input_ids: Tensor, image_token: int, grid: Grid, interval: int = 1) -> Tensor:
    """Time, height and width position of every token [3, batch, seq], from its id [batch, seq].

    Text counts on by one; an image starts where the text before it ends, its tokens stand at its start plus their row
    and column, and the text after it goes on from its larger side; a video's layers are ``interval`` apart in time
    (multimodal rotary positions, Wang et al., "Qwen2-VL", arXiv 2409.12191, section 2.1; the interval: "Qwen2.5-VL",
    arXiv 2502.13923, section 2.1.2).
    """
    image = input_ids == image_token
    seen, words = image.cumsum(dim=1), (~image).cumsum(dim=1)
    larger = max(grid.rows, grid.columns)
    whole = grid.tokens * grid.layers
    text = words - 1 + seen // whole * larger
    number, inside = (seen - 1) // whole, (seen - 1) % whole
    start = words + number * larger
    placed = torch.stack([start + inside // grid.tokens * interval, start + inside % grid.tokens // grid.columns,
                          start + inside % grid.columns])
    return torch.where(image, placed, text)


def add_at(hidden: Tensor, chosen: Tensor, added: Tensor) -> Tensor:
    """``hidden`` [B,S,H] plus the rows of ``added`` [N,H] at the N chosen places [B,S]."""
    return hidden + torch.zeros_like(hidden).masked_scatter(chosen.unsqueeze(-1), added.to(hidden.dtype))
