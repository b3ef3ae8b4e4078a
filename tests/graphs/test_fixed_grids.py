"""Grids as constants give what transformers computes from ``grid_thw`` tensors: windows, positions, taps, attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from transformers import vision_utils
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from mipipe.graphs.errors import InputError
from mipipe.graphs.models import configuration, example_inputs, families
from mipipe.graphs.models.fixed_grids import Grid, add_at, layout, positions, spans, taps, windows
from mipipe.graphs.operators.layers import packed_attention

GRID = Grid(images=2, rows=5, columns=3, merge=2)
THW = torch.tensor([[1, 10, 6]] * 2)
FILMS = Grid(images=2, rows=5, columns=3, merge=2, layers=3, video=True)
FILMS_THW = torch.tensor([[3, 10, 6]] * 2)
CPU = torch.device("cpu")


def test_windows_are_those_of_transformers() -> None:
    order, lengths = windows(GRID, 2)
    wanted, ends = vision_utils.get_vision_window_index(THW[:1], 2, 8, 2)
    assert order == wanted.tolist() and list(spans(lengths)) == ends.tolist()


def test_layouts_of_videos_are_those_of_transformers() -> None:
    tower = SimpleNamespace(window_size=8, spatial_merge_size=2, patch_size=2)
    made = layout(tower, FILMS, CPU)
    index, ends = vision_utils.get_vision_window_index(FILMS_THW, 2, 8, 2)
    assert made["window_index"].tolist() == index.tolist()
    assert list(made["cu_window_seqlens"]) == ends.tolist()
    assert list(made["cu_seqlens"]) == vision_utils.get_vision_cu_seqlens(FILMS_THW).tolist()
    assert torch.equal(made["position_ids"], vision_utils.get_vision_position_ids(FILMS_THW, 2))


@pytest.mark.parametrize(("grid", "thw"), [(GRID, THW), (FILMS, FILMS_THW)])
def test_taps_are_those_of_transformers(grid: Grid, thw: torch.Tensor) -> None:
    made = taps(grid, 7, CPU)
    index, share = vision_utils.get_vision_interpolation_indices_and_weights(thw, 7, "bilinear", True, 2)
    assert torch.equal(made["interp_indices"], index)
    assert torch.equal(made["interp_weights"], share)


def test_positions_are_those_of_transformers() -> None:
    """Two images in each text, at different places, one of them at the very start."""
    ids = torch.zeros(2, 40, dtype=torch.int64)
    for row, starts in enumerate([(0, 17), (4, 20)]):
        for start in starts:
            ids[row, start:start + 15] = 9
    bare = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(bare)
    bare.config = configuration.read_model_config("qwen2_5_vl", {})
    wanted, _ = bare.get_rope_index(ids, image_grid_thw=THW.repeat(2, 1), mm_token_type_ids=(ids == 9).int())
    assert torch.equal(positions(ids, 9, GRID), wanted)


def test_positions_of_videos_are_those_of_transformers() -> None:
    ids = torch.zeros(1, 110, dtype=torch.int64)
    ids[0, 2:47] = ids[0, 50:95] = 9
    bare = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(bare)
    bare.config = configuration.read_model_config("qwen2_5_vl", {})
    wanted, _ = bare.get_rope_index(ids, video_grid_thw=FILMS_THW, mm_token_type_ids=2 * (ids == 9).int())
    assert torch.equal(positions(ids, 9, FILMS, bare.config.vision_config.tokens_per_second), wanted)


def test_packed_attention_is_attention_within_each_span() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    lengths = [3, 3, 1, 4]
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=spans(lengths), scaling=0.5)
    pieces = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    wanted = [torch.nn.functional.scaled_dot_product_attention(*piece, scale=0.5) for piece in pieces]
    torch.testing.assert_close(out, torch.cat(wanted, dim=2).transpose(1, 2))


def test_add_at_adds_rows_at_chosen_places() -> None:
    hidden, chosen = torch.ones(1, 3, 2), torch.tensor([[False, True, True]])
    assert add_at(hidden, chosen, torch.tensor([[1.0, 2], [3, 4]])).tolist() == [[[1, 1], [2, 3], [4, 5]]]


@pytest.mark.parametrize(("sizes", "message"), [
    (families.Sizes(image=27), "found 27 pixels, expected a multiple of 28"),
    (families.Sizes(frames=3), "frames: found 3, expected a multiple of 2"),
    (families.Sizes(seq=300, frames=4), "expected more than the 512 of 1 videos of 2 x 16 x 16 tokens each"),
    (families.Sizes(seq=200), "found 200 tokens, expected more than the 256 of 1 images of 16 x 16 tokens"),
])
def test_inputs_that_do_not_fit(sizes: families.Sizes, message: str) -> None:
    config = configuration.read_model_config("qwen2_5_vl", {})
    with pytest.raises(InputError, match=message):
        example_inputs.example_inputs(config, families.model_class(config), sizes, "meta", torch.float32)


def test_models_without_videos_say_so() -> None:
    config = configuration.read_model_config("llava", {})
    with pytest.raises(InputError, match="frames: model type 'llava' takes no videos of any length"):
        example_inputs.example_inputs(config, families.model_class(config), families.Sizes(frames=4), "meta",
                                      torch.float32)
