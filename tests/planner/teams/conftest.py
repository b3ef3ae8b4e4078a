"""A small Llama of six layers, captured once with the modes of teams of two and four."""

from __future__ import annotations

import json
import sys
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
def latent_pieces(latent) -> ModelPieces:
    return model_pieces(latent)


@pytest.fixture(scope="session")
def pieces(llama) -> ModelPieces:
    return model_pieces(llama)
