"""Byte-level language models of 1.3 M parameters, trained by the product: a base, and an expert for each kind of text.

    python benchmarks/data_driven/train.py WORK SEED

The base learns prose and a little of everything; every expert continues from it on one kind. What is there already is
not trained again. WORK/SEED/NAME are Hugging Face folders with a tokenizer of single bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mipipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_driven import texts

EXPERTS = ("code", "german", "russian", "logs", "numbers")
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 160,
          "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
          "max_position_embeddings": 256, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "use_cache": False}
LENGTH, ROWS = 128, 16
BASE, TUNED = (260, 2.5e-3), (110, 1.5e-3)
"""Steps and learning rate of the base and of an expert."""
SHARE = 60_000
"""Bytes of every expert's kind that the base sees beside its prose."""


def corpora(work: Path) -> Path:
    """Folders of texts: ``KIND/train/text.txt`` for training, ``KIND/validation.txt`` and ``KIND/test.txt``."""
    folder = work / "texts"
    if (folder / "done").exists():
        return folder
    for name in ("prose", *EXPERTS):
        parts = texts.split(name)
        (folder / name / "train").mkdir(parents=True, exist_ok=True)
        (folder / name / "train" / "text.txt").write_bytes(parts["train"])
        for part in ("validation", "test"):
            (folder / name / f"{part}.txt").write_bytes(parts[part])
    (folder / "base" / "train").mkdir(parents=True, exist_ok=True)
    mixed = b"".join((folder / name / "train" / "text.txt").read_bytes()[:SHARE] for name in EXPERTS)
    (folder / "base" / "train" / "text.txt").write_bytes((folder / "prose/train/text.txt").read_bytes() + mixed)
    (folder / "done").touch()
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose 256 tokens are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def train(work: Path, seed: int) -> None:
    """Train what is missing of one seed's six models."""
    folder, data = work / str(seed), corpora(work)
    model = work / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    graph = mipipe.capture(model, seq=LENGTH, batch=ROWS)
    cluster = mipipe.load_cluster(Path(__file__).resolve().parents[2] / "examples/cluster_1cpu.yaml")
    costs = mipipe.profile(graph)
    plan = mipipe.plan(graph, cluster, microbatches=1, costs=costs, time_limit_s=2).plan
    for name, (steps, rate) in (("base", BASE), *((name, TUNED) for name in EXPERTS)):
        if (folder / name / "tokenizer.json").exists():
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        config = {"steps": steps, "seed": seed, "clip": 1.0, "save": {"folder": str(folder / name)},
                  "optimizer": {"name": "adamw", "lr": rate, "options": {"weight_decay": 0.01, "betas": [0.9, 0.98]}},
                  "schedule": {"name": "cosine", "warmup": 20, "minimum": 0.1},
                  "data": {"source": str(data / name / "train")}}
        if name != "base":
            config["weights"] = str(folder / "base")
        result = mipipe.train(plan, graph, config, device="cpu")
        write_tokenizer(folder / name)
        print(f"seed {seed}, {name}: loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}", flush=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
