"""A small Llama of six layers, captured once with the modes of teams of two and four."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.teams.pieces import ModelPieces, model_pieces

sys.path.insert(0, str(Path(__file__).parent))  # for team_machine

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 688,
          "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024,
          "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "tie_word_embeddings": False}


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> OperatorGraph:
    """Captured in bfloat16, one sequence of 512 tokens a microbatch."""
    from mipipe.graphs.capture.model import capture

    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return capture(str(folder), seq=512, dtype="bfloat16", verify=False)


@pytest.fixture(scope="session")
def pieces(llama) -> ModelPieces:
    return model_pieces(llama)
