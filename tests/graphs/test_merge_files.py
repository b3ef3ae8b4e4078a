"""Headers, layouts, names and vocabularies of merges: without torch, against safetensors itself."""

import json

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import licence_of, read_checkpoint, read_header
from mipipe.graphs.merging.checkpoints.tensor_classes import (
    TensorClass,
    classify,
    layer_index,
    layer_prefix,
    pieces,
    with_layer,
)
from mipipe.graphs.merging.graph import MergeUnit
from mipipe.graphs.merging.layout import index_json, lay_out
from mipipe.graphs.merging.tokens.vocabulary import join, next_added, read_tokens
from mipipe.graphs.merging.values import gradient


def test_headers_say_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, dtype=torch.bfloat16),
               "d": torch.zeros(0, 4), "e": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = {tensor.name: tensor for tensor in read_header(tmp_path / "model.safetensors")[0]}
    raw = (tmp_path / "model.safetensors").read_bytes()
    for name, value in tensors.items():
        assert found[name].shape == tuple(value.shape)
        bits = value.view(torch.uint8) if value.dim() else value.reshape(1).view(torch.uint8)
        assert raw[found[name].start:found[name].stop] == bytes(bits.flatten().tolist())


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_layouts_are_valid_safetensors_files(sizes, limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    units = [MergeUnit(f"t{index}", "copy", (size,), "U8", TensorClass.BUFFER, None, ())
             for index, size in enumerate(sizes)]
    shards = lay_out(units, limit)
    for shard in shards:
        body = bytearray(shard.num_bytes)
        header = shard.header()
        body[:len(header)] = header
        for tensor in shard.tensors:
            body[tensor.start:tensor.stop] = bytes([int(tensor.name[1:])]) * tensor.num_bytes
        (folder / shard.file).write_bytes(body)
        payload = sum(tensor.num_bytes for tensor in shard.tensors)
        assert payload <= limit or len(shard.tensors) == 1
        for name, value in load_file(folder / shard.file).items():
            assert value.tolist() == [int(name[1:])] * sizes[int(name[1:])]
    weight_map = json.loads(index_json(shards))["weight_map"]
    assert sorted(weight_map) == sorted(unit.name for unit in units)
    with safetensors.safe_open(folder / shards[0].file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_licence_is_read_from_the_card(tmp_path):
    assert licence_of(str(tmp_path)) == "unknown"
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\nlicense: no\n")
    assert licence_of(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("# A model\nlicense: mit\n")
    assert licence_of(str(tmp_path)) == "unknown"


@pytest.mark.parametrize(("name", "shape", "dtype", "kind"), [
    ("model.embed_tokens.weight", (10, 4), "BF16", TensorClass.EMBEDDING),
    ("transformer.wpe.weight", (10, 4), "F32", TensorClass.EMBEDDING),
    ("lm_head.weight", (10, 4), "F32", TensorClass.HEAD),
    ("model.layers.3.mlp.up_proj.weight", (8, 4), "F16", TensorClass.MATRIX),
    ("model.layers.3.mlp.experts.gate_up_proj", (4, 8, 4), "F16", TensorClass.MATRIX),
    ("model.vision_tower.embeddings.patch_embedding.weight", (8, 3, 4, 4), "F32", TensorClass.MATRIX),
    ("model.layers.3.input_layernorm.weight", (4,), "F32", TensorClass.VECTOR),
    ("model.rotary_emb.inv_freq", (4,), "F32", TensorClass.BUFFER),
    ("bn.num_batches_tracked", (), "I64", TensorClass.BUFFER),
])
def test_tensor_classes(name, shape, dtype, kind):
    assert classify(name, shape, dtype) is kind


def test_pieces_of_fused_and_stacked_tensors():
    stacked = pieces("model.layers.0.mlp.experts.gate_up_proj", (2, 6, 4), {})
    assert [(piece.key.split("experts.")[1], piece.start, piece.stop) for piece in stacked] == [
        ("gate_up_proj[0]#gate", 0, 3), ("gate_up_proj[0]#up", 3, 6), ("gate_up_proj[1]#gate", 6, 9),
        ("gate_up_proj[1]#up", 9, 12)]
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    fused = pieces("h.0.attn.qkv_proj.weight", (16, 8), config)
    assert [(piece.start, piece.stop) for piece in fused] == [(0, 8), (8, 12), (12, 16)]
    assert len(pieces("h.0.attn.qkv_proj.weight", (15, 8), config)) == 1
    assert len(pieces("conv.weight", (4, 3, 2), {})) == 1


def test_layers_in_names():
    name = "model.language_model.layers.12.mlp.up_proj.weight"
    assert layer_index(name) == 12 and layer_prefix(name) == "model.language_model.layers"
    assert with_layer(name, 3) == "model.language_model.layers.3.mlp.up_proj.weight"
    assert layer_index("lm_head.weight") is None


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=6), position=st.floats(0, 1))
def test_gradients_are_piecewise_linear(values, position):
    found = gradient(values, position)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9
    assert gradient(values, 0.0) == values[0] and gradient(values, 1.0) == pytest.approx(values[-1])
    assert gradient([0.0, 1.0], position) == pytest.approx(position)


def test_joined_vocabularies():
    tokens = [{"a": 0, "b": 1}, {"b": 0, "c": 2}]
    joined = join(tokens, [3, 3], 0, union=True, multiple_of=4)
    assert joined.size == 4 and joined.added == ()  # a padding row is used; others' ordinary tokens are not ours
    assert joined.rows == ((0, 1, -1, -1), (-1, 0, 2, -1))
    kept = join(tokens, [3, 3], 1, union=False, multiple_of=None)
    assert kept.size == 3 and kept.rows == ((1, -1, -1), (0, 1, 2)) and kept.added == ()


@pytest.mark.parametrize(("vocab", "added", "others"), [
    ({"a": 0, "b": 1, "c": 9}, {}, ["x", "y"]), ({"a": 0, "b": 1}, {"s": 2, "t": 3}, ["x", "t", "y"]),
    ({"a": 0, "s": 1, "c": 2}, {"s": 1}, ["x"]), ({"a": 0, "b": 3}, {}, ["x", "y"])])
def test_added_tokens_get_the_ids_that_the_tokenizer_gives_them(tmp_path, vocab, added, others):
    """Also where its vocabulary leaves ids out; where it would give one twice, that is an error."""
    tokenizers = pytest.importorskip("tokenizers")
    entry = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{"id": index, "content": token, **entry} for token, index in added.items()],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}}))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.add_special_tokens(others)
    expected = {token: theirs.token_to_id(token) for token in others}
    mine = read_tokens(str(tmp_path))
    tokens = [mine, {token: index for index, token in enumerate(others)}]
    if len({*mine.values(), *expected.values()}) < len(mine | expected):
        with pytest.raises(InputError, match="'y' would be added with the id 3, which 'b' has"):
            join(tokens, [12, 12], 0, True, None, [{}, dict.fromkeys(others)], first=next_added(str(tmp_path)))
        return
    joined = join(tokens, [12, 12], 0, True, None, [{}, dict.fromkeys(others)], first=next_added(str(tmp_path)))
    assert {**mine, **dict(joined.added)} == {**mine, **expected}
    for token, index in joined.added:
        assert joined.rows[1][index] == others.index(token)


def test_a_folder_without_an_index_reads_all_its_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    assert set(read_checkpoint(tmp_path).tensors) == {"a", "b"}
