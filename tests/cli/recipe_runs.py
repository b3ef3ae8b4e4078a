"""What the tests of runs with recipes share: a small model on disk, configurations, clusters, the command line."""

from pathlib import Path

import yaml
from typer.testing import CliRunner

from mipipe.cli.main import app

HERE = str(Path(__file__).parent)
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32,
         "max_position_embeddings": 64}


def mipipe(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def write(name, **settings):
    data = {"steps": 3, "weights": "base", "optimizer": {"name": "reg", "lr": 1e-2},
            "data": {"source": "recipe_loader:responses"}, "metrics": f"{name}.jsonl", **settings}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(data))
    return f"{name}.yaml"


def cluster(ranks):
    path = Path(f"cluster{ranks}.yaml")
    path.write_text(yaml.safe_dump({
        "format": "mipipe.cluster", "version": 1,
        "hosts": [{"name": "localhost", "devices": ranks, "kind": "h100", "memory": "2GB"}],
        "links": {"within_host": {"latency": "400us", "bandwidth": "1GB/s"}}}))
    return path
