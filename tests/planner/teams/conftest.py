"""Small models, captured once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.teams.prices.pieces import ModelPieces, model_pieces

sys.path.insert(0, str(Path(__file__).parent))

from team_config import CONFIG


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> OperatorGraph:
    """Captured in bfloat16, one sequence of 512 tokens a microbatch."""
    from mipipe.graphs.capture.model import capture

    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return capture(str(folder), seq=512, dtype="bfloat16", verify=False)


@pytest.fixture(scope="session")
def latent(tmp_path_factory) -> OperatorGraph:
    """A DeepSeek-V3 without experts, six layers, as `llama`: queries of latents of 64, keys and values of 32."""
    from mipipe.graphs.capture.model import capture

    folder = tmp_path_factory.mktemp("latent")
    own = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": 8,
           "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
           "first_k_dense_replace": 6}
    (folder / "config.json").write_text(json.dumps(CONFIG | own))
    return capture(str(folder), seq=512, dtype="bfloat16", verify=False)


@pytest.fixture(scope="session")
def llava_of(tmp_path_factory) -> Callable[[int], OperatorGraph]:
    """Of so many samples a microbatch: text of 16 tokens, images of five patches, which two members do not divide."""
    from mipipe.graphs.capture.model import capture

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("llava")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 63,
        "image_seq_length": 5, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_config": {**sizes, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        "text_config": {**sizes, "model_type": "llama", "vocab_size": 64, "num_key_value_heads": 4}}))
    return lambda batch: capture(str(folder), seq=16, batch=batch, verify=False)


@pytest.fixture(scope="session")
def llava(llava_of) -> OperatorGraph:
    """Two samples a microbatch."""
    return llava_of(2)


@pytest.fixture(scope="session")
def latent_pieces(latent) -> ModelPieces:
    return model_pieces(latent)


@pytest.fixture(scope="session")
def pieces(llama) -> ModelPieces:
    return model_pieces(llama)
