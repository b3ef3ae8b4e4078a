"""A small Llama of six layers, captured once with the modes of teams of two and four."""

from __future__ import annotations

import json

import pytest

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.costs.collectives import Fabric, Level
from mipipe.graphs.costs.efficiency import Achieved
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.topology import Link
from mipipe.planner.teams.pieces import ModelPieces, model_pieces
from mipipe.planner.teams.pricing import Machine

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


def machine(memory: int = 10**9, **achieved) -> Machine:
    """Devices with a tenth of an H100's rates, so that the small model is not all launches, eight on a host."""
    shares = Achieved(**{"product": 0.5, "half": 64.0, "memory": 0.8, "action_ns": 1000, **achieved})
    kind = DeviceKind("small", {"bfloat16": 10**13, "float32": 10**12, "float8": 2 * 10**13}, 10**11, memory, 500,
                      "made up", achieved=shares)
    return Machine(kind, Fabric((Level("host", 8, Link(1000, 10**10)), Level("network", 64, Link(5000, 10**9)))), memory)
